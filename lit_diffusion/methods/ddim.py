r"""Denoising diffusion implicit models (DDIM): DDPM's training with a deterministic sampler.

.. math::  x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon

(Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502.) All non-Markovian processes with DDPM's marginals have
DDPM's loss up to weights (theorem 1), so a network trained as DDPM samples with any of them: see
:class:`lit_diffusion.samplers.DDIM`.
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.methods.ddpm import DDPM
from lit_diffusion.samplers import DDIM as DDIMSampler
from lit_diffusion.samplers import Sampler


class DDIM(DDPM):
    r"""DDIM: DDPM's training, sampled by the deterministic DDIM sampler in few steps.

    .. math::  x_s = \alpha_s \hat x_0 + \sigma_s \hat\epsilon

    (Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502, eq. 12 with eta = 0.)

    Args:
        backbone: the network.
        sampler: default sampler; null: deterministic DDIM in 50 steps.
        **ddpm: arguments of :class:`~lit_diffusion.methods.DDPM`.
    """

    def __init__(self, backbone: Backbone, sampler: Sampler | None = None, **ddpm: Any) -> None:
        super().__init__(backbone, sampler=sampler or DDIMSampler(), **ddpm)
