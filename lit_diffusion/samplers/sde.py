r"""The reverse-time SDE, discretised, and predictor-corrector sampling (Song et al. 2021).

.. math::  dx = \big(f(t)\, x - g(t)^2 s(x, t)\big)\, dt + g(t)\, d\bar w

(eq. 6, after Anderson 1982), integrated from the end of time to the process's smallest sampling time; what noise is
left there one last evaluation takes off by Tweedie's formula (``denoise``), as Jolicoeur-Martineau et al. 2021 advise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser, Prediction, require_clip
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.samplers.base import Move, Predictor, Run, at_time, denoised
from lit_diffusion.samplers.langevin import langevin_update
from lit_diffusion.samplers.times import Spacing, require_spacing, timesteps_to_t_min

LargeSteps = Literal["refuse", "allow"]


class EndsAtTMin(Predictor):
    r"""The base of solvers of the reverse SDE and of the probability-flow ODE: their times, their end, their bound.

    A step multiplies the network's output by ``g(t)^2 (t - s)``, and the sampler is refused unless, for every step,

    .. math::  \frac{g(t)^2 (t - s)}{\sigma_t^2 + \alpha_t^2 d^2} \le 1, \qquad d = \min(1, \sigma_1),

    d being the widest that data can be which the prior N(0, sigma_1^2 I) covers. On data of variance ``c <= d^2`` a
    step of the reverse SDE multiplies a deviation of the state by
    ``1 - f (t - s) - g^2 (t - s) / (sigma^2 + alpha^2 c)``. Where the variance explodes, deviations change their sign
    and grow from step to step once the last term exceeds 2; where it is preserved, the state is thrown to the other
    side of the data and the network's error comes on top, multiplied by ``g^2 (t - s) / sigma``, to where no network
    was trained. DDIM and ancestral sampling use the process's exact transitions, which are bounded for any step. A step
    out of pure noise (alpha = 0) is not measured: it is taken to first order, see :func:`out_of_pure_noise`.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` steps above this bound, or ``allow`` them, as the literature's tables of few steps do.
        spacing: of the steps: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr`` or
            ``karras:RHO`` (Karras et al. 2022) in the noise level, or the times themselves, falling, both ends
            included.
    """

    measure = "g^2 dt over the variance of the noised data"
    """:meth:`sizes` in words."""

    def __init__(
        self,
        steps: int | None = None,
        denoise: bool = True,
        clip_x0: ClipX0 = "data",
        large_steps: LargeSteps = "refuse",
        spacing: Spacing = "uniform",
    ) -> None:
        super().__init__(steps)
        require_spacing(spacing, steps, intervals=True)
        require_choice("", "large_steps", large_steps, get_args(LargeSteps))
        require_clip(clip_x0)
        self.denoise = denoise
        self.clip_x0 = clip_x0
        self.large_steps = large_steps
        self.spacing = spacing

    def plan(self, process: Process) -> list[Move]:
        """Moves from the end of time to the smallest time of sampling."""
        return [Move(t, s) for t, s in pairwise(timesteps_to_t_min(process, self.steps, self.spacing))]

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """Of steps from times ``[N]`` to times ``[N]``: the left side of the bound, ``[N]``."""
        return process.diffusion(t) ** 2 * (t - s) / _variance(process, t)

    def largest_step(self, process: Process, times: Sequence[float]) -> tuple[float, float]:
        """The largest size of the steps between falling times, and the time at which that step begins."""
        points = torch.tensor(times, dtype=torch.float64)
        t, s = points[:-1], points[1:]
        sizes = torch.where(process.alpha(t) == 0.0, 0.0, self.sizes(process, t, s))
        worst = int(sizes.argmax())
        return float(sizes[worst]), float(t[worst])

    def enough_steps(self, process: Process, steps: int) -> int | None:
        """The fewest steps, found by halving, that keep the bound where so many do not; None where no number does."""

        def too_large(count: int) -> bool:
            return not self.largest_step(process, timesteps_to_t_min(process, count, self.spacing))[0] <= 1.0

        most = 10**6 if process.num_timesteps is None else process.num_timesteps - 1
        too_few, enough = steps, min(2 * steps, most)
        while too_large(enough):
            if enough == most:
                return None
            too_few, enough = enough, min(2 * enough, most)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if too_large(middle):
                too_few = middle
            else:
                enough = middle
        return enough

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse steps above the bound, unless they are allowed."""
        process, count = denoiser.process, len(plan)
        size, t = self.largest_step(process, [float(plan[0].t), *(float(move.s) for move in plan)])
        if self.large_steps == "allow" or size <= 1.0:
            return
        listed = not isinstance(self.spacing, str)
        enough = None if listed else self.enough_steps(process, count)
        advice = f"set steps to {enough}, or"
        if enough is None:
            advice = "list times that lie closer," if listed else "no number of steps on its levels would do:"
        raise UserError(
            f"{type(self).__name__} in {count} step{'s' * (count > 1)} on this model: {self.measure} is up to "
            f"{size:.3g}, at t = {t:.3g}, and above 1 samples end far from the data; {advice} choose ddim, ancestral "
            f"or ode, or allow such steps by large_steps: allow"
        )

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean, when ``denoise``."""
        return denoised(run, x, run.plan[-1].s, self.clip_x0) if self.denoise else x


def out_of_pure_noise(x_s: Tensor, prediction: Prediction, process: Process, s: Tensor) -> Tensor:
    r"""States at times s ``[B]``: those given, and where there was nothing but noise before the step (alpha = 0)

    .. math::  x_s = \alpha_s\, \hat x_0 + \frac{\sigma_s}{\sigma_t}\, x_t,

    the step to first order, since f and g of the SDE are infinite there.
    """
    coefficients, x_t = prediction.coefficients, prediction.x_t
    limit = process.first_order_step(x_t, prediction.x0, coefficients.t, s)
    return torch.where((coefficients.alpha == 0.0).view(-1, *[1] * (x_t.ndim - 1)), limit, x_s)


def _variance(process: Process, t: Tensor) -> Tensor:
    """``sigma^2 + alpha^2 d^2``: the widest that data noised to t ``[N]`` can be."""
    widest = min(1.0, float(torch.as_tensor(process.prior_std).max()))
    return process.sigma(t) ** 2 + (widest * process.alpha(t)) ** 2


class EulerMaruyama(EndsAtTMin):
    r"""Euler and Maruyama's discretisation of the reverse SDE, of weak order 1.

    .. math::  x_s = x_t - (t - s) \big(f(t)\, x_t - g(t)^2 s(x_t, t)\big) + g(t) \sqrt{t - s}\, z

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`EndsAtTMin`.
        spacing: of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of times.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """From t to s."""
        process, t, s = run.process, at_time(x, move.t), at_time(x, move.s)
        f, g, length = process.drift(t), process.diffusion(t), t - s
        prediction = run.predict(x, t)
        mean = expand_like(1.0 - length * f, x) * x + expand_like(length * g**2, x) * prediction.score
        x_s = mean + expand_like(length.sqrt() * g, x) * run.noise.normal()
        return out_of_pure_noise(x_s, prediction, process, s)


class ReverseDiffusion(EndsAtTMin):
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
        spacing: of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of times.
    """

    measure = "the variance of a step's noise over 4 times that of the data noised to its end"

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """``beta / (4 (sigma_s^2 + alpha_s^2 d^2))``: ``[N]``."""
        return process.transition(s, t).beta / (4.0 * _variance(process, s))

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """From t to s."""
        process, t, s = run.process, at_time(x, move.t), at_time(x, move.s)
        step, prediction = process.transition(s, t), run.predict(x, t)
        mean = expand_like(2.0 - step.scale, x) * x + expand_like(step.beta, x) * prediction.score
        x_s = mean + expand_like(step.beta.sqrt(), x) * run.noise.normal()
        return out_of_pure_noise(x_s, prediction, process, s)


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
            it brings the number of steps and says how the trajectory ends; null: reverse diffusion.
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

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse what its predictor refuses."""
        self.predictor.require_fit(denoiser, plan)

    def plan(self, process: Process) -> Sequence[Move]:
        """The predictor's moves."""
        return self.predictor.plan(process)

    def begin(self, run: Run) -> None:
        """Begin the predictor, whose state the run's is."""
        self.predictor.begin(run)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """Predict, then correct; at s = 0 there is no noise level left to correct at."""
        x = self.predictor.step(run, x, move)
        # A plan's times are numbers, so that nothing waits for the device here.
        if not bool(torch.as_tensor(move.s > 0.0).any()):
            return x
        s, t = at_time(x, move.s), at_time(x, move.t)
        kept = run.process.transition(s, t).scale
        epsilon = 2.0 * (kept * self.snr * run.process.sigma(s)) ** 2  # 0 where s is.
        coefficients = torch.where(s > 0.0, s, t)
        for _ in range(self.corrector_steps):
            x = langevin_update(x, run.predict(x, coefficients).score, 2.0 * epsilon, run.noise.normal())
        return x

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The predictor's end."""
        return self.predictor.finish(run, x)
