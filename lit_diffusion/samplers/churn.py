r"""EDM's stochastic sampler: Heun's method with noise added on the way (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.samplers.base import Move, Run, at_time, denoised
from lit_diffusion.samplers.ode import Heun, refuse_grid_only
from lit_diffusion.samplers.sde import LargeSteps
from lit_diffusion.samplers.times import Spacing

LARGEST_RISE = math.sqrt(2.0) - 1.0
"""The largest gamma: no more new noise than there is already."""


class ChurnedHeun(Heun):
    r"""EDM's stochastic sampler: before each step of Heun's method, the noise level is raised by fresh noise.

    .. math::
        \hat r &= (1 + \gamma)\, r_t, \qquad \gamma = \min\big(S_{churn} / N, \sqrt2 - 1\big)
                  \text{ where } S_{tmin} \le r_t \le S_{tmax}, \text{ else } 0 \\
        x_{\hat t} &= \frac{\alpha_{\hat t}}{\alpha_t} x_t
                      + \alpha_{\hat t}\, S_{noise} \sqrt{\hat r^2 - r_t^2}\; z, \qquad r = \sigma / \alpha

    (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2; there alpha is 1.) N is the number of noise
    levels visited, one more than there are steps: the paper's, whose last step is the posterior mean. Where no noise is
    added this is :class:`Heun`. No level is raised above the largest of the process, of which the network knows none.

    Args:
        steps: number of steps of two evaluations each, the paper's 255 for ImageNet-64; null: every level of the model,
            or 1000 in continuous time.
        s_churn: how much noise is added in all, as a sum of ``gamma``; 0 for none.
        s_tmin: the smallest noise level ``sigma / alpha`` at which noise is added.
        s_tmax: the largest noise level at which noise is added.
        s_noise: standard deviation of the noise that is added; a little more than 1 makes up for a network that takes
            off too much. The defaults of these four are the paper's for ImageNet-64, too (table 5).
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`~lit_diffusion.samplers.sde.EndsAtTMin`.
        spacing: the steps' times: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of times.

    Raises:
        UserError: for settings out of their range.
    """

    def __init__(
        self,
        steps: int | None = 255,
        s_churn: float = 40.0,
        s_tmin: float = 0.05,
        s_tmax: float = 50.0,
        s_noise: float = 1.003,
        denoise: bool = True,
        clip_x0: ClipX0 = "data",
        large_steps: LargeSteps = "refuse",
        spacing: Spacing = "karras:7",
    ) -> None:
        super().__init__(steps, denoise, clip_x0, large_steps, spacing)
        if not 0.0 <= s_churn < math.inf:
            raise UserError(
                f"s_churn is {s_churn:g}; it must not be negative: 0 adds no noise, the paper's is 30 or 40"
            )
        if not 0.0 <= s_tmin <= s_tmax:
            raise UserError(f"s_tmin {s_tmin:g} and s_tmax {s_tmax:g}: noise is added from the first to the second")
        if not 0.0 <= s_noise < math.inf:
            raise UserError(f"s_noise is {s_noise:g}; it must not be negative: 1, or a little more as in the paper")
        self.s_churn = s_churn
        self.takes = ("mean", "velocity") if s_churn == 0.0 else ("mean",)
        self.s_tmin = s_tmin
        self.s_tmax = s_tmax
        self.s_noise = s_noise

    def raised(self, process: Process, t: Tensor, steps: int) -> Tensor:
        """The times to which ``t`` ``[B]`` are raised before a step of so many: float64 ``[B]``."""
        log_snr = process.log_snr(t)
        ratio, gamma = torch.exp(-0.5 * log_snr), min(self.s_churn / (steps + 1), LARGEST_RISE)
        higher = process.t_at_log_snr(log_snr - 2.0 * math.log1p(gamma)).clamp(max=process.t_max)
        churned = (ratio >= self.s_tmin) & (ratio <= self.s_tmax) & (higher > t)
        return torch.where(churned, higher, t)

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """Those of Heun's steps from the raised times."""
        return super().sizes(process, self.raised(process, t, len(t)), s)

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse what Heun's method refuses, and a network that knows no time between its levels."""
        if self.s_churn > 0.0:
            refuse_grid_only(denoiser, "adding noise on the way")
        super().require_fit(denoiser, plan)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """From t up to the raised time, and from there to s."""
        x, t = self._churned(run, x, move.t)
        return super().step(run, x, Move(t, move.s))

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean at the raised smallest time, when ``denoise``."""
        return denoised(run, *self._churned(run, x, run.plan[-1].s), self.clip_x0) if self.denoise else x

    def _churned(self, run: Run, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """A state at t with noise added, and its time ``[B]``."""
        t = at_time(x, t)
        if self.s_churn == 0.0:
            return x, t
        higher = self.raised(run.process, t, self.steps or len(self.plan(run.process)))
        step = run.process.transition(t, higher)
        # Where no signal is left, at which no level is raised, the step has no scale.
        scale, added = torch.where(higher > t, step.scale, 1.0), torch.where(higher > t, step.beta.sqrt(), 0.0)
        return expand_like(scale, x) * x + expand_like(self.s_noise * added, x) * run.noise.normal(), higher
