r"""The discretized reverse-time SDE, and predictor-corrector sampling.

.. math::  dx = \big(f(t)\, x - g(t)^2 s(x, t)\big)\, dt + g(t)\, d\bar w

(Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 6, after Anderson 1982), integrated from t_max to the process's
smallest sampling time; one last evaluation removes the remaining noise by Tweedie's formula (``denoise``), as
recommended by Jolicoeur-Martineau et al. 2021, https://arxiv.org/abs/2009.05475.
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

    d being the largest standard deviation of data that the prior N(0, sigma_1^2 I) covers. On data of variance
    ``c <= d^2`` a step of the reverse SDE multiplies a deviation of the state by
    ``1 - f (t - s) - g^2 (t - s) / (sigma^2 + alpha^2 c)``. Where the variance explodes, deviations change their sign
    and grow from step to step once the last term exceeds 2; where it is preserved, the state lands on the other side of
    the data, with the network's error multiplied by ``g^2 (t - s) / sigma``, where no network was trained. DDIM and
    ancestral sampling use the process's exact transitions, which are bounded for any step. A step out of pure noise
    (alpha = 0) is not measured: it is taken to first order, see :func:`out_of_pure_noise`.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` steps above this bound, or ``allow`` them, as the literature's tables of few steps do.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr``
            or ``karras:RHO`` (Karras et al. 2022, https://arxiv.org/abs/2206.00364) in the noise level, or a list of
            falling times, both ends included.

    Raises:
        UserError: for a name that is not one of these, a spacing that does not match ``steps``, or an empty range.
    """

    measure = "g^2 dt over the variance of the noised data"
    """Description of :meth:`sizes` for messages."""

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
        """Moves from t_max to the smallest time of sampling."""
        return [Move(t, s) for t, s in pairwise(timesteps_to_t_min(process, self.steps, self.spacing))]

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """The left side of the bound for steps from times ``[N]`` to times ``[N]``: ``[N]``."""
        return process.diffusion(t) ** 2 * (t - s) / _variance(process, t)

    def largest_step(self, process: Process, times: Sequence[float]) -> tuple[float, float]:
        """The largest size among the steps between falling times, and the time at which that step begins."""
        points = torch.tensor(times, dtype=torch.float64)
        t, s = points[:-1], points[1:]
        sizes = torch.where(process.alpha(t) == 0.0, 0.0, self.sizes(process, t, s))
        worst = int(sizes.argmax())
        return float(sizes[worst]), float(t[worst])

    def enough_steps(self, process: Process, steps: int) -> int | None:
        """The smallest number of steps above ``steps`` that keeps the bound, by bisection; None where none does."""

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
            advice = "list times that lie closer," if listed else "no number of steps on its timesteps would do:"
        raise UserError(
            f"{type(self).__name__} in {count} step{'s' * (count > 1)} on this model: {self.measure} is up to "
            f"{size:.3g}, at t = {t:.3g}, and above 1 samples end far from the data; {advice} choose ddim, ancestral "
            f"or ode, or allow such steps by large_steps: allow"
        )

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean with ``denoise``, else the state."""
        return denoised(run, x, run.plan[-1].s, self.clip_x0) if self.denoise else x


def out_of_pure_noise(x_s: Tensor, prediction: Prediction, process: Process, s: Tensor) -> Tensor:
    r"""The states x_s after a step, replaced by the first-order step where it began in pure noise (alpha = 0).

    .. math::  x_s = \alpha_s\, \hat x_0 + \frac{\sigma_s}{\sigma_t}\, x_t

    There f and g of the SDE are infinite, and the given states are not finite.

    Args:
        x_s: the states ``[B, ...]`` after the step.
        prediction: the prediction at its beginning.
        process: the process.
        s: the times ``[B]`` at its end.
    """
    coefficients, x_t = prediction.coefficients, prediction.x_t
    limit = process.first_order_step(x_t, prediction.x0, coefficients.t, s)
    return torch.where((coefficients.alpha == 0.0).view(-1, *[1] * (x_t.ndim - 1)), limit, x_s)


def _variance(process: Process, t: Tensor) -> Tensor:
    """``sigma^2 + alpha^2 d^2``, the largest variance of data noised to t ``[N]``."""
    widest = min(1.0, float(torch.as_tensor(process.prior_std).max()))
    return process.sigma(t) ** 2 + (widest * process.alpha(t)) ** 2


class EulerMaruyama(EndsAtTMin):
    r"""Euler and Maruyama's discretization of the reverse SDE, of weak order 1.

    .. math::  x_s = x_t - (t - s) \big(f(t)\, x_t - g(t)^2 s(x_t, t)\big) + g(t) \sqrt{t - s}\, z

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, section 4.1.)

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`EndsAtTMin`.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of
            falling times.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        process, t, s = run.process, at_time(x, move.t), at_time(x, move.s)
        f, g, length = process.drift(t), process.diffusion(t), t - s
        prediction = run.predict(x, t)
        mean = expand_like(1.0 - length * f, x) * x + expand_like(length * g**2, x) * prediction.score
        x_s = mean + expand_like(length.sqrt() * g, x) * run.noise.normal()
        return out_of_pure_noise(x_s, prediction, process, s)


class ReverseDiffusion(EndsAtTMin):
    r"""Reverse diffusion: a reverse step with the discretization of the process's forward step.

    .. math::  x_s = (2 - a)\, x_t + \beta\, s(x_t, t) + \sqrt{\beta}\, z

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 46) with the exact forward step
    ``x_t = a x_s + sqrt(beta) z``: ``2 - a`` is at most 2 and beta at most ``sigma_t^2``, so that no error grows. But
    the state at s has the whole of beta as its noise: where the variance explodes, few steps end in noise far above the
    noise level at s. Steps whose noise has more than twice the standard deviation of the data noised to s are refused.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` such steps, or ``allow`` them.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of
            falling times.
    """

    measure = "the variance of a step's noise over 4 times that of the data noised to its end"

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """The left side of this sampler's bound, ``beta / (4 (sigma_s^2 + alpha_s^2 d^2))``: ``[N]``."""
        return process.transition(s, t).beta / (4.0 * _variance(process, s))

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        process, t, s = run.process, at_time(x, move.t), at_time(x, move.s)
        step, prediction = process.transition(s, t), run.predict(x, t)
        mean = expand_like(2.0 - step.scale, x) * x + expand_like(step.beta, x) * prediction.score
        x_s = mean + expand_like(step.beta.sqrt(), x) * run.noise.normal()
        return out_of_pure_noise(x_s, prediction, process, s)


class PredictorCorrector(Predictor):
    r"""Predictor-corrector sampling: a predictor's step to the next noise level, then Langevin steps at that level.

    .. math::  x \leftarrow x + \epsilon\, s + \sqrt{2 \epsilon}\, z, \qquad
               \epsilon = 2 a^2 \Big(r \frac{\|z\|}{\|s\|}\Big)^2 = 2 a^2 (r \sigma_s)^2

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, algorithms 2 and 3) with the signal-to-noise ratio r and
    ``a = alpha_t / alpha_s`` of the predictor's step: 1 where the variance explodes, the root of DDPM's ``alpha_i``
    where it is preserved. The first form is the paper's (algorithms 4 and 5), whose code averages the norms over the
    batch, so that one sample depends on the others. Norms of each sample make the step depend on the state and on the
    noise that it multiplies, which in few dimensions widens the law several times over. Here they are the expected
    ones at the noise level, ``E |z|^2 = D`` and ``E |s|^2 = D / sigma^2`` (of the noise's score ``-eps / sigma``), so
    the step size is one number a noise level.

    Where the noised data have variance V, the correction's own stationary variance is
    ``V / (1 - a^2 r^2 sigma^2 / V)``, at most ``V / (1 - r^2)``: 2.6 % too much at r = 0.16.

    Args:
        predictor: any sampler that moves from one noise level to the next: reverse diffusion, ancestral,
            Euler-Maruyama, DDIM, ...; it determines the number of steps and the end; null: reverse diffusion.
        snr: signal-to-noise ratio r, between 0 and 1, where the correction would diverge; the paper's is 0.16 on
            CIFAR-10 and between 0.075 and 0.17 elsewhere.
        corrector_steps: Langevin steps at each noise level, one network evaluation each.

    Raises:
        UserError: for an snr outside (0, 1), fewer than one corrector step, or a predictor-corrector as predictor.
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
        """Refuse a denoiser that the predictor refuses."""
        self.predictor.require_fit(denoiser, plan)

    def plan(self, process: Process) -> Sequence[Move]:
        """The predictor's moves."""
        return self.predictor.plan(process)

    def begin(self, run: Run) -> None:
        """Begin the predictor, which owns ``run.state``."""
        self.predictor.begin(run)

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """Predict, then correct, except at s = 0, where no noise is left."""
        x = self.predictor.step(run, x, move)
        # A plan's times are numbers, so that nothing waits for the device here.
        if not bool(torch.as_tensor(move.s > 0.0).any()):
            return x
        s, t = at_time(x, move.s), at_time(x, move.t)
        kept = run.process.transition(s, t).scale
        epsilon = 2.0 * (kept * self.snr * run.process.sigma(s)) ** 2  # 0 where s is.
        times = torch.where(s > 0.0, s, t)
        for _ in range(self.corrector_steps):
            x = langevin_update(x, run.predict(x, times).score, 2.0 * epsilon, run.noise.normal())
        return x

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The samples as the predictor finishes them."""
        return self.predictor.finish(run, x)
