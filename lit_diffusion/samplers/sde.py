r"""The reverse-time SDE, discretised, and predictor-corrector sampling (Song et al. 2021).

.. math::  dx = \big(f(t)\, x - g(t)^2 s(x, t)\big)\, dt + g(t)\, d\bar w

(eq. 6, after Anderson 1982), walked from t = 1 to the process's smallest sampling time; what noise is left there one
last evaluation takes off by Tweedie's formula (``denoise``), as Jolicoeur-Martineau et al. 2021 advise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, require_clip
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import Move, Predictor, at_time, denoised, to_the_smallest_time
from lit_diffusion.samplers.langevin import langevin_update

LargeSteps = Literal["refuse", "allow"]


class ToTheSmallestTime(Predictor):
    r"""What the walkers of the reverse SDE and of the probability-flow ODE share: equal steps in time, and the end.

    A step multiplies the network's output by ``g(t)^2 (t - s)``, and the sampler is refused unless, for every step,

    .. math::  \frac{g(t)^2 (t - s)}{\sigma_t^2 + \alpha_t^2 d^2} \le 1, \qquad d = \min(1, \sigma_1),

    d being the widest that data can be which the prior N(0, sigma_1^2 I) covers. On data of variance ``c <= d^2`` a
    step of the reverse SDE multiplies a deviation of the state by
    ``1 - f (t - s) - g^2 (t - s) / (sigma^2 + alpha^2 c)``. Where the variance explodes, deviations change their sign
    and grow from step to step once the last term exceeds 2; where it is preserved, the state is thrown to the other
    side of the data and the network's error comes on top, multiplied by ``g^2 (t - s) / sigma``, to where no network
    was trained. DDIM and ancestral sampling use the process's exact transitions, which are bounded for any step.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` steps above this bound, or ``allow`` them, as the literature's tables of few steps do.
    """

    measure = "g^2 dt over the variance of the noised data"
    """:meth:`sizes` in words."""

    def __init__(
        self,
        steps: int | None = None,
        denoise: bool = True,
        clip_x0: ClipX0 = "data",
        large_steps: LargeSteps = "refuse",
    ) -> None:
        super().__init__(steps)
        require_choice("", "large_steps", large_steps, get_args(LargeSteps))
        require_clip(clip_x0)
        self.denoise = denoise
        self.clip_x0 = clip_x0
        self.large_steps = large_steps

    def plan(self, process: Process) -> list[Move]:
        """Equal steps from 1 to the smallest time of sampling."""
        times = to_the_smallest_time(process, self.steps)
        return [Move(t, s) for t, s in pairwise(times)]

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """Of steps from times ``[N]`` to times ``[N]``: the left side of the bound, ``[N]``."""
        return process.diffusion(t) ** 2 * (t - s) / _variance(process, t)

    def largest_step(self, process: Process, steps: int | None) -> tuple[float, float]:
        """The largest size of so many equal steps, and the time at which that step begins."""
        times = torch.tensor(to_the_smallest_time(process, steps), dtype=torch.float64)
        sizes = self.sizes(process, times[:-1], times[1:])
        worst = int(sizes.argmax())
        return float(sizes[worst]), float(times[worst])

    def enough_steps(self, process: Process, steps: int) -> int | None:
        """The fewest steps, found by halving, that keep the bound where so many do not; None where no number does."""
        most = 10**6 if process.levels is None else process.levels - 1
        too_few, enough = steps, min(2 * steps, most)
        while self.largest_step(process, enough)[0] > 1.0:
            if enough == most:
                return None
            too_few, enough = enough, min(2 * enough, most)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self.largest_step(process, middle)[0] > 1.0:
                too_few = middle
            else:
                enough = middle
        return enough

    def check(self, denoiser: Denoiser) -> None:
        """Refuse steps above the bound, too, unless they are allowed."""
        super().check(denoiser)
        process = denoiser.process
        size, t = self.largest_step(process, self.steps)
        if self.large_steps == "allow" or size <= 1.0:
            return
        count = len(self.plan(process))
        enough = self.enough_steps(process, count)
        advice = "no number of steps on its levels would do:" if enough is None else f"set steps to {enough}, or"
        raise UserError(
            f"{type(self).__name__} in {count} step{'s' * (count > 1)} on this model: {self.measure} is up to "
            f"{size:.3g}, at t = {t:.3g}, and above 1 samples end far from the data; {advice} choose ddim, ancestral "
            f"or ode, or allow such steps by large_steps: allow"
        )

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """The posterior mean, when ``denoise``."""
        if not self.denoise:
            return x
        return denoised(denoiser, x, self.plan(denoiser.process)[-1].s, cond, self.clip_x0)

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""


def _variance(process: Process, t: Tensor) -> Tensor:
    """``sigma^2 + alpha^2 d^2``: the widest that data noised to t ``[N]`` can be."""
    return process.sigma(t) ** 2 + (min(1.0, process.prior_std) * process.alpha(t)) ** 2


class EulerMaruyama(ToTheSmallestTime):
    r"""Euler and Maruyama's discretisation of the reverse SDE, of weak order 1.

    .. math::  x_s = x_t - (t - s) \big(f(t)\, x_t - g(t)^2 s(x_t, t)\big) + g(t) \sqrt{t - s}\, z

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`ToTheSmallestTime`.
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

    with the forward step ``x_t = a x_s + sqrt(beta) z`` of the process, exact for any length: ``2 - a`` is at most 2
    and beta at most ``sigma_t^2``, so that no error grows. But the state at s has the whole of beta as its noise: where
    the variance explodes, few steps end in noise that is far wider than the level it is taken for. Steps whose noise is
    more than twice as wide as the data noised to their end are refused.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` such steps, or ``allow`` them.
    """

    measure = "the variance of a step's noise over 4 times that of the data noised to its end"

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """``beta / (4 (sigma_s^2 + alpha_s^2 d^2))``: ``[N]``."""
        return process.transition(s, t).beta / (4.0 * _variance(process, s))

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""
        t = at_time(x, move.t)
        step = denoiser.process.transition(at_time(x, move.s), t)
        x = expand_like(2.0 - step.scale, x) * x + expand_like(step.beta, x) * denoiser(x, t, cond).score
        return x + expand_like(step.beta.sqrt(), x) * noise.normal()


class PredictorCorrector(Predictor):
    r"""A predictor's step to the next level, then Langevin steps at that level (Song et al. 2021, algorithms 2 and 3).

    .. math::  x \leftarrow x + \epsilon\, s + \sqrt{2 \epsilon}\, z, \qquad
               \epsilon = 2 a^2 \Big(r \frac{\|z\|}{\|s\|}\Big)^2 = 2 a^2 (r \sigma_s)^2

    with the signal-to-noise ratio r and ``a = alpha_t / alpha_s`` of the predictor's step: 1 where the variance
    explodes, the root of DDPM's ``alpha_i`` where it is preserved. The first form is the paper's (algorithms 4 and 5),
    whose code takes the norms as means over the batch: then one sample depends on the others. Norms of each sample's
    own make the step depend on the state and on the noise that it multiplies, which in few dimensions widens the law
    several times over. Here they are the expected ones at the level, ``E |z|^2 = D`` and ``E |s|^2 = D / sigma^2`` (of
    the noise's own score ``-eps / sigma``), so the step is one number a level.

    Where the noised data have variance V, the correction's own stationary variance is
    ``V / (1 - a^2 r^2 sigma^2 / V)``, at most ``V / (1 - r^2)``: 2.6 % too much at r = 0.16.

    Args:
        predictor: any sampler that moves from level to level: reverse diffusion, ancestral, Euler-Maruyama, DDIM, ...;
            it brings the number of steps and says how the walk ends; null: reverse diffusion.
        snr: r, below 1, where the correction would diverge; the paper's is 0.16 on CIFAR-10 and between 0.075 and 0.17
            elsewhere.
        corrector_steps: Langevin steps a level, one network evaluation each.
    """

    def __init__(self, predictor: Predictor | None = None, snr: float = 0.16, corrector_steps: int = 1) -> None:
        self.predictor = ReverseDiffusion() if predictor is None else predictor
        super().__init__(self.predictor.steps)
        if isinstance(predictor, PredictorCorrector):
            raise UserError("predictor: a predictor-corrector cannot be a predictor; give the one inside it")
        if not 0.0 < snr < 1.0:
            raise UserError(
                f"snr is {snr:g}; the corrector's signal-to-noise ratio must be positive, and below 1, from where on "
                f"it diverges, e.g. 0.16"
            )
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
        kept = denoiser.process.transition(s, at_time(x, move.t)).scale
        epsilon = 2.0 * (kept * self.snr * denoiser.process.sigma(s)) ** 2
        for _ in range(self.corrector_steps):
            x = langevin_update(x, denoiser(x, s, cond).score, 2.0 * epsilon, noise.normal())
        return x

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """The predictor's end."""
        return self.predictor.finish(denoiser, x, cond)
