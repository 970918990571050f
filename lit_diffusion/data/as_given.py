"""Images given for evaluation: read as for training, without cropping or resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from lit_diffusion.data.folder import (
    any_in_colour,
    composed,
    image_names,
    is_image,
    labels_in,
    open_files,
    picture_losses,
    read_image,
)
from lit_diffusion.data.npz import Npz
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError
from lit_diffusion.files import SET_FILE, set_in


def images_as_given(path: str | Path) -> Source:
    """The images of an ``.npz`` file, a folder or a zip file, in the order of their names and in their own size.

    Raises:
        UserError: for a missing path, or images that do not have one common size.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npz":
        return Npz(path)
    if (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path} is a run's directory, not images: give a file of its samples/, or draw some by `sample "
            f"--ckpt_path {path} --num_samples 1000 --out samples.npz`"
        )
    return _Unchanged(path)


def classes_as_given(path: str | Path, source: Source) -> list[str] | None:
    """The class of each image by its name, or by its number where there are no names; None where it is unknown.

    For images opened by :func:`images_as_given` they come from ``labels`` (and ``class_names``) of an archive, as
    ``sample`` writes them, or ADM's ``arr_1``; from ``dataset.json`` of a folder or zip file. Other sources have
    their own.
    """
    if source.num_classes is not None:
        numbers: list[int | None] = [source.label(index) for index in range(len(source))]
        names = list(source.class_names or ())
    elif isinstance(source, _Unchanged):
        numbers, names = source.labels()
    elif isinstance(source, Npz):
        numbers, names = _labels_of_archive(Path(path).expanduser(), len(source))
    else:
        return None
    if not numbers or None in numbers:
        return None
    return [names[k] if k is not None and k < len(names) else str(k) for k in numbers]


def _labels_of_archive(path: Path, count: int) -> tuple[list[int | None], list[str]]:
    with np.load(path, allow_pickle=False) as archive:
        key = next((key for key in ("labels", "arr_1") if key in archive.files), None)
        labels = archive[key] if key is not None else np.empty(0)
        names = archive["class_names"].astype(str).tolist() if "class_names" in archive.files else []
    fits = labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer)
    return [int(label) for label in labels] if fits else [], names


class _Unchanged(Source):
    """Files of images of one size: grey if all are grey, else RGB with grey images repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._files = open_files(path)
        self._names = image_names(self._files, path)
        _require_whole_set(path, self._names)
        self._channels: Literal[1, 3] = 3 if any_in_colour(self._files, self._names) else 1
        self.shape = read_image(self._files, self._names[0], path, channels=self._channels).shape

    def __len__(self) -> int:
        return len(self._names)

    def value(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 ``[C, H, W]``.

        Raises:
            UserError: if the file is corrupt or cannot be read, or differs in size from the first.
        """
        name = self._names[index]
        image = read_image(self._files, name, self.path, channels=self._channels)
        if image.shape != self.shape:
            raise UserError(
                f"{name} in {self.path} is {list(image.shape)}, {self._names[0]} is {list(self.shape)}: all images "
                f"must have one size; nothing is resized here"
            )
        return image

    def labels(self) -> tuple[list[int | None], list[str]]:
        """The labels in ``dataset.json``: a number or None for each image, and the names of the classes."""
        try:
            labels, names = labels_in(self._files, self.path) or ({}, [])
        except UserError:  # The images can be evaluated without labels.
            return [], []
        return [labels.get(composed(name)) for name in self._names], names

    def notes(self) -> list[str]:
        """Notes about images with further pictures."""
        return picture_losses(self._files, self._names, self.path)


def _require_whole_set(path: Path, names: list[str]) -> None:
    """Refuse a folder of samples that is incomplete or contains other images."""
    listed = set_in(path)
    if listed is None:
        return
    if not listed.whole:
        raise UserError(
            f"{path} holds samples of two sets: `sample` was stopped while one took the other's place; draw them again "
            f"with --overwrite"
        )
    images = list(filter(is_image, listed.names))
    if set(images) != set(names):
        raise UserError(
            f"{path} holds {len(names)} images, and its {SET_FILE} lists {len(images)}, not the same: move the "
            f"others away, or remove {SET_FILE} if all of them are meant"
        )
