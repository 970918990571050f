"""Where data lie on this machine, and the one way in which they come there."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "LIT_DIFFUSION_DATA"


def data_root() -> Path:
    """The folder of downloaded and rendered data: ``$LIT_DIFFUSION_DATA``, or ``~/.cache/lit_diffusion/data``."""
    return Path(os.environ.get(_VARIABLE) or "~/.cache/lit_diffusion/data").expanduser()


def fetch_command(name: str, root: Path) -> str:
    """What to type so that data set ``name`` is put under ``root``."""
    command = f"python -m lit_diffusion fetch data {name}"
    return command if root == data_root() else f"{_VARIABLE}={root} {command}"


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download a data set, checked against its published checksums; nothing is done if it is there already.

    The only place of the project that downloads data: sources read what is on the disk or say that it is missing.

    Args:
        name: a torchvision set (``CIFAR10``, ``CIFAR100``, ``MNIST``, ``FashionMNIST``, ``SVHN``, ``CelebA``; case does
            not matter) or a data set of the Hugging Face hub (``owner/name``).
        root: the folder to put it in, by default `data_root`.

    Returns:
        The folder that the source of this data set takes as its root.

    Raises:
        UserError: if there is no such data set or it cannot be downloaded.
    """
    # Both modules take `data_root` from here.
    from lit_diffusion.data import huggingface, torchvision_sets

    root = data_root() if root is None else Path(root).expanduser()
    if "/" in name:
        huggingface.fetch(name, root)
    else:
        torchvision_sets.fetch(name, root)
    return root
