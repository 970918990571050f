"""Files that are whole or absent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lit_diffusion.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    Written to a temporary name in the same folder, synced, renamed; on any failure the temporary file is removed and
    whatever stood under the name before is untouched.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # Where the folder is a file, even looking for it fails.
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let a renaming outlast a power cut, where the file system can be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def packaged_experiment(name: str) -> Path | None:
    """The shipped configuration ``experiments/...`` of an installed package, None where there is none of that name."""
    inside = Path(__file__).parent / name
    beside = Path(__file__).parent.parent / name
    if not name.startswith("experiments/"):
        return None
    return next((path for path in (inside, beside) if path.is_file()), None)
