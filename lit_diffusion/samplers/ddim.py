r"""DDIM, the non-Markovian samplers of a DDPM (Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502).

.. math::  x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v^2}\, \hat\epsilon + v z, \qquad
           v = \eta \sqrt{\tilde\beta}

(eqs. 12 and 16), where a clipped x0 has its own ``eps = (x_t - alpha_t x0) / sigma_t``, as in Nichol and Dhariwal's
code. ``eta = 0`` is deterministic, an Euler step of the probability-flow ODE in sigma / alpha, and can be reversed,
from an image to its noise; ``eta = 1`` is DDPM's posterior, clipped or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, Prediction, clipped
from lit_diffusion.errors import UserError
from lit_diffusion.processes import expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import EndsAtZero, Move, OnStep, Progress, Run, Samples, at_time, with_noise
from lit_diffusion.samplers.times import Spacing


class DDIM(EndsAtZero):
    r"""DDIM on any subsequence of the timesteps (Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502).

    .. math::  x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v^2}\, \hat\epsilon + v z, \qquad
               v = \eta \sqrt{\tilde\beta}

    Args:
        steps: number of steps and network evaluations; null: every timestep of the model, or 1000 in continuous time.
        eta: 0 for the deterministic sampler, 1 for DDPM's posterior, or in between.
        spacing: timesteps to visit: ``uniform`` in time, ``quadratic`` with more of them near the data (the paper's for
            CIFAR-10), ``log_snr`` or ``karras:RHO`` between the ends of the log-SNR, or a list of falling times.
        clip_x0: range to which the predicted clean datum is clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping (the paper).

    Raises:
        UserError: for an eta outside [0, 1], and as :class:`Ancestral`.
    """

    def __init__(
        self,
        steps: int | None = 50,
        eta: float = 0.0,
        spacing: Spacing = "uniform",
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(steps, spacing, clip_x0)
        if not 0.0 <= eta <= 1.0:
            raise UserError(f"DDIM's eta is {eta:g}; it lies between 0 (deterministic) and 1 (DDPM's posterior)")
        self.eta = eta
        self.takes = ("mean", "velocity") if eta == 0.0 else ("mean",)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """Step from ``x_t`` to ``x_s``."""
        prediction, s = run.predict(x, move.t), at_time(x, move.s)
        if self.eta == 0.0:
            return self._moved(prediction, run.denoiser, s, s.new_zeros(()))
        variance = self.eta**2 * run.process.transition(s, prediction.coefficients.t).beta_tilde
        return with_noise(self._moved(prediction, run.denoiser, s, variance), variance.sqrt(), s, run.noise)

    def _views(self, prediction: Prediction, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """The clipped x0, and the eps with ``x_t = alpha_t x0 + sigma_t eps``."""
        x0 = clipped(prediction.x0, self.clip_x0, denoiser)
        # Where nothing was clipped this is the prediction's own eps to the last digit.
        cut = expand_like(prediction.coefficients.alpha / prediction.coefficients.sigma, x0) * (prediction.x0 - x0)
        return x0, prediction.eps + cut

    def _moved(self, prediction: Prediction, denoiser: Denoiser, s: Tensor, variance: Tensor) -> Tensor:
        """``alpha_s x0 + sqrt(sigma_s^2 - variance) eps``."""
        process, x_t = denoiser.process, prediction.x_t
        direction = (process.sigma(s) ** 2 - variance).clamp(min=0.0).sqrt()
        x0, eps = self._views(prediction, denoiser)
        return expand_like(process.alpha(s), x_t) * x0 + expand_like(direction, x_t) * eps

    @torch.no_grad()
    def encode(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition | None = None, on_step: OnStep | None = None
    ) -> Samples:
        """The noise from which the deterministic sampler generates given data: ``[B, ...]`` like x0.

        The trajectory's steps are taken in reverse order, each with the clipped prediction at its start (Song, Meng and
        Ermon 2021, section 4.3); the first step, from clean data, evaluates the network at the smallest timestep.
        ``sample(.., start=noise)`` decodes; the error of the round trip falls with the number of steps.

        Raises:
            UserError: where eta is not 0, and where the denoiser does not fit the sampler.
        """
        if self.eta != 0.0:
            raise UserError(f"encoding needs the deterministic sampler: set eta to 0 (it is {self.eta:g})")
        plan = self.plan(denoiser.process)
        self.require_fit(denoiser, plan)
        noise = SampleNoise(0, torch.arange(len(x0), device=x0.device), tuple(x0.shape[1:]))  # None is drawn.
        run = Run(denoiser, noise, cond, plan[::-1], on_step)
        process, smallest, x = run.process, plan[-1].t, x0
        for done, move in enumerate(run.plan, start=1):
            first = move.s == 0.0
            run.began = smallest if first else move.s
            if first:
                x = expand_like(process.alpha(at_time(x, smallest)), x) * x
            prediction = run.predict(x, run.began)
            if first:
                x = x + expand_like(process.sigma(at_time(x, smallest)), x) * self._views(prediction, denoiser)[1]
            else:
                x = self._moved(prediction, denoiser, at_time(x, move.t), prediction.coefficients.t.new_zeros(()))
            if on_step is not None:
                on_step(Progress(done, len(run.plan), float(move.t), x))
        return Samples(x, run.evaluations, x.new_zeros(len(x)))
