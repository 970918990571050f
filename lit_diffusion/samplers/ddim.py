r"""DDIM: the non-Markovian family whose members share DDPM's training (Song, Meng and Ermon 2021).

.. math::  x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v^2}\, \hat\epsilon + v z, \qquad
           v = \eta \sqrt{\tilde\beta}

(eqs. 12 and 16), where a clipped x0 brings its own ``eps = (x_t - alpha_t x0) / sigma_t``, as in Nichol and
Dhariwal's code. ``eta = 0`` is deterministic, an Euler step of the probability-flow ODE in sigma / alpha, and can be
made backwards, from an image to its noise; ``eta = 1`` is DDPM's posterior, clipped or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, Prediction, clipped
from lit_diffusion.errors import UserError
from lit_diffusion.processes import expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import CountedDenoiser, Move, OnStep, Progress, Spacing, ToTheData, at_time


class DDIM(ToTheData):
    """DDIM on any subsequence of the levels.

    Args:
        steps: number of steps and network evaluations; null: every level of the model, or 1000 in continuous time.
        eta: 0 for the deterministic walk, 1 for DDPM's posterior, or in between.
        spacing: which levels a subsequence visits: ``uniform``, or ``quadratic`` with more of them near the data (the
            paper's for CIFAR-10).
        clip_x0: keep the predicted clean image in a range: ``data``, that of the data (points have none), or ``[low,
            high]``; null: leave it, as the paper does.
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

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """To ``x_s``."""
        process = denoiser.process
        prediction = denoiser(x, at_time(x, move.t), cond)
        s = at_time(x, move.s)
        if self.eta == 0.0 or move.s == 0.0:
            return self._moved(prediction, denoiser, s, s.new_zeros(()))
        variance = self.eta**2 * process.transition(s, prediction.level.t).beta_tilde
        return self._moved(prediction, denoiser, s, variance) + expand_like(variance.sqrt(), x) * noise.normal()

    def _views(self, prediction: Prediction, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x0 in its range, and the eps with ``x_t = alpha_t x0 + sigma_t eps``."""
        x0 = clipped(prediction.x0, self.clip_x0, denoiser)
        # Where nothing was clipped this is the prediction's own eps to the last digit.
        cut = expand_like(prediction.level.alpha / prediction.level.sigma, x0) * (prediction.x0 - x0)
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
    ) -> Tensor:
        """The noise from which the deterministic walk makes these images: ``[B, ...]`` like x0.

        The walk's steps in reverse order, each with the prediction at its own start, clipped as on the way there (Song,
        Meng and Ermon 2021, section 4.3); the first step, from a clean image, asks the network at the smallest level.
        ``sample(.., start=noise)`` is the way back; the error of the round trip falls with the number of steps.

        Raises:
            UserError: where eta is not 0, and where the sampler does not fit the denoiser.
        """
        if self.eta != 0.0:
            raise UserError(f"encoding needs the deterministic walk: set eta to 0 (it is {self.eta:g})")
        self.check(denoiser)
        counted = CountedDenoiser(denoiser)
        process = denoiser.process
        moves = self.plan(process)[::-1]
        smallest = moves[0].t
        x = x0
        for done, move in enumerate(moves, start=1):
            if move.s == 0.0:
                x = expand_like(process.alpha(at_time(x, smallest)), x) * x
            prediction = counted(x, at_time(x, max(move.s, smallest)), cond)
            if move.s == 0.0:
                x = x + expand_like(process.sigma(at_time(x, smallest)), x) * self._views(prediction, denoiser)[1]
            else:
                x = self._moved(prediction, denoiser, at_time(x, move.t), prediction.level.t.new_zeros(()))
            if on_step is not None:
                on_step(Progress(done, len(moves), move.t, x))
        self.evaluations = counted.evaluations
        return x
