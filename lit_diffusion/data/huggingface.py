"""Data sets of the Hugging Face hub, and others saved by the package `datasets`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_diffusion.data.cache import data_root, fetch_command
from lit_diffusion.data.pixels import Size, height_and_width, losses, open_picture, to_pixels
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError


class HuggingFace(Source):
    """Images of a Hugging Face data set, read from disk: uint8 ``[channels, height, width]``.

    They need the extra ``hf``. Pictures are converted by `lit_diffusion.data.pixels.to_pixels`.

    Args:
        path: a folder that ``save_to_disk`` wrote, or ``owner/name`` of a data set of the hub that was fetched with
            ``python -m lit_diffusion fetch data owner/name``.
        size: size of the images in pixels: the side of a square, or [height, width].
        split: name of the split.
        image_key: the column of the images.
        label_key: the column of the classes (a ClassLabel or integers from 0); null: no labels.
        channels: 3 for RGB, 1 for grey.
        root: the folder of fetched data, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the package, the data, the split or a column is missing, or a column holds something else.
    """

    def __init__(
        self,
        path: str | Path,
        size: Size,
        split: str = "train",
        image_key: str = "image",
        label_key: str | None = None,
        channels: Literal[1, 3] = 3,
        root: str | Path | None = None,
    ) -> None:
        self._size = height_and_width(size)
        datasets = _datasets()
        data = _load(datasets, str(path), split, data_root() if root is None else Path(root).expanduser())
        for key in filter(None, (image_key, label_key)):
            if key not in data.column_names:
                raise UserError(f"{path} has no column {key!r}: it has {', '.join(data.column_names)}")
        if not isinstance(data.features[image_key], datasets.Image):
            raise UserError(f"image_key: column {image_key!r} of {path} holds {data.features[image_key]}, no images")
        self.name = Path(path).name
        self.shape = (channels, *self._size)
        self._channels: Literal[1, 3] = channels
        self._where = str(path)
        self._saved = data._fingerprint
        self._columns = f"{image_key} {label_key}"
        # One column, so that asking for an image decodes nothing else.
        self._images = data.select_columns(image_key)
        self._image_key = image_key
        self._files = self._images.cast_column(image_key, datasets.Image(decode=False))
        self._labels: np.ndarray | None = None
        if label_key is not None:
            self._labels = np.asarray(data[label_key][:])
            if not np.issubdtype(self._labels.dtype, np.integer):
                raise UserError(
                    f"label_key: column {label_key!r} of {path} must hold integers from 0 up for every image"
                )
            if self._labels.min() < 0:  # Hidden labels of a test split are -1.
                raise UserError(
                    f"label_key: column {label_key!r} of {path} holds {self._labels.min()}, first of image "
                    f"{self._labels.argmin()}: labels must be integers from 0 up"
                )
            feature = data.features[label_key]
            is_class = isinstance(feature, datasets.ClassLabel)
            self.num_classes = feature.num_classes if is_class else int(self._labels.max()) + 1
            self.class_names = feature.names if is_class else None

    def __len__(self) -> int:
        return len(self._images)

    def value(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 ``[channels, height, width]``.

        Raises:
            UserError: if it is not a whole image.
        """
        try:
            return to_pixels(self._images[int(index)][self._image_key], self._size, self._channels)
        except (IndexError, MemoryError):
            raise
        except Exception as error:  # Pillow and its decoders can raise anything for a damaged image.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"image {index} of {self._where} is not a whole image ({reason}): leave it out") from error

    def label(self, index: int) -> int | None:
        """The class of image ``index`` in ``0 .. num_classes - 1``, None without ``label_key``."""
        return None if self._labels is None else int(self._labels[index])

    def notes(self) -> list[str]:
        """Notes about images that are cropped or contain further pictures."""

        def picture_of(index: int) -> Any:
            file = self._files[index][self._image_key]
            return open_picture(file["bytes"] or Path(file["path"]).read_bytes())

        return losses(self._where, len(self), picture_of, self._size)

    def fingerprint(self) -> str:
        """A hash of the options and of the fingerprint that `datasets` saved with the data."""
        return hashlib.sha256(f"{self._saved} {self._columns} {self.shape} {len(self)}".encode()).hexdigest()[:16]


def fetch(path: str, root: Path) -> None:
    """Download all splits of a data set of the hub into the folder from which `HuggingFace` reads.

    Args:
        path: ``owner/name`` on the hub.
        root: the folder of fetched data.

    Raises:
        UserError: if the package is missing or the download fails.
    """
    datasets = _datasets()
    folder = _fetched(path, root)
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        datasets.load_dataset(path).save_to_disk(partial)
        partial.rename(folder)
    except Exception as error:  # Failures of the hub, of the network and of file formats.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot fetch {path} from the hub ({reason}): check the name and the network, or give HuggingFace the "
            "path of a folder that save_to_disk wrote"
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("HuggingFace needs the package datasets: pip install 'lit-diffusion[hf]'") from error
    return datasets


def _fetched(path: str, root: Path) -> Path:
    return root / "huggingface" / path.replace("/", "--")


def _load(datasets: Any, path: str, split: str, root: Path) -> Any:
    """One split of the data in a local folder, or of a fetched data set by its name on the hub."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _fetched(path, root)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {path}, and no data set of this name under {root}: run {fetch_command(path, root)}"
        )
    try:
        data = datasets.load_from_disk(folder)
    except Exception as error:  # Missing or damaged files, in the words of several libraries.
        raise UserError(f"{folder} is not a data set that save_to_disk wrote: load it and save it so") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"split: {path} has no split {split!r}: it has {', '.join(map(str, data))}")
        return data[split]
    if data.split is not None and str(data.split) != split:
        raise UserError(f"split: {path} holds the split {str(data.split)!r} alone, not {split!r}")
    return data
