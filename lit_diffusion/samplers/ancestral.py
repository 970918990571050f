r"""Ancestral sampling: draw each state from the learned reverse chain.

.. math::  x_s = c_0\, \hat x_0(x_t) + c_t x_t + \sqrt{v}\, z

(Ho et al. 2020, algorithm 2; for variance-exploding processes Song et al. 2021, eq. 47.) On a subsequence of the levels
the coefficients are those of the longer steps (Nichol and Dhariwal 2021, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.reverse import ReverseChain, ReverseVariance
from lit_diffusion.samplers.base import Move, Spacing, ToTheData, at_time


class Ancestral(ToTheData):
    """Ancestral sampling of DDPM and of its counterpart for variance-exploding processes; the last step adds no noise.

    Args:
        steps: number of steps and network evaluations; null: every level of the model, or 1000 in continuous time.
        variance: of each step: ``beta``, that of the forward step; ``beta_tilde``, that of its posterior; ``learned``;
            null: the papers' own, ``learned`` of a model that has learned one, else ``beta_tilde`` where the variance
            explodes and ``beta`` elsewhere.
        spacing: which levels a subsequence visits: ``uniform``, or ``quadratic`` with more of them near the data.
        clip_x0: keep the predicted clean image in a range: ``data``, that of the data (points have none), or ``[low,
            high]``; null: leave it.
    """

    def __init__(
        self,
        steps: int | None = None,
        variance: ReverseVariance | None = None,
        spacing: Spacing = "uniform",
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(steps, spacing, clip_x0)
        self.variance = variance
        self.chain = ReverseChain(variance, clip_x0)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a learned variance where none was learned, too."""
        super().check(denoiser)
        self.chain.check(denoiser)

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Draw from ``p(x_s | x_t)``; where s is 0 its mean."""
        prediction = denoiser(x, at_time(x, move.t), cond)
        s = at_time(x, move.s)
        step = denoiser.process.transition(s, prediction.level.t)
        x = self.chain.mean(prediction, denoiser, step)
        if move.s == 0.0:
            return x
        log_variance = self.chain.log_variance(prediction, denoiser, step, s)
        return x + torch.exp(0.5 * log_variance).to(x.dtype) * noise.normal()
