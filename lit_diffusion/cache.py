"""Where this project keeps what can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str, variable: str | None = None) -> Path:
    """The folder ``name`` below ``$LIT_DIFFUSION_CACHE`` (default ``~/.cache/lit_diffusion``).

    Args:
        name: data, weights, references, ...
        variable: of the environment, which names another folder for this one.
    """
    given = os.environ.get(variable) if variable is not None else None
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("LIT_DIFFUSION_CACHE") or "~/.cache/lit_diffusion").expanduser() / name
