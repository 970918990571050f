"""Conversion of image files to uint8 ``[C, H, W]``, the same for training, reference and evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import numpy as np

from lit_diffusion.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Size = int | tuple[int, int]
"""The size of an image in pixels: the side of a square, or (height, width)."""
LOOKED_AT = 1_000
"""The number of pictures of a set, spread over all of it, that :func:`losses` inspects."""


def height_and_width(size: Size) -> tuple[int, int]:
    """Height and width of a size, checked before the first image is read.

    Raises:
        UserError: unless it is a positive integer or two of them.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise UserError(f"size: {size} is not an image's size: give a number of pixels, e.g. 32, or [height, width]")
    return sides


def open_picture(data: bytes) -> Image.Image:
    """The picture in the bytes of an image file, not decoded yet.

    Raises:
        Exception: of many kinds, from Pillow and its decoders, if the bytes are not a whole image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # Its message shows the address of the buffer.
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise ValueError(
                "a TIFF file of a layout that Pillow does not know; put images of other than grey or RGB into an .npz "
                "file, which takes any number of channels"
            ) from error
        raise ValueError("of no format that Pillow knows") from error


def decode(data: bytes, size: tuple[int, int] | None = None, channels: Literal[1, 3] | None = None) -> np.ndarray:
    """The picture in the bytes of an image file, converted by `to_pixels`.

    Raises:
        Exception: of many kinds, from Pillow and its decoders, if the bytes are not a whole image.
    """
    with open_picture(data) as picture:
        return to_pixels(picture, size, channels)


def is_grey(picture: Image.Image) -> bool:
    """True where a picture has one channel, apart from transparency; a palette counts as color."""
    return picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")


def to_pixels(
    picture: Image.Image, size: tuple[int, int] | None = None, channels: Literal[1, 3] | None = None
) -> np.ndarray:
    """A picture as uint8 ``[channels, height, width]``.

    The picture is rotated by its EXIF tag, converted to 8 bits of grey or RGB, center-cropped to the largest rectangle
    with the target's aspect ratio, and resized (Lanczos, antialiased). One of that size keeps every pixel. Of an
    animation, or of a file of several pages, the first picture counts.

    - Transparent parts become white.
    - Of 16-bit values the high byte is kept: it restores values widened from 8 bits, by 256 or by 257, and is what
      Pillow keeps of 16-bit colors.
    - Grey becomes RGB by repetition, RGB becomes grey by the ITU-R 601-2 weights (0.299, 0.587, 0.114).
    - CMYK and the like are converted as Pillow does, without color profiles.

    Args:
        picture: a picture of any mode.
        size: height and width; None: the picture's own.
        channels: 3 for RGB, 1 for grey; None: the picture's own.

    Raises:
        ValueError: if the values have no agreed range (floats, 32-bit integers) or Pillow cannot convert them to RGB.
    """
    from PIL import Image, ImageOps

    channels = channels or (1 if is_grey(picture) else 3)
    file_format, transparent = picture.format, picture.info.get("transparency")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or (picture.mode == "I" and file_format not in ("PNG", "PPM")):
        kind = "float" if picture.mode == "F" else "32-bit"
        raise ValueError(f"{kind} values, which have no agreed range; convert the file to 8 or 16 bits")
    if picture.mode.startswith("I"):  # I;16 and its byte orders; I is what Pillow makes of 16-bit PGM
        values = np.asarray(picture)
        picture = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(transparent, int):  # one grey, in 16 bits
            picture.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    picture = picture.convert("L" if channels == 1 else "RGB")

    if size is not None and picture.size != size[::-1]:
        picture = picture.crop(middle(picture.size, size))
        if picture.size != size[::-1]:
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    values = np.asarray(picture)
    return np.ascontiguousarray(values[None] if channels == 1 else values.transpose(2, 0, 1))


def middle(width_and_height: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centered rectangle with the aspect ratio of ``size``, in pixels: left, top, right, bottom."""
    (width, height), (tall, wide) = width_and_height, size
    kept_width, kept_height = width, height
    if width * tall > height * wide:
        kept_width = max(1, (height * wide + tall // 2) // tall)
    else:
        kept_height = max(1, (width * tall + wide // 2) // wide)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def losses(
    owner: str,
    count: int,
    picture_of: Callable[[int], AbstractContextManager[Image.Image]],
    size: tuple[int, int] | None = None,
) -> list[str]:
    """Lines about lost parts of the pictures of a set: cropped borders, pictures after the first in a file.

    Only the headers of at most `LOOKED_AT` files are read; files that are not pictures are skipped.

    Args:
        owner: name of the set, for the lines.
        count: number of pictures.
        picture_of: opens picture 0 .. ``count - 1``; its exceptions are ignored.
        size: target size of the pictures; None: their own.
    """
    cut = several = 0
    looked_at = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)).tolist()
    for index in looked_at:
        try:
            with picture_of(index) as picture:
                sides = picture.size[::-1] if picture.getexif().get(0x0112, 1) >= 5 else picture.size  # turned by 90
                cut += size is not None and middle(sides, size) != (0, 0, *sides)
                several += picture.format != "MPO" and getattr(picture, "is_animated", False)  # MPO: a camera's extras
        except Exception:  # Reading it raises the error with its name.
            continue
    of = f"of {len(looked_at):,} images" + ("" if len(looked_at) == count else f" looked at (of {count:,})")
    found = []
    if cut and size is not None:
        advice = "" if size[0] != size[1] else "; size takes [height, width], too"
        found.append(f"{owner}: {cut:,} {of} are cut to the middle that has the sides of {size[0]} x {size[1]}{advice}")
    if several:
        found.append(f"{owner}: {several:,} {of} hold several pictures (animations, pages): the first of each is taken")
    return found
