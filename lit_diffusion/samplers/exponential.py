r"""Exponential integrators of the probability-flow ODE: its linear part exactly, the network's part by a polynomial.

In ``lambda = log(alpha / sigma)``, with ``h = lambda_s - lambda_t``, the solution from t to s is

.. math::
    x_s &= \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \int_0^h e^{-(h - \tau)} \hat x_0(\lambda_t + \tau)\, d\tau \\
    x_s &= \frac{\alpha_s}{\alpha_t} x_t - \sigma_s \int_0^h e^{h - \tau} \hat\epsilon(\lambda_t + \tau)\, d\tau

(Lu et al. 2022, https://arxiv.org/abs/2211.01095, proposition 4.1, data prediction;
https://arxiv.org/abs/2206.00927, proposition 3.1,
noise prediction.) With the prediction constant both are the same step of order 1, DDIM's,
:meth:`~lit_diffusion.processes.Process.first_order_step`. With f either prediction, ``z = -h`` and ``c = alpha_s h``
for the data, ``z = h`` and ``c = -sigma_s h`` for the noise, a solver adds to that step

.. math::
    c \int_0^1 e^{(1 - u) z} \big(f(\lambda_t + u h) - f(\lambda_t)\big)\, du, \qquad
    \int_0^1 e^{(1 - u) z}\, \frac{u^{k-1}}{(k-1)!}\, du = \varphi_k(z)

to its order. Out of pure noise (alpha = 0), where h is infinite, it adds nothing.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser, clipped, require_clip
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.samplers.base import Move, Predictor, Run, at_time, denoised
from lit_diffusion.samplers.sde import LargeSteps
from lit_diffusion.samplers.times import Spacing, require_spacing, timesteps_to_t_min

Integrand = Literal["data", "noise"]
"""Which view of a prediction a solver takes for a polynomial: x0 or eps."""

Term = tuple[Tensor, Tensor]
"""A weight ``[B]`` and a difference of predictions ``[B, ...]``."""

FEW_STEPS = 15
"""Below so many steps ``lower_order_final`` lowers the order of the last ones."""


def phi(k: int, z: Tensor) -> Tensor:
    r"""``phi_k(z) = int_0^1 e^{(1-u) z} u^{k-1} / (k-1)! du``, k at least 1, of float64.

    .. math::  \varphi_1(z) = \frac{e^z - 1}{z}, \qquad \varphi_{k+1}(z) = \frac{\varphi_k(z) - 1/k!}{z}
    """
    small = z.abs() < 1.0  # Where the recurrence cancels, and the series sum_n z^n / (n + k)! has few terms.
    near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    series = torch.stack([near**n / float(math.factorial(n + k)) for n in range(20)]).sum(0)
    value = torch.expm1(far) / far
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / far
    return torch.where(small, series, value)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network, as a solver keeps it.

    Attributes:
        t: its times, float64 ``[B]``.
        log_ratio: ``lambda = log(alpha / sigma)`` there.
        x0: the predicted clean datum, clipped to the range, ``[B, ...]``.
        value: x0 itself, or the eps that belongs to it: ``[B, ...]``.
    """

    t: Tensor
    log_ratio: Tensor
    x0: Tensor
    value: Tensor


@dataclass(frozen=True)
class Interval:
    """A step from times t to times s, ``[B]`` each, and what depends on these alone.

    Attributes:
        process: the process.
        t: start times, float64.
        s: end times, positive.
        integrand: the prediction that is integrated.
    """

    process: Process
    t: Tensor
    s: Tensor
    integrand: Integrand

    @property
    def start(self) -> Tensor:
        """``lambda_t``; minus infinity out of pure noise."""
        return 0.5 * self.process.log_snr(self.t)

    @property
    def h(self) -> Tensor:
        """``lambda_s - lambda_t``."""
        return 0.5 * self.process.log_snr(self.s) - self.start

    def phi(self, k: int) -> Tensor:
        """``phi_k(z)``: ``[B]``."""
        return phi(k, -self.h if self.integrand == "data" else self.h)

    def part(self, share: float) -> Interval:
        """The first part of the step, a share of it in lambda; out of pure noise all of it."""
        between = self.process.t_at_log_snr(2.0 * (self.start + share * self.h))
        s = torch.where(self.h.isinf(), self.s, torch.minimum(torch.maximum(between, self.s), self.t))
        return Interval(self.process, self.t, s, self.integrand)

    def reached(self, x: Tensor, first: Evaluation, *terms: Term) -> Tensor:
        """The state at s: the step of order 1 from x, and c times the sum of the terms.

        Args:
            x: the state ``[B, ...]`` at t.
            first: the evaluation at t.
            terms: weights of differences of predictions.
        """
        x_s = self.process.first_order_step(x, first.x0, self.t, self.s)
        scale = self.h * (self.process.alpha(self.s) if self.integrand == "data" else -self.process.sigma(self.s))
        for weight, difference in terms:
            x_s = x_s + expand_like(torch.where(self.h.isinf(), 0.0, scale * weight), x) * difference
        return x_s

    def half_slope(self, first: Evaluation, other: Evaluation) -> Term:
        """Half of h times the slope of the line through two evaluations: weight ``h / (2 (lambda_0 - lambda_1))``."""
        return 0.5 * self.h / (first.log_ratio - other.log_ratio), first.value - other.value

    def interpolated(self, points: Sequence[Evaluation]) -> list[Term]:
        r"""The terms of the polynomial through evaluations, the first of them that at t, integrated exactly.

        .. math::  \sum_{j \ge 1} f[r_0, .., r_j] \int_0^1 e^{(1-u) z} \prod_{i < j} (u - r_i)\, du,
                   \qquad r_i = (\lambda_i - \lambda_t) / h

        by Newton's divided differences. An evaluation at an infinite lambda counts for nothing if it is the last one.
        """
        nodes = [(point.log_ratio - self.start) / self.h for point in points]
        differences, terms = [point.value for point in points], []
        product = [torch.ones_like(self.h)]  # Coefficients of 1, u, u^2, ...
        for j in range(1, len(points)):
            differences = [
                (later - former) / expand_like(nodes[i + j] - nodes[i], former)
                for i, (former, later) in enumerate(pairwise(differences))
            ]
            shifted = [torch.zeros_like(self.h), *product]
            product = [up - nodes[j - 1] * down for up, down in zip(shifted, [*product, shifted[0]], strict=True)]
            moments = [math.factorial(k) * self.phi(k + 1) for k in range(len(product))]
            terms.append((torch.stack([a * m for a, m in zip(product, moments, strict=True)]).sum(0), differences[0]))
        return terms


def longest_of(process: Process, times: Sequence[float]) -> float:
    """The longest of the steps between falling times, in lambda; one out of pure noise has no length."""
    lengths = (0.5 * process.log_snr(torch.tensor(times, dtype=torch.float64))).diff()
    return float(torch.where(lengths.isinf(), 0.0, lengths).max())


class ExponentialIntegrator(Predictor):
    r"""The base of exponential integrators: steps to the smallest time of sampling, each exact in the linear part.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    takes: tuple[str, ...] = ("mean", "velocity")
    integrand: Integrand = "data"
    """The prediction that is integrated."""

    longest: float = math.inf
    """The longest step in lambda that is not refused."""

    large_steps: LargeSteps = "refuse"
    """Whether longer ones are, too."""

    def __init__(
        self,
        steps: int | None = 20,
        spacing: Spacing = "log_snr",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(steps)
        require_spacing(spacing, steps, intervals=True)
        require_clip(clip_x0)
        self.spacing = spacing
        self.denoise = denoise
        self.clip_x0 = clip_x0

    def plan(self, process: Process) -> list[Move]:
        """Moves from t_max to the smallest time of sampling."""
        return [Move(t, s) for t, s in pairwise(timesteps_to_t_min(process, self.steps, self.spacing))]

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse steps longer than the longest, unless they are allowed; one out of pure noise is not measured."""
        process, longest = denoiser.process, self.longest
        h = longest_of(process, [float(plan[0].t), *(float(move.s) for move in plan)])
        if self.large_steps == "allow" or h <= longest:
            return
        advice = "list times that lie closer,"
        if isinstance(self.spacing, str):
            most = 1000 if process.num_timesteps is None else process.num_timesteps - 1
            enough = next((n for n in range(len(plan) + 1, most + 1) if self._longest_of(process, n) <= longest), None)
            advice = "no number of steps would do:" if enough is None else f"set steps to {enough}, or"
        raise UserError(
            f"{type(self).__name__} of the noise in {len(plan)} step{'s' * (len(plan) > 1)} on this model: one is "
            f"{h:.3g} long in log(alpha / sigma), and above {longest:g} the network's errors grow by its exponential; "
            f"{advice} choose dpmpp_2m or unipc of the data, or allow such steps by large_steps: allow"
        )

    def _longest_of(self, process: Process, steps: int) -> float:
        return longest_of(process, timesteps_to_t_min(process, steps, self.spacing))

    def interval(self, run: Run, x: Tensor, move: Move) -> Interval:
        """The step of a move."""
        return Interval(run.process, at_time(x, move.t), at_time(x, move.s), self.integrand)

    def evaluate(self, run: Run, x: Tensor, t: Tensor) -> Evaluation:
        """Evaluate the denoiser at x ``[B, ...]`` and times ``[B]``."""
        prediction = run.predict(x, t)
        x0, at = clipped(prediction.x0, self.clip_x0, run.denoiser), prediction.coefficients
        # The network's own eps to the last digit where nothing was clipped.
        cut = expand_like(at.alpha / at.sigma, x) * (prediction.x0 - x0)
        value = x0 if self.integrand == "data" else prediction.eps + cut
        return Evaluation(t, 0.5 * run.process.log_snr(t), x0, value)

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean with ``denoise``, else the state."""
        return denoised(run, x, run.plan[-1].s, self.clip_x0) if self.denoise else x


@dataclass(frozen=True)
class Past:
    """What a multistep solver keeps of its steps so far.

    Attributes:
        steps: number of steps done.
        points: their evaluations, the latest first, as many as the order asks for.
    """

    steps: int = 0
    points: tuple[Evaluation, ...] = ()


class Multistep(ExponentialIntegrator):
    """The base of solvers with one evaluation a step, which go on from the evaluations of the steps before.

    A subclass implements :meth:`extrapolated`. The first steps have the order of the evaluations that there are.

    Args:
        steps: number of steps and evaluations; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.
        lower_order_final: in fewer than 15 steps take the last of them at order 1, the one before at most at order 2,
            and so on, as their authors do.
    """

    order: int
    """The number of evaluations that a step goes by."""

    def __init__(
        self,
        steps: int | None = 20,
        spacing: Spacing = "log_snr",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0)
        self.lower_order_final = lower_order_final

    def allowed(self, run: Run, done: int) -> int:
        """The largest order of the step after so many."""
        lowered = self.lower_order_final and done < len(run.plan) < FEW_STEPS
        return min(self.order, len(run.plan) - done) if lowered else self.order

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The step from t to s by the evaluation at t and those before it."""
        past: Past = run.state or Past()
        at = self.interval(run, x, move)
        points = (self.evaluate(run, x, at.t), *past.points)[: self.order]
        run.state = Past(past.steps + 1, points)
        return self.extrapolated(run, x, at, points[: self.allowed(run, past.steps)])

    @abstractmethod
    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The state at the end of a step from x, by at most ``order`` evaluations, the one at its start first."""
