"""The standard image sets of torchvision, read from disk and never downloaded by a run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_diffusion.data.cache import data_root, fetch_command
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.data.pixels import Size, height_and_width, open_picture, to_pixels
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError

# The arguments of torchvision's classes that together give each complete set.
_PARTS: dict[str, list[dict[str, Any]]] = {
    "CIFAR10": [{}],
    "CIFAR100": [{}],
    "MNIST": [{}],
    "FashionMNIST": [{}],
    "SVHN": [{"split": "train"}, {"split": "test"}],
    "CelebA": [{"split": "train"}],
}


class CIFAR10(InMemory):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images, uint8 ``[3, 32, 32]``, 10 classes.

    Args:
        split: ``train`` or ``test``.
        root: the folder that holds ``cifar-10-batches-py``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(self, split: Literal["train", "test"] = "train", root: str | Path | None = None) -> None:
        data = _load("CIFAR10", root, train=split == "train")
        images = data.data.transpose(0, 3, 1, 2)
        super().__init__(
            images, np.asarray(data.targets), name=f"cifar10-{split}", num_classes=10, class_names=data.classes
        )


class CIFAR100(InMemory):
    """CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images, uint8 ``[3, 32, 32]``, 100 (fine) classes.

    Args:
        split: ``train`` or ``test``.
        root: the folder that holds ``cifar-100-python``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(self, split: Literal["train", "test"] = "train", root: str | Path | None = None) -> None:
        data = _load("CIFAR100", root, train=split == "train")
        images = data.data.transpose(0, 3, 1, 2)
        super().__init__(
            images, np.asarray(data.targets), name=f"cifar100-{split}", num_classes=100, class_names=data.classes
        )


class MNIST(InMemory):
    """MNIST (LeCun et al. 1998): 60,000 and 10,000 digits, uint8 ``[1, 28, 28]``, white on black, 10 classes.

    Args:
        split: ``train`` or ``test``.
        root: the folder that holds ``MNIST/raw``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(self, split: Literal["train", "test"] = "train", root: str | Path | None = None) -> None:
        data = _load("MNIST", root, train=split == "train")
        super().__init__(data.data.numpy()[:, None], data.targets.numpy(), name=f"mnist-{split}", num_classes=10)


class FashionMNIST(InMemory):
    """Fashion-MNIST: 60,000 and 10,000 garments, uint8 ``[1, 28, 28]``, 10 classes.

    Xiao et al. 2017, https://arxiv.org/abs/1708.07747.

    Args:
        split: ``train`` or ``test``.
        root: the folder that holds ``FashionMNIST/raw``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(self, split: Literal["train", "test"] = "train", root: str | Path | None = None) -> None:
        data = _load("FashionMNIST", root, train=split == "train")
        images = data.data.numpy()[:, None]
        super().__init__(
            images, data.targets.numpy(), name=f"fashion-mnist-{split}", num_classes=10, class_names=data.classes
        )


class SVHN(InMemory):
    """Street View House Numbers (Netzer et al. 2011): 73,257 and 26,032 crops, uint8 ``[3, 32, 32]``, 10 classes.

    Args:
        split: ``train`` or ``test``.
        root: the folder that holds ``train_32x32.mat``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(self, split: Literal["train", "test"] = "train", root: str | Path | None = None) -> None:
        data = _load("SVHN", root, split=split)
        super().__init__(data.data, data.labels, name=f"svhn-{split}", num_classes=10)


class CelebA(Source):
    """CelebA, aligned and cropped: 162,770 faces for training, uint8 ``[3, height, width]``, no classes.

    Liu et al. 2015, https://arxiv.org/abs/1411.7766. The centered square of ``crop`` pixels of the 178 x 218 picture is
    resized to ``size`` (Lanczos, antialiased), after a crop to its aspect ratio where that is not 1. NCSN and its
    successors train on the middle 140 pixels.

    Args:
        size: size of the images in pixels: the side of a square, or [height, width].
        crop: the side of the cropped square, at most 178.
        split: ``train``, ``valid`` or ``test``.
        root: the folder that holds ``celeba``, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the files are missing, with the command to fetch them.
    """

    def __init__(
        self,
        size: Size = 64,
        crop: int = 140,
        split: Literal["train", "valid", "test"] = "train",
        root: str | Path | None = None,
    ) -> None:
        self._size = height_and_width(size)
        if not 1 <= crop <= 178:
            raise UserError(f"crop: {crop} does not fit into the 178 x 218 pictures of CelebA: give 1 to 178, e.g. 140")
        data = _load("CelebA", root, split=split)
        self.name = f"celeba-{split}"
        self.shape = (3, *self._size)
        self._folder = Path(data.root, data.base_folder, "img_align_celeba")
        self._files = list(data.filename)
        self._crop = crop

    def __len__(self) -> int:
        return len(self._files)

    def value(self, index: int) -> np.ndarray:
        """Face ``index``: uint8 ``[3, height, width]``.

        Raises:
            UserError: if its file is missing or corrupt.
        """
        path = self._folder / self._files[index]
        try:
            with open_picture(path.read_bytes()) as picture:
                left, top = (picture.width - self._crop) // 2, (picture.height - self._crop) // 2
                face = picture.crop((left, top, left + self._crop, top + self._crop))
                return to_pixels(face, self._size, 3)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and its decoders can raise anything for a damaged file.
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read {path} ({reason}): extract img_align_celeba.zip again") from error

    def fingerprint(self) -> str:
        """A hash of the crop and of the files' names and sizes; their pixels were checked at download."""
        digest = hashlib.sha256(f"{self.shape} {self._crop}".encode())
        for file in self._files:
            digest.update(f"{file}\0{(self._folder / file).stat().st_size}\0".encode())
        return digest.hexdigest()[:16]


def fetch(name: str, root: Path) -> None:
    """Download one of these sets with torchvision, which checks its checksums.

    Args:
        name: name of the class in this file; case does not matter.
        root: target folder.

    Raises:
        UserError: for an unknown set or a failed download.
    """
    from torchvision import datasets

    known = {key.lower(): key for key in _PARTS}
    if name.lower() not in known:
        raise UserError(
            f"there is no data set {name!r} to fetch: choose one of {', '.join(_PARTS)}, or give owner/name of the "
            "Hugging Face hub"
        )
    name = known[name.lower()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part in _PARTS[name]:
            getattr(datasets, name)(root, download=True, **part)
    except Exception as error:  # Failures of the network, gdown and torchvision have no common base class.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot fetch {name} ({reason}): try again later, with what is there of it under {root} removed, or put "
            "torchvision's files for it there"
        ) from error


def _load(name: str, root: str | Path | None, **part: Any) -> Any:
    """The torchvision set, or a UserError with the command to fetch it."""
    from torchvision import datasets

    root = data_root() if root is None else Path(root).expanduser()
    try:
        return getattr(datasets, name)(root, download=False, **part)
    except Exception as error:  # From torchvision, or from its readers for damaged files without a checksum.
        raise UserError(f"{name} is missing or damaged under {root}: run {fetch_command(name, root)}") from error
