"""The one way in which data come to this machine."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.data import huggingface, torchvision_sets
from lit_diffusion.data.cache import data_root


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
    root = data_root() if root is None else Path(root).expanduser()
    if "/" in name:
        huggingface.fetch(name, root)
    else:
        torchvision_sets.fetch(name, root)
    return root
