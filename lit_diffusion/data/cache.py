"""Folders of data on this machine."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.files import cache_folder

_VARIABLE = "LIT_DIFFUSION_DATA"


def data_root() -> Path:
    """The folder of downloaded and rendered data: ``$LIT_DIFFUSION_DATA``, or ``~/.cache/lit_diffusion/data``."""
    return cache_folder("data", _VARIABLE)


def fetch_command(name: str, root: Path) -> str:
    """The command that fetches data set ``name`` into ``root``."""
    command = f"python -m lit_diffusion fetch data {name}"
    return command if root == data_root() else f"{_VARIABLE}={root} {command}"
