r"""The reverse-time SDE, discretised, and predictor-corrector sampling (Song et al. 2021).

.. math::  dx = \big(f(t)\, x - g(t)^2 s(x, t)\big)\, dt + g(t)\, d\bar w

(eq. 6, after Anderson 1982), walked from t = 1 to the process's smallest sampling time; what noise is left there one
last evaluation takes off by Tweedie's formula (``denoise``), as Jolicoeur-Martineau et al. 2021 advise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from lit_diffusion.backbones.base import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, require_clip
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import Move, Predictor, at_time, denoised, to_the_smallest_time
from lit_diffusion.samplers.langevin import langevin_update


class ToTheSmallestTime(Predictor):
    """What the walkers of the reverse SDE and of the probability-flow ODE share: equal steps in time, and the end.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def __init__(self, steps: int | None = None, denoise: bool = True, clip_x0: ClipX0 = "data") -> None:
        super().__init__(steps)
        require_clip(clip_x0)
        self.denoise = denoise
        self.clip_x0 = clip_x0

    def plan(self, process: Process) -> list[Move]:
        """Equal steps from 1 to the smallest time of sampling."""
        times = to_the_smallest_time(process, self.steps)
        return [Move(t, s) for t, s in pairwise(times)]

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """The posterior mean, when ``denoise``."""
        if not self.denoise:
            return x
        return denoised(denoiser, x, self.plan(denoiser.process)[-1].s, cond, self.clip_x0)

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""


class EulerMaruyama(ToTheSmallestTime):
    r"""Euler and Maruyama's discretisation of the reverse SDE, of weak order 1.

    .. math::  x_s = x_t - (t - s) \big(f(t)\, x_t - g(t)^2 s(x_t, t)\big) + g(t) \sqrt{t - s}\, z

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""
        process, t, length = denoiser.process, at_time(x, move.t), move.t - move.s
        f, g = process.drift(t), process.diffusion(t)
        score = denoiser(x, t, cond).score
        x = expand_like(1.0 - length * f, x) * x + expand_like(length * g**2, x) * score
        return x + expand_like(math.sqrt(length) * g, x) * noise.normal()


class ReverseDiffusion(ToTheSmallestTime):
    r"""Reverse diffusion: the reverse step has the forward step's own discretisation (Song et al. 2021, eq. 46).

    .. math::  x_s = (2 - a)\, x_t + \beta\, s(x_t, t) + \sqrt{\beta}\, z

    with the forward step ``x_t = a x_s + sqrt(beta) z`` of the process, exact for any length.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""
        t = at_time(x, move.t)
        step = denoiser.process.transition(at_time(x, move.s), t)
        x = expand_like(2.0 - step.scale, x) * x + expand_like(step.beta, x) * denoiser(x, t, cond).score
        return x + expand_like(step.beta.sqrt(), x) * noise.normal()


class PredictorCorrector(Predictor):
    r"""A predictor's step to the next level, then Langevin steps at that level (Song et al. 2021, algorithms 2 and 3).

    .. math::  x \leftarrow x + \epsilon\, s + \sqrt{2 \epsilon}\, z, \qquad
               \epsilon = 2 a^2 \Big(r \frac{|z|}{|s|}\Big)^2

    (algorithms 4 and 5) with the signal-to-noise ratio r and ``a = alpha_t / alpha_s`` of the predictor's step: 1 where
    the variance explodes, the root of DDPM's ``alpha_i`` where it is preserved. The norms are each sample's own, not
    the batch's mean, so that a sample does not depend on its company; where a score happens to be nearly 0, as it may
    in few dimensions, the step stays at ``epsilon = sigma^2``, below which the chain cannot overshoot. A step that
    depends on the state widens the stationary law by a share of order 1/D.

    Args:
        predictor: any sampler that moves from level to level: reverse diffusion, ancestral, Euler-Maruyama, DDIM, ...;
            it brings the number of steps and says how the walk ends; null: reverse diffusion.
        snr: r; the paper's is 0.16 on CIFAR-10 and between 0.075 and 0.17 elsewhere.
        corrector_steps: Langevin steps a level, one network evaluation each.
    """

    def __init__(self, predictor: Predictor | None = None, snr: float = 0.16, corrector_steps: int = 1) -> None:
        self.predictor = ReverseDiffusion() if predictor is None else predictor
        super().__init__(self.predictor.steps)
        if isinstance(predictor, PredictorCorrector):
            raise UserError("predictor: a predictor-corrector cannot be a predictor; give the one inside it")
        if not snr > 0.0:
            raise UserError(f"snr is {snr:g}; the corrector's signal-to-noise ratio must be positive, e.g. 0.16")
        if corrector_steps < 1:
            raise UserError(f"corrector_steps is {corrector_steps}; give at least 1, or the predictor alone")
        self.snr = snr
        self.corrector_steps = corrector_steps

    def check(self, denoiser: Denoiser) -> None:
        """As its predictor."""
        self.predictor.check(denoiser)

    def plan(self, process: Process) -> list[Move]:
        """The predictor's."""
        return self.predictor.plan(process)

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Predict, then correct; at s = 0 there is no noise level left to correct at."""
        x = self.predictor.step(denoiser, x, move, noise, cond)
        if move.s == 0.0:
            return x
        s = at_time(x, move.s)
        ratio = denoiser.process.transition(s, at_time(x, move.t)).scale ** 2
        largest = 2.0 * denoiser.process.sigma(s) ** 2
        for _ in range(self.corrector_steps):
            score, z = denoiser(x, s, cond).score, noise.normal()
            eta = 4.0 * ratio * (self.snr * _norms(z) / _norms(score)) ** 2
            x = langevin_update(x, score, torch.minimum(eta, largest), z)
        return x

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """The predictor's end."""
        return self.predictor.finish(denoiser, x, cond)


def _norms(x: Tensor) -> Tensor:
    """Of each row: float64 ``[B]``."""
    return x.flatten(1).to(torch.float64).norm(dim=1)
