r"""Ancestral sampling: draw each state from the learned reverse chain.

.. math::  x_s = c_0\, \hat x_0(x_t) + c_t x_t + \sqrt{v}\, z

(Ho et al. 2020, algorithm 2; for variance-exploding processes Song et al. 2021, eq. 47.) On a subsequence of the levels
the coefficients are those of the longer steps (Nichol and Dhariwal 2021, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser
from lit_diffusion.reverse import ReverseChain, ReverseVariance
from lit_diffusion.samplers.base import EndsAtZero, Move, Run, at_time, with_noise
from lit_diffusion.samplers.times import Spacing


class Ancestral(EndsAtZero):
    r"""Ancestral sampling of DDPM and of its counterpart for variance-exploding processes; the last step adds no noise.

    .. math::  x_s = c_0\, \hat x_0(x_t) + c_t x_t + \sqrt{v}\, z

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2.)

    Args:
        steps: number of steps and network evaluations; null: every level of the model, or 1000 in continuous time.
        variance: of each step: ``beta``, that of the forward step; ``beta_tilde``, that of its posterior; ``learned``;
            null: the papers' own, ``learned`` of a model that has learned one, else ``beta_tilde`` where the variance
            explodes and ``beta`` elsewhere.
        spacing: which levels it visits: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr``
            or ``karras:RHO`` between the ends of the log-SNR, or the times themselves, falling.
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

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a learned variance where none was learned."""
        self.chain.check(denoiser)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """A draw from ``p(x_s | x_t)``; where s is 0 its mean."""
        prediction, s = run.predict(x, move.t), at_time(x, move.s)
        step = run.process.transition(s, prediction.coefficients.t)
        log_variance = self.chain.log_variance(prediction, run.denoiser, step, s)
        return with_noise(self.chain.mean(prediction, run.denoiser, step), torch.exp(0.5 * log_variance), s, run.noise)
