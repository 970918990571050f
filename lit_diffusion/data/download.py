"""Download of data sets."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.data import huggingface, torchvision_sets
from lit_diffusion.data.cache import data_root


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download a data set and check it against its published checksums, unless it is there already.

    This is the only place of the project that downloads data: sources read from disk, or fail with the command to run.

    Args:
        name: a torchvision set (``CIFAR10``, ``CIFAR100``, ``MNIST``, ``FashionMNIST``, ``SVHN``, ``CelebA``; case does
            not matter) or a data set of the Hugging Face hub (``owner/name``).
        root: target folder, by default `data_root`.

    Returns:
        The folder that the source of this data set takes as its root.

    Raises:
        UserError: for an unknown data set or a failed download.
    """
    root = data_root() if root is None else Path(root).expanduser()
    if "/" in name:
        huggingface.fetch(name, root)
    else:
        torchvision_sets.fetch(name, root)
    return root
