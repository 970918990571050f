r"""The probability-flow ODE, whose solutions have the marginals of the SDE.

.. math::  \frac{dx}{dt} = f(t)\, x - \tfrac12 g(t)^2 s(x, t) = E[\alpha' x_0 + \sigma' \epsilon \mid x_t]

(Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 13.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser, require_clip
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.samplers.base import Move, Progress, Run, Sampler, at_time, denoised
from lit_diffusion.samplers.sde import EndsAtTMin, LargeSteps
from lit_diffusion.samplers.times import Spacing


def flow_rate(process: Process, t: Tensor) -> Tensor:
    """``du/dt`` of ``u = log(sigma / alpha)``: ``sigma' / sigma - alpha' / alpha``, float64."""
    coefficients = process.coefficients(t)
    return coefficients.dsigma / coefficients.sigma - coefficients.dalpha / coefficients.alpha


class FixedSteps(EndsAtTMin):
    """The base of solvers of the ODE in a fixed number of steps; by default without a last denoising step.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`~lit_diffusion.samplers.sde.EndsAtTMin`.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of
            falling times.
    """

    takes: tuple[str, ...] = ("mean", "velocity")

    def __init__(
        self,
        steps: int | None = None,
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
        large_steps: LargeSteps = "refuse",
        spacing: Spacing = "uniform",
    ) -> None:
        super().__init__(steps, denoise, clip_x0, large_steps, spacing)

    def sizes(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """The left side of the bound, 0 where the process ends in pure noise.

        There f and g have a pole that the velocity does not have, and a network's output is not multiplied by them.
        """
        if bool(process.alpha(torch.tensor([process.t_max], dtype=torch.float64)) == 0.0):
            return torch.zeros_like(t)
        return super().sizes(process, t, s)


class Euler(FixedSteps):
    """Euler's method on the probability-flow ODE, order 1: ``x_s = x_t - (t - s) v(x_t, t)``.

    Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 13.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`~lit_diffusion.samplers.sde.EndsAtTMin`.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of
            falling times.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One Euler step from t to s."""
        t, s = at_time(x, move.t), at_time(x, move.s)
        return x + expand_like(s - t, x) * run.predict(x, t).velocity


class Heun(FixedSteps):
    r"""Heun's method on the probability-flow ODE, order 2: the mean of the velocities at both ends of an Euler step.

    .. math::  x' = x_t - (t - s)\, v(x_t, t), \qquad
               x_s = x_t - \frac{t - s}{2} \big(v(x_t, t) + v(x', s)\big)

    (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1, here in t.)

    Args:
        steps: number of steps of two evaluations each; null: every timestep of the model, or 1000 in continuous time.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.
        large_steps: ``refuse`` steps so long that the network's errors grow, or ``allow`` them, see
            :class:`~lit_diffusion.samplers.sde.EndsAtTMin`.
        spacing: spacing of the steps: ``uniform`` in time, ``quadratic``, ``log_snr``, ``karras:RHO``, or a list of
            falling times.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One Heun step from t to s."""
        t, s = at_time(x, move.t), at_time(x, move.s)
        first = run.predict(x, t).velocity
        # A process given by betas has a kink at each grid point: the velocity must be the one on this step's side of s.
        second = run.predict(x + expand_like(s - t, x) * first, s + 1e-7 * (t - s)).velocity
        return x + expand_like(0.5 * (s - t), x) * (first + second)


def row_norm(x: Tensor) -> Tensor:
    """Root mean square of each row of ``[B, ...]``: ``[B]``."""
    return x.flatten(1).square().mean(1).sqrt()


NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
"""The nodes ``c_2 .. c_7`` of Dormand and Prince's method; ``c_1`` is 0."""

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The coefficients ``a_ij`` of Dormand and Prince's method; the last row is also the solution of order 5."""

ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""The weights of the error estimate: the solution of order 5 minus the embedded one of order 4."""


def integrate(
    process: Process,
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float],
    rtol: float,
    atol: float,
    on_step: Callable[[float, Tensor], None] | None = None,
    norm: Callable[[Tensor], Tensor] = row_norm,
) -> Tensor:
    r"""The solution of ``dx/dt = velocity(t, x)`` at some times, by Dormand and Prince's method of order 5.

    .. math::
        k_i &= F\Big(u + c_i h,\; y + h \sum_{j < i} a_{ij} k_j\Big), \quad i = 1 .. 7, \qquad
        y' = y + h \sum_{j < 7} a_{7j} k_j, \\
        e &= \Big\| \frac{h \sum_i \hat e_i k_i}{atol + rtol \max(|y|, |y'|)} \Big\|, \qquad
        h' = h \min\big(10, \max(0.2,\, 0.9\, e^{-1/5})\big)

    A step is accepted where ``e <= 1``, and its last slope is the first of the next one (Dormand and Prince 1980, "A
    family of embedded Runge-Kutta formulae", https://doi.org/10.1016/0771-050X(80)90013-3; step sizes and the first of
    them: Hairer, Norsett and Wanner 1993, "Solving Ordinary Differential Equations I", section II.4).

    Every row is a problem of its own, with its own time, step and error, so its solution does not depend on the batch.
    All rows are evaluated together, each at its own time; a row that has reached the last time is evaluated there until
    all have, so that the network's batch keeps one shape.

    The solver's variable is ``u = log(sigma / alpha)``, in which the slope is ``F = velocity / (du/dt)``. In t the
    velocity of a process given by betas jumps at every timestep, which no error estimate foresees, and that of a
    variance-preserving one is singular at 0; in u both are smooth. If a time has no finite u, such as the pure noise at
    the end of a straight flow, the variable is t itself.

    Args:
        process: the process of the times.
        velocity: a function of the times ``[B]`` and the state ``[B, ...]``.
        x: the state at the first of the times, ``[B, ...]`` in float64.
        times: rising or falling times; every row steps onto each of them.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        on_step: called after every step with the time of the slowest row, and the state.
        norm: norm of the rows of an error in units of the tolerances, ``[B, ...]`` to ``[B]``.

    Returns:
        ``[len(times), B, ...]``.

    Raises:
        UserError: if a row's step vanishes: the model's output is not finite, or the problem too stiff.
    """
    given = torch.tensor(times, dtype=torch.float64, device=x.device)
    wanted = -0.5 * process.log_snr(given)
    in_time = not bool(wanted.isfinite().all())
    wanted = given if in_time else wanted
    earliest, latest = min(times), max(times)
    sign = 1.0 if times[-1] > times[0] else -1.0

    def time_of(u: Tensor) -> Tensor:
        # The first guess of a step may lie beyond the end, where the process need not be defined.
        return (u if in_time else process.t_at_log_snr(-2.0 * u)).clamp(earliest, latest)

    def slope(u: Tensor, y: Tensor) -> Tensor:
        t = time_of(u)
        if in_time:
            return sign * velocity(t, y)
        return velocity(t, y) / expand_like(sign * flow_rate(process, t), y)  # Along the way: h is positive.

    def scaled(difference: Tensor, *states: Tensor) -> Tensor:
        largest = torch.stack([state.abs() for state in states]).amax(0)
        return norm(difference / (atol + rtol * largest)).nan_to_num(nan=math.inf)

    u, goal = wanted[:1].repeat(len(x)), torch.ones(len(x), dtype=torch.int64, device=x.device)
    solution = torch.stack([x] * len(times))
    first = slope(u, x)
    size, steepness = scaled(x, x), scaled(first, x)
    trial = torch.where((size < 1e-5) | (steepness < 1e-5), 1e-6, 0.01 * size / steepness)
    trial = torch.minimum(trial, (wanted[1] - wanted[0]).abs())
    bend = scaled(slope(u + sign * trial, x + expand_like(trial, x) * first) - first, x) / trial
    hardest = torch.maximum(steepness, bend)
    h = torch.where(hardest <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / hardest) ** 0.2)
    h = torch.minimum(100.0 * trial, h)
    while bool((goal < len(times)).any()):
        underway = goal < len(times)
        if bool((underway & ~(h > 1e-12)).any()):
            raise UserError(
                f"the ODE solver gave up at time {float(time_of(u)[underway & ~(h > 1e-12)][0]):.4g}, where its step "
                f"vanishes: the model's output is not finite, or the tolerances rtol {rtol:g} and atol {atol:g} are "
                f"too tight for it; loosen them or use other weights"
            )
        target = wanted[goal.clamp(max=len(times) - 1)]
        left = (target - u).abs()
        step = torch.minimum(h, left)  # 0 of a row that has arrived.
        slopes, y = [first], x
        for node, weights in zip(NODES, STAGES, strict=True):
            y = x + expand_like(step, x) * _combined(weights, slopes)
            slopes.append(slope(u + sign * node * step, y))
        error = scaled(expand_like(step, x) * _combined(ERROR, slopes), x, y)
        accepted, lands = underway & (error <= 1.0), step == left
        factor = (0.9 * error**-0.2).clamp(0.2, 10.0)
        # A step shortened to land on a time is no reason to drop the longer one that was planned.
        h = torch.where(accepted & lands, torch.maximum(h, step * factor), step * factor)
        u = torch.where(accepted, torch.where(lands, target, u + sign * step), u)
        wide = accepted.view(-1, *[1] * (x.ndim - 1))
        x, first = torch.where(wide, y, x), torch.where(wide, slopes[-1], first)
        arrived = (accepted & lands).nonzero()[:, 0]
        solution[goal[arrived], arrived] = x[arrived]
        goal[arrived] += 1
        if on_step is not None:
            on_step(float(time_of((u * sign).min() * sign)), x)
    return solution


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """``sum_j w_j k_j``."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight != 0.0:
            total = total + weight * slope
    return total


def require_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that are not positive.

    Raises:
        UserError: naming them.
    """
    if not (rtol > 0.0 and atol > 0.0):
        raise UserError(f"rtol {rtol:g} and atol {atol:g} must be positive; 1e-5 is usual")


def refuse_grid_only(denoiser: Denoiser, what: str) -> None:
    """Refuse a network that is trained on its grid's timesteps alone.

    Args:
        denoiser: the model.
        what: the caller, for the message.

    Raises:
        UserError: with the samplers to choose instead.
    """
    if denoiser.process.num_timesteps == 1:
        raise UserError(
            f"{what} needs a trajectory from noise to data, and this model has one noise level; choose langevin"
        )
    if denoiser.on_grid_only:
        raise UserError(
            f"{what} evaluates the network between its {denoiser.process.num_timesteps} timesteps, where it is not "
            f"trained (conditional_instance normalization); choose a sampler that visits only those, e.g. ancestral or "
            f"euler"
        )


class ProbabilityFlow(Sampler):
    r"""The probability-flow ODE by Dormand and Prince's adaptive method in float64, see :func:`integrate`.

    .. math::  \frac{dx}{dt} = f(t)\, x - \tfrac12 g(t)^2 s(x, t)

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 13.) Every sample has its own step sizes, so it does not
    depend on its batch; the evaluations counted are those of the slowest sample.

    Args:
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        t_end: end time, one that the model is trained on; null: the smallest sampling time of the process.
        clip_x0: range to which that mean is clipped: ``data``, the data's own (points have none), or ``[low, high]``;
            null: no clipping.

    Raises:
        UserError: for tolerances that are not positive, a t_end outside (0, 1), or an empty range.
    """

    takes = ("mean", "velocity")
    adaptive = True

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        denoise: bool = False,
        t_end: float | None = None,
        clip_x0: ClipX0 = "data",
    ) -> None:
        require_tolerances(rtol, atol)
        require_clip(clip_x0)
        if t_end is not None and not 0.0 < t_end < 1.0:
            raise UserError(f"t_end is {t_end:g}; it lies between 0 and 1")
        self.rtol = rtol
        self.atol = atol
        self.denoise = denoise
        self.t_end = t_end
        self.clip_x0 = clip_x0

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a network that is trained on its grid's timesteps alone, and an end at a time without training."""
        refuse_grid_only(denoiser, "an adaptive solver")
        if self.t_end is not None:
            denoiser.process.require_time("t_end", self.t_end)

    def plan(self, process: Process) -> list[Move]:
        """One move, inside which the solver chooses its steps."""
        return [Move(process.t_max, process.t_min_sampling if self.t_end is None else self.t_end)]

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The trajectory from t to s, with progress reported for every percent of the slowest sample.

        The denoiser receives each evaluation's own time as ``began``: the last evaluation of a step is the first of the
        next one.
        """
        begin, end, reported = float(move.t), float(move.s), 0

        def report(t: float, state: Tensor) -> None:
            nonlocal reported
            percent = int(100.0 * (begin - t) / (begin - end))
            if run.on_step is not None and reported < percent < 100:
                reported = percent
                run.on_step(Progress(percent, 100, t, state))

        def velocity(t: Tensor, state: Tensor) -> Tensor:
            run.began = t
            return run.predict(state, t).velocity

        return integrate(run.process, velocity, x.double(), (begin, end), self.rtol, self.atol, report)[-1].to(x.dtype)

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean with ``denoise``, else the state."""
        return denoised(run, x, run.plan[-1].s, self.clip_x0) if self.denoise else x
