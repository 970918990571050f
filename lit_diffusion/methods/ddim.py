"""Denoising diffusion implicit models (Song, Meng and Ermon 2021): DDPM's training, another walk back.

The losses of the whole family of non-Markovian processes with DDPM's marginals are DDPM's own up to weights (theorem
1), so a network trained as DDPM samples under any member: see :class:`lit_diffusion.samplers.DDIM`.
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.methods.ddpm import DDPM
from lit_diffusion.samplers import DDIM as DDIMSampler
from lit_diffusion.samplers import Sampler


class DDIM(DDPM):
    """DDIM: DDPM's training, sampled by the deterministic walk in a few steps.

    Args:
        backbone: the network.
        sampler: default sampler, null for the deterministic walk in 50 steps.
        **ddpm: as of :class:`~lit_diffusion.methods.DDPM`.
    """

    def __init__(self, backbone: Backbone, sampler: Sampler | None = None, **ddpm: Any) -> None:
        super().__init__(backbone, sampler=sampler or DDIMSampler(), **ddpm)
