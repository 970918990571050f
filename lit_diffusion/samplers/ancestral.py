r"""Ancestral sampling: draw each state from the learned reverse chain.

.. math::  x_s = c_0\, \hat x_0(x_t) + c_t x_t + \sqrt{v}\, z

(Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2; for variance-exploding processes Song et al. 2021,
https://arxiv.org/abs/2011.13456, eq. 47.) On a subsequence of the timesteps the coefficients are those of the longer
steps (Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 4).
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

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2.) ``c_0``, ``c_t``, ``beta`` and ``beta_tilde`` are
    those of :class:`~lit_diffusion.processes.Transition`.

    Args:
        steps: number of steps and network evaluations; null: every timestep of the model, or 1000 in continuous time.
        variance: variance v of each step: ``beta``, the forward step's; ``beta_tilde``, its posterior's; ``learned``,
            the model's; null: the papers' choice, ``learned`` if the model has one, else ``beta_tilde`` where the
            variance explodes and ``beta`` elsewhere.
        spacing: timesteps to visit: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr`` or
            ``karras:RHO`` between the ends of the log-SNR, or a list of falling times.
        clip_x0: range to which the predicted clean datum is clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.

    Raises:
        UserError: for a name that is not one of these, a spacing that does not match ``steps``, or an empty range.
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
        """Refuse a learned variance for a model that has none."""
        self.chain.check(denoiser)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """Draw from ``p(x_s | x_t)``, or take its mean where s is 0."""
        prediction, s = run.predict(x, move.t), at_time(x, move.s)
        step = run.process.transition(s, prediction.coefficients.t)
        log_variance = self.chain.log_variance(prediction, run.denoiser, step, s)
        return with_noise(self.chain.mean(prediction, run.denoiser, step), torch.exp(0.5 * log_variance), s, run.noise)
