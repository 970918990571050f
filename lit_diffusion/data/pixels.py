"""From any picture to the square uint8 array that a model is trained on."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

import numpy as np

from lit_diffusion.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def check_size(size: int) -> None:
    """Refuse a side of no pixels before the first image is asked for.

    Raises:
        UserError: if ``size`` is below 1.
    """
    if size < 1:
        raise UserError(f"size: {size} is no side of an image: give a number of pixels, e.g. 32")


def decode(data: bytes, size: int, channels: Literal[1, 3]) -> np.ndarray:
    """The picture in the bytes of an image file, as `to_pixels` gives it.

    Raises:
        Exception: of many kinds, Pillow's and its decoders', if the bytes are no whole image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # Its message shows the address of the buffer.
        raise ValueError("of no format that Pillow knows") from error
    with picture:
        return to_pixels(picture, size, channels)


def to_pixels(picture: Image.Image, size: int, channels: Literal[1, 3]) -> np.ndarray:
    """A picture as uint8 ``[channels, size, size]``.

    The picture is turned as its EXIF tag says, brought to 8 bits of grey or RGB, cut to the square in its middle, and
    resized (Lanczos, antialiased). One that is ``size x size`` already keeps every pixel. Of an animation the first
    picture counts.

    - Transparent parts are laid on white.
    - Of 16-bit values the high byte is kept, which is also what Pillow does with 16-bit colours.
    - Grey becomes RGB by repetition, RGB becomes grey by the ITU-R 601-2 weights (0.299, 0.587, 0.114).
    - CMYK and the like are converted as Pillow does, without colour profiles.

    Raises:
        ValueError: if the values have no agreed range (floats, 32-bit integers) or Pillow knows no way to RGB.
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # I;16 and its byte orders; I is what Pillow makes of 16-bit PGM
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit values, which have no agreed range; convert the file to 8 or 16 bits")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("float values, which have no agreed range; convert the file to 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    picture = picture.convert("L" if channels == 1 else "RGB")

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    values = np.asarray(picture)
    return np.ascontiguousarray(values[None] if channels == 1 else values.transpose(2, 0, 1))
