"""Clipping of the predicted clean datum to a range."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_diffusion.denoisers.base import Denoiser
from lit_diffusion.errors import UserError, require_choice

ClipX0 = Literal["data"] | tuple[float, float] | None
"""The range to which a predicted clean datum is clipped: the data's own, a given one, or none."""


def require_clip(clip: ClipX0) -> None:
    """Refuse an invalid range.

    Raises:
        UserError: for a word other than ``data`` and for an empty range.
    """
    if isinstance(clip, str):
        require_choice("", "clip_x0", clip, ("data",))
    elif clip is not None and not clip[0] < clip[1]:
        raise UserError(f"clip_x0 is [{clip[0]:g}, {clip[1]:g}]; the first must be below the second, or null for none")


def clip_range(clip: ClipX0, denoiser: Denoiser) -> tuple[float, float] | None:
    """The range as numbers, the data's own read from the denoiser; None for none."""
    return denoiser.data_range if clip == "data" else clip


def clipped(x0: Tensor, clip: ClipX0, denoiser: Denoiser) -> Tensor:
    """A predicted clean datum ``[B, ...]`` clipped to the range."""
    found = clip_range(clip, denoiser)
    return x0 if found is None else x0.clamp(*found)


def describe_clip(clip: ClipX0, denoiser: Denoiser) -> str:
    """The range as text: ``data [-1, 1]``, ``[-1, 1]``, ``null``; ``data`` alone where the data have no range."""
    found = clip_range(clip, denoiser)
    text = "" if found is None else f"[{found[0]:g}, {found[1]:g}]"
    return f"data {text}".rstrip() if clip == "data" else text or "null"
