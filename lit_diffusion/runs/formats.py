"""Format version of everything a run writes: checkpoints, config.yaml and metrics.jsonl."""

from __future__ import annotations

from lit_diffusion.errors import UserError

FORMAT_VERSION = 1
CHECKPOINT_KEY = "lit_diffusion"
"""Key of this project's own entries in a checkpoint."""


def require_known_format(version: object, what: str) -> None:
    """Refuse a file that this version of the project cannot read.

    Raises:
        UserError: naming the file and both versions.
    """
    if version != FORMAT_VERSION:
        raise UserError(
            f"{what} has format_version {version!r}, this lit_diffusion reads {FORMAT_VERSION}: "
            f"use the version of lit_diffusion that wrote it"
        )
