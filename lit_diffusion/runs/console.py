"""Lines that a run prints to the terminal."""

from __future__ import annotations

from contextlib import suppress

from lit_diffusion.failures import is_first_process


def print_note(line: str) -> None:
    """Print one line to the terminal, outside the progress bar; of several processes only the first prints."""
    from tqdm import tqdm

    if not is_first_process():
        return
    with suppress(OSError, ValueError):  # A terminal that is gone, a full disk that the output goes to.
        tqdm.write(line)
