"""Images or points in a NumPy archive, in the layout of ADM's reference batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
from torch import Tensor

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError


class Npz(InMemory):
    """Images of an ``.npz`` file: uint8 ``[N, H, W, C]`` with any number of channels, or ``[N, H, W]`` grey.

    This is the layout of ADM's reference batches (Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233). Each row
    of floats ``[N, D]`` is a point, used unchanged. The whole array is held in memory. Labels are integers ``[N]`` from
    0. The key ``class_names`` in the file names the classes in the order of their numbers; without it the number of
    classes is the largest label plus one. The command ``sample`` writes labels as ``labels``.

    Args:
        path: the file.
        key: the key of the images in the file.
        label_key: the key of the labels in the file; null: no labels.

    Raises:
        UserError: if the file or a key is missing, the values have another type or layout, or the labels do not fit.
    """

    def __init__(self, path: str | Path, key: str = "arr_0", label_key: str | None = None) -> None:
        path = Path(path).expanduser()
        images = _read(path, key)
        points = images.ndim == 2 and np.issubdtype(images.dtype, np.floating)
        if not points and images.dtype != np.uint8:
            raise UserError(
                f"key {key!r} of {path} is {images.dtype}, images must be uint8: save x.astype(numpy.uint8) of values "
                "0 .. 255, (255 * x).round().astype(numpy.uint8) of values 0 .. 1"
            )
        if images.ndim == 3:
            images = images[..., None]
        if 0 in images.shape or not (points or (images.ndim == 4 and not _channels_first(images.shape))):
            raise UserError(
                f"key {key!r} of {path} has the shape {list(images.shape)}: images must be [N, H, W, C] (transpose "
                "them if the channels come first) or [N, H, W], points floats [N, D]"
            )
        labels = None if label_key is None else _read(path, label_key)
        if labels is not None and (not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]):
            raise UserError(
                f"key {label_key!r} of {path} is {labels.dtype} {list(labels.shape)}: labels must be one integer from "
                f"0 up for each of the {len(images)} images"
            )
        if labels is not None and labels.min() < 0:
            raise UserError(
                f"key {label_key!r} of {path} holds {labels.min()}, first of image {labels.argmin()}: labels must be "
                f"integers from 0 up"
            )
        names = None if labels is None else _read(path, "class_names", optional=True)
        super().__init__(
            images.astype(np.float32) if points else images.transpose(0, 3, 1, 2),
            labels,
            num_grey_levels=None if points else 256,
            name=path.stem,
            num_classes=None if labels is None else int(labels.max()) + 1 if names is None else names.size,
            class_names=None if names is None else names.ravel().astype(str).tolist(),
        )


def _channels_first(shape: tuple[int, ...]) -> bool:
    """True where ``[N, H, W, C]`` is more likely ``[N, C, H, W]``: images of 3 rows, or of as many columns as channels.

    Satellite images of 12 channels are neither, nor patches of 9 x 9 pixels with 200 channels.
    """
    _, first, second, last = shape
    return first < last and (first == 3 or second == last)


def label_arrays(labels: Tensor | None, class_names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """The arrays from which :class:`Npz` reads labels: ``labels``, and ``class_names`` where known."""
    if labels is None:
        return {}
    named = {} if not class_names else {"class_names": np.array(class_names)}
    return {"labels": labels.cpu().numpy(), **named}


@overload
def _read(path: Path, key: str) -> np.ndarray: ...
@overload
def _read(path: Path, key: str, optional: Literal[True]) -> np.ndarray | None: ...
def _read(path: Path, key: str, optional: bool = False) -> np.ndarray | None:
    """One array of the file, of any type; None for a missing optional one."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds one array without a name (.npy): save it with numpy.savez")
        with archive:
            if optional and key not in archive.files:
                return None
            if key not in archive.files:
                raise UserError(f"{path} has no key {key!r}: it has {', '.join(map(repr, archive.files)) or 'none'}")
            return archive[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read key {key!r} of {path} ({reason}): write it with numpy.savez") from error
