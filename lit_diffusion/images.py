"""Conversion of model values to bytes, and pictures made of bytes: grids and PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_diffusion.data_spec import DataSpec

ValueRange = tuple[float, float]


def to_uint8(x: Tensor, scale: DataSpec | ValueRange) -> np.ndarray:
    """Convert model values to bytes: clamp to the range, scale to 0 .. 255, round to the nearest.

    A model of dequantized data represents grey level v of L as the bin ``[v / L, (v + 1) / L)`` of the range: its
    images are put back on the grey levels, ``v = floor(L x)``, before they are scaled, so that the bytes of a training
    image are those of its source.

    This is the only function of the project that converts model values to bytes: metrics, PNG files, archives and
    dashboards all use its output.

    Args:
        x: float ``[B, C, H, W]``; values outside the range are clamped.
        scale: the data spec of the model; or the values of black and white, e.g. ``(0, 1)`` or ``(-1, 1)``.

    Returns:
        uint8 ``[B, H, W, C]``.

    Raises:
        ValueError: if a value is not finite, or the data are points.
    """
    x = x.detach().to(torch.float32)
    if not torch.isfinite(x).all():
        raise ValueError("to_uint8: NaN or infinite values have no grey level")
    if isinstance(scale, tuple):
        low, high = scale
    elif scale.value_range is None or scale.grey_levels is None:
        raise ValueError(f"to_uint8: {scale.source} are points, which have no grey levels")
    elif scale.dequantized:
        low, high, x = 0.0, 1.0, scale.grey_levels.nearest(x)
    else:
        low, high = scale.value_range
    # Halves round up, also where float32 falls up to 3e-5 short of them: grey level 1 of 0 .. 10 is 25.5 in one range
    # and 25.49999 in another, and must give the same byte in both.
    scaled = ((x.clamp(low, high) - low) * (255.0 / (high - low)) + 0.50005).floor()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def as_shown(images: np.ndarray) -> np.ndarray:
    """The channels of uint8 ``[..., C]`` that a picture shows: 1 or 3 as given, the first of 2, else the first 3."""
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., : 1 if channels == 2 else 3]


def about_shown(channels: int) -> str | None:
    """One line about the channels that pictures show; None where they show all."""
    if channels in (1, 3):
        return None
    return f"pictures show channel{' 1' if channels == 2 else 's 1 to 3'} of {channels}; archives (.npz) hold all"


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 1, min_side: int = 512) -> np.ndarray:
    """A grid of images in one picture, row by row: uint8 ``[N, H, W, C]`` to ``[H', W', 1 or 3]``.

    It shows the channels of :func:`as_shown`. Small images are enlarged by an integer factor (nearest neighbor) until
    the grid is about ``min_side`` wide.
    """
    images = as_shown(images)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, min_side // (columns * (width + gap)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    gap = gap * max(1, scale // 4)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 64, dtype=np.uint8)
    for n, image in enumerate(images):
        top, left = gap + (n // columns) * (height + gap), gap + (n % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def png_bytes(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of uint8 ``[H, W, C]``, C 1 or 3."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, format="PNG")
    return out.getvalue()


def save_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 ``[H, W, C]``, C 1 or 3, as a PNG file, atomically."""
    from lit_diffusion.files import atomic_write

    with atomic_write(path) as file:
        file.write(png_bytes(image))
