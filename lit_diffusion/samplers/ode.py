r"""The probability-flow ODE, whose solutions have the marginals of the SDE (Song et al. 2021, eq. 13).

.. math::  \frac{dx}{dt} = f(t)\, x - \tfrac12 g(t)^2 s(x, t) = E[\alpha' x_0 + \sigma' \epsilon \mid x_t]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_diffusion.backbones.base import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, require_clip
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import Move, OnStep, Progress, Sampler, at_time, denoised
from lit_diffusion.samplers.sde import ToTheSmallestTime

TIGHT = 1e-5
"""Up to this tolerance samples made in different batches agree to a grey level."""


def flow_rate(process: Process, t: Tensor) -> Tensor:
    """``du/dt`` of ``u = log(sigma / alpha)``: ``sigma' / sigma - alpha' / alpha``, float64."""
    level = process.level(t)
    return level.dsigma / level.sigma - level.dalpha / level.alpha


class FixedSteps(ToTheSmallestTime):
    """A solver of the ODE in equal steps; by default it ends where it arrives, as the adaptive one does.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def __init__(self, steps: int | None = None, denoise: bool = False, clip_x0: ClipX0 = "data") -> None:
        super().__init__(steps, denoise, clip_x0)


class Euler(FixedSteps):
    """Euler's method on the probability-flow ODE, order 1: ``x_s = x_t - (t - s) v(x_t, t)``.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""
        return x + (move.s - move.t) * denoiser(x, at_time(x, move.t), cond).velocity


class Heun(FixedSteps):
    """Heun's method on the probability-flow ODE, order 2: the mean of the velocities at both ends of an Euler step.

    Args:
        steps: number of steps of two evaluations each; null: every level of the model, or 1000 in continuous time.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """From t to s."""
        first = denoiser(x, at_time(x, move.t), cond).velocity
        # A process given by betas has a kink at each of its points: the velocity is wanted on this step's side of s.
        inside = move.s + 1e-7 * (move.t - move.s)
        second = denoiser(x + (move.s - move.t) * first, at_time(x, inside), cond).velocity
        return x + (0.5 * (move.s - move.t)) * (first + second)


def largest_row_norm(x: Tensor) -> Tensor:
    """The largest root mean square of a row: with it a batch is solved as precisely as its hardest sample asks for."""
    return x.flatten(1).square().mean(1).max().sqrt()


def integrate(
    process: Process,
    velocity: Callable[[float, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float],
    rtol: float,
    atol: float,
    on_accept: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    r"""The solution of ``dx/dt = velocity(t, x)`` at some times, by Dormand and Prince's method of order 5.

    The solver's own variable is ``u = log(sigma / alpha)``, in which it sees ``velocity / (du/dt)``. In t the
    velocity of a process that is given by betas jumps at every level, which no error estimate foresees, and that of a
    variance-preserving one is singular at 0; in u both are smooth.

    Args:
        process: whose times they are.
        velocity: of the time and the state.
        x: the state at the first of the times, ``[B, ...]`` in float64.
        times: rising or falling.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        on_accept: called with the time and the state at the beginning of every accepted step.

    Returns:
        ``[len(times), B, ...]``.

    Raises:
        UserError: if the solver's step vanishes: the model's output is not finite, or the problem too stiff.
    """
    from torchdiffeq import odeint

    earliest, latest = min(times), max(times)
    wanted = -0.5 * process.log_snr(torch.tensor(times, dtype=torch.float64, device=x.device))

    def time_of(u: Tensor) -> Tensor:
        # The solver's first guess of a step may lie beyond the end, where the process need not be defined.
        return process.t_at_log_snr(-2.0 * u).clamp(earliest, latest)

    class Field(torch.nn.Module):
        def forward(self, u: Tensor, y: Tensor) -> Tensor:
            t = time_of(u)
            return velocity(float(t), y) / flow_rate(process, t)

        def callback_accept_step(self, u: Tensor, y: Tensor, du: Tensor) -> None:
            if on_accept is not None:
                on_accept(float(time_of(u)), y)

    # It must step onto these times; otherwise it steps past them and interpolates.
    options = {"norm": largest_row_norm, "step_t": wanted[1:]}
    try:
        return odeint(Field(), x, wanted, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        raise UserError(
            f"the ODE solver gave up ({error}): the model's output is not finite, or the tolerances rtol {rtol:g} and "
            f"atol {atol:g} are too tight for it; loosen them or use other weights"
        ) from error


def require_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that are not positive.

    Raises:
        UserError: naming them.
    """
    if not (rtol > 0.0 and atol > 0.0):
        raise UserError(f"rtol {rtol:g} and atol {atol:g} must be positive; 1e-5 is usual")


def refuse_grid_only(denoiser: Denoiser, what: str) -> None:
    """Refuse a network that knows no time between its levels.

    Raises:
        UserError: with what to choose instead.
    """
    if denoiser.process.levels == 1:
        raise UserError(f"{what} needs a way from noise to data, and this model has one noise level; choose langevin")
    if denoiser.on_grid_only:
        raise UserError(
            f"{what} asks the network at times between its {denoiser.process.levels} levels, of which it knows none "
            f"(conditional_instance normalisation); choose a sampler that walks on the levels, e.g. ancestral or euler"
        )


class ProbabilityFlow(Sampler):
    """The probability-flow ODE by Dormand and Prince's adaptive method (torchdiffeq), in float64.

    A batch takes the steps that its hardest sample needs, so a sample depends on its company within the tolerance:
    not by a grey level at 1e-5 or tighter.

    Args:
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        denoise: end with the posterior mean at the smallest time, one more evaluation.
        t_end: where to stop; null: the smallest sampling time of the process.
        clip_x0: keep that mean in a range: ``data``, that of the data (points have none), or ``[low, high]``; null:
            leave it.
    """

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

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a network that knows no time between its levels."""
        refuse_grid_only(denoiser, "an adaptive solver")

    def caveat(self) -> str | None:
        """A loose tolerance lets samples depend on the batch that they were made in."""
        if max(self.rtol, self.atol) <= TIGHT:
            return None
        return f"tolerances above {TIGHT:g}: samples may depend on their batch by more than a grey level"

    def plan(self, process: Process) -> list[Move]:
        """One move: the solver chooses the steps inside it."""
        return [Move(1.0, process.t_min_sampling if self.t_end is None else self.t_end)]

    def length(self, process: Process) -> int:
        """Percent of the way."""
        return 100

    def walk(
        self, denoiser: Denoiser, x: Tensor, noise: SampleNoise, cond: Condition | None, on_step: OnStep | None
    ) -> Tensor:
        """Solve, reporting whenever another percent of the way is done."""
        (move,) = self.plan(denoiser.process)
        reported = 0

        def report(t: float, state: Tensor) -> None:
            nonlocal reported
            percent = min(100, int(100.0 * (move.t - t) / (move.t - move.s)))
            if on_step is not None and percent > reported:
                reported = percent
                on_step(Progress(percent, 100, t, state))

        x = self._solve(denoiser, x, move, cond, report)
        if on_step is not None and reported < 100:
            on_step(Progress(100, 100, move.s, x))
        return x

    def step(self, denoiser: Denoiser, x: Tensor, move: Move, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """The whole way from t to s."""
        return self._solve(denoiser, x, move, cond, None)

    def _solve(
        self,
        denoiser: Denoiser,
        x: Tensor,
        move: Move,
        cond: Condition | None,
        on_accept: Callable[[float, Tensor], None] | None,
    ) -> Tensor:
        def velocity(t: float, state: Tensor) -> Tensor:
            return denoiser(state, at_time(state, t), cond).velocity

        times = (move.t, move.s)
        return integrate(denoiser.process, velocity, x.double(), times, self.rtol, self.atol, on_accept)[-1].to(x.dtype)

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """The posterior mean, when ``denoise``."""
        if not self.denoise:
            return x
        return denoised(denoiser, x, self.plan(denoiser.process)[0].s, cond, self.clip_x0)
