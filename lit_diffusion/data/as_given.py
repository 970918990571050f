"""Images somebody gives to be looked at or scored: every pixel as it is in the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from lit_diffusion.data.folder import SUFFIXES, is_image, open_files
from lit_diffusion.data.npz import Npz
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError


def images_as_given(path: str | Path) -> Source:
    """The images of an ``.npz`` file, a folder or a zip file, in the order of their names, none cut or resized.

    Raises:
        UserError: if there is nothing there, or no images of one common size.
    """
    path = Path(path).expanduser()
    if path.suffix == ".npz":
        return Npz(path)
    return _Unchanged(path)


class _Unchanged(Source):
    """Files of images that all have one size and one mode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._files = open_files(path)
        self._names = sorted(name for name in self._files.names() if is_image(name))
        if not self._names:
            raise UserError(f"no image in {path}: there must be files that end in {', '.join(SUFFIXES)}")
        self.shape = self._read(self._names[0]).shape

    def __len__(self) -> int:
        return len(self._names)

    def value(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 ``[C, H, W]``.

        Raises:
            UserError: if the file is corrupt, or of another size or mode than the first.
        """
        name = self._names[index]
        image = self._read(name)
        if image.shape != self.shape:
            raise UserError(
                f"{name} in {self.path} is {list(image.shape)}, {self._names[0]} is {list(self.shape)}: all images "
                f"must have one size and one number of channels; nothing is resized here"
            )
        return image

    def _read(self, name: str) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self._files.read(name))) as picture:
                grey = picture.mode in ("1", "L")
                values = np.asarray(picture.convert("L" if grey else "RGB"))
        except Exception as error:  # Pillow, its decoders and zipfile raise anything over a damaged file.
            raise UserError(f"{name} in {self.path} is not a whole image: replace or remove it ({error})") from error
        return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))
