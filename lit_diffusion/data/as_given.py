"""Images somebody gives to be looked at or scored: read as for training, and none cut or resized."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from lit_diffusion.data.folder import any_in_colour, image_names, is_image, open_files, picture_losses, read_image
from lit_diffusion.data.npz import Npz
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError
from lit_diffusion.files import SET_FILE, set_in


def images_as_given(path: str | Path) -> Source:
    """The images of an ``.npz`` file, a folder or a zip file, in the order of their names, none cut or resized.

    Raises:
        UserError: if there is nothing there, or no images of one common size.
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


class _Unchanged(Source):
    """Files of images that all have one size: RGB where one of them is, with the grey ones repeated, else grey."""

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
            UserError: if the file is corrupt or cannot be read, or is of another size than the first.
        """
        name = self._names[index]
        image = read_image(self._files, name, self.path, channels=self._channels)
        if image.shape != self.shape:
            raise UserError(
                f"{name} in {self.path} is {list(image.shape)}, {self._names[0]} is {list(self.shape)}: all images "
                f"must have one size; nothing is resized here"
            )
        return image

    def notes(self) -> list[str]:
        """Whether images hold further pictures."""
        return picture_losses(self._files, self._names, self.path)


def _require_whole_set(path: Path, names: list[str]) -> None:
    """Refuse a folder of samples with others among them, or with some of them alone."""
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
