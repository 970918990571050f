r"""The sampler and its run: a trajectory from the prior to the data, step by step, with a denoiser alone.

A sampler is a configuration and holds no state of its samples. One call of :meth:`Sampler.sample` is a :class:`Run`,
which holds the planned moves, the count of evaluations and the state of a multistep solver. Every step accepts one time
per row, so that a training loss can call it, too.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, Guidance, Prediction, clipped, describe_clip, require_clip
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Process
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.times import Spacing, require_spacing, timesteps_to_zero


@dataclass(frozen=True)
class Progress:
    """Progress of a sampler after a step, for a progress bar or a trajectory.

    Attributes:
        step: steps done; for an adaptive solver, the percentage of the time interval.
        total: steps in all; 100 for an adaptive solver.
        t: the time at which the step began; for an adaptive solver, the time at which it ended.
        x: the state after the step, ``[B, ...]``.
    """

    step: int
    total: int
    t: float
    x: Tensor


OnStep = Callable[[Progress], None]


@dataclass(frozen=True)
class Strays:
    """Samples whose state after the last step was not finite, or far outside the data's range.

    Attributes:
        count: number of such samples.
        of: number of all samples.
        largest: the largest absolute value among them.
    """

    count: int = 0
    of: int = 0
    largest: float = 0.0

    @classmethod
    def among(cls, farthest: Tensor) -> Strays:
        """The strays among the rows of :attr:`Samples.farthest`."""
        return cls(int((farthest > 0.0).sum()), len(farthest), max(farthest.tolist(), default=0.0))

    def __add__(self, other: Strays) -> Strays:
        """The sum of both."""
        return Strays(self.count + other.count, self.of + other.of, max(self.largest, other.largest))

    def __str__(self) -> str:
        """One line for the user, with the fix."""
        return (
            f"{self.count} of {self.of} samples ended far outside the data's range before they were cut to it, the "
            f"largest value {self.largest:.3g}: the sampler amplified the network's errors; try clip_x0: data, more "
            f"steps, another sampler such as ancestral, or other weights"
        )


def far_outside(x: Tensor, data_range: tuple[float, float] | None, sigma: float) -> Tensor:
    """The largest absolute value of each row that is not finite or far outside a range, 0 for other rows: ``[B]``.

    Far means beyond the range by more than its own width plus six standard deviations of the remaining noise.

    Args:
        x: states ``[B, ...]``.
        data_range: smallest and largest value of the data; None: no range, and only infinite values and NaN count.
        sigma: standard deviation of the noise in the states.
    """
    rows = x.detach().flatten(1)
    largest = rows.abs().amax(1).nan_to_num(nan=math.inf, posinf=math.inf)
    low, high = (-math.inf, math.inf) if data_range is None else data_range
    margin = 0.0 if data_range is None else high - low + 6.0 * sigma
    far = (rows.amin(1) < low - margin) | (rows.amax(1) > high + margin) | largest.isinf()
    return torch.where(far, largest, 0.0)


@dataclass  # Not frozen: a Trainer that predicts cannot move a frozen dataclass between devices.
class Samples:
    """The result of one call of a sampler.

    Attributes:
        x: the samples, ``[B, ...]``.
        evaluations: network evaluations per sample (NFE); for an adaptive solver, those of the slowest row.
        farthest: the largest absolute value of each sample that was far outside the data's range after the last step,
            ``[B]``; see :func:`far_outside`.
    """

    x: Tensor
    evaluations: int
    farthest: Tensor


@dataclass(frozen=True)
class Move:
    """A step from time ``t`` to a time ``s <= t``, nearer to the data or, in Langevin dynamics, the same.

    Attributes:
        t: start time, one number for all rows or float64 ``[B]``.
        s: end time, likewise.
    """

    t: float | Tensor
    s: float | Tensor


@dataclass
class Run:
    """One call of a sampler, with everything that belongs to its samples.

    Attributes:
        denoiser: the model; steps evaluate it through :meth:`predict`.
        noise: the samples' random numbers.
        cond: the condition, ``[B]`` rows.
        plan: the moves, in order.
        on_step: called after every step.
        evaluations: network evaluations so far.
        began: the time at which the current step began, passed to the denoiser; None outside of
            :meth:`Sampler.sample`: the time of each evaluation.
        state: the history of a multistep solver or of a sampler around another; None at the beginning.
    """

    denoiser: Denoiser
    noise: SampleNoise
    cond: Condition | None = None
    plan: Sequence[Move] = ()
    on_step: OnStep | None = None
    evaluations: int = 0
    began: float | Tensor | None = None
    state: Any = None

    @property
    def process(self) -> Process:
        """The denoiser's process."""
        return self.denoiser.process

    def predict(self, x: Tensor, t: float | Tensor) -> Prediction:
        """Evaluate the denoiser at x ``[B, ...]`` and times ``[B]``, or one for all rows, and count the evaluation."""
        self.evaluations += 1
        began = None if self.began is None else at_time(x, self.began)
        return self.denoiser(x, at_time(x, t), self.cond, began)


class Sampler(ABC):
    """A sampler: a configuration of trajectories from noise to data.

    A subclass implements the steps' times (:meth:`plan`) and one step (:meth:`step`); a multistep solver keeps its
    history in ``run.state``, which :meth:`begin` sets. The state is float32 or float64 whatever precision the backbone
    computes in.
    """

    adaptive: bool = False
    """True where the number of steps depends on the samples, so that it may differ between batches."""

    takes: tuple[str, ...] = ("mean",)
    """The kinds of predictions that its steps can be made with, see :attr:`Denoiser.predicts`."""

    def check(self, denoiser: Denoiser) -> None:
        """Refuse, before any work, a denoiser that does not fit this sampler.

        Raises:
            UserError: with the reason.
        """
        self._require(denoiser, self.plan(denoiser.process))

    def _require(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a kind of prediction that the steps cannot be made with, and what :meth:`require_fit` refuses."""
        if denoiser.predicts in self.takes:
            self.require_fit(denoiser, plan)
            return
        if denoiser.predicts == "velocity":
            raise UserError(
                f"{type(self).__name__} needs the score of the noised data, which a model trained on noise coupled "
                f"with the data does not have: choose heun, euler, ode, or ddim with eta 0"
            )
        raise UserError(
            f"{type(self).__name__} needs posterior means, and this model predicts end points: choose a sampler for "
            f"those"
        )

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:  # noqa: B027 (most fit any denoiser)
        """Refuse a denoiser that cannot make the planned moves.

        Raises:
            UserError: with the reason.
        """

    def start(self, process: Process, noise: SampleNoise) -> Tensor:
        """The first state, by default from the prior ``N(0, prior_std^2 I)``."""
        return _as_coefficient(process.prior_std, noise) * noise.normal()

    @abstractmethod
    def plan(self, process: Process) -> Sequence[Move]:
        """The moves on a process, in order.

        Raises:
            UserError: where the process does not have these times.
        """

    def begin(self, run: Run) -> None:  # noqa: B027 (most samplers keep nothing from step to step)
        """Prepare ``run.state`` before the first step; by default a no-op."""

    @abstractmethod
    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The state after one move, whose times may differ between rows: ``[B, ...]`` like x."""

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The samples from the state after the last step, by default that state."""
        return x

    def length(self, process: Process) -> int:
        """The length of the progress bar, :attr:`Progress.total`."""
        return 100 if self.adaptive else len(self.plan(process))

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: SampleNoise,
        cond: Condition | None = None,
        on_step: OnStep | None = None,
        start: Tensor | None = None,
    ) -> Samples:
        """Draw samples ``[B, *noise.shape]``.

        Args:
            denoiser: the model.
            noise: the samples' random numbers, keyed by their indices.
            cond: the condition, ``[B]`` rows.
            on_step: called after every step.
            start: the first state; None: a draw by :meth:`start`.

        Raises:
            UserError: where the denoiser does not fit the sampler.
        """
        plan = self.plan(denoiser.process)
        self._require(denoiser, plan)
        run = Run(denoiser, noise, cond, plan, on_step)
        x = self.start(denoiser.process, noise) if start is None else start
        self.begin(run)
        total = 100 if self.adaptive else len(plan)
        for done, move in enumerate(plan, start=1):
            run.began = move.t
            x = self.step(run, x, move)
            if on_step is not None:
                t = float(move.s if self.adaptive else move.t)
                on_step(Progress(total * done // len(plan), total, t, x))
        # Measured before finish(), whose clipping may hide samples that went astray.
        end = plan[-1].s if plan else denoiser.process.t_max
        sigma = float(run.process.sigma(torch.tensor(end, dtype=torch.float64)))
        farthest = far_outside(x, denoiser.data_range, sigma)
        run.began = None
        x = self.finish(run, x)
        return Samples(x, run.evaluations, farthest)


def _as_coefficient(std: float | Tensor, noise: SampleNoise) -> float | Tensor:
    return std.to(noise.indices.device, noise.dtype) if isinstance(std, Tensor) else std


class Predictor(Sampler):
    """A sampler that moves from one noise level to the next lower one.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.

    Raises:
        UserError: for fewer than one step.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps is {steps}; a sampler needs at least one, or null for every timestep of the model")
        self.steps = steps


class EndsAtZero(Predictor):
    """The base of samplers that visit a subsequence of the timesteps and end at time 0 with the prediction of x0.

    Args:
        steps: number of steps and network evaluations; null: every timestep of the model, or 1000 in continuous time.
        spacing: timesteps to visit: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr`` or
            ``karras:RHO`` (Karras et al. 2022, https://arxiv.org/abs/2206.00364) between the ends of the log-SNR, or a
            list of falling times.
        clip_x0: range to which the predicted clean datum is clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.

    Raises:
        UserError: for a spacing that is not one of these or does not match ``steps``, or an empty range.
    """

    def __init__(self, steps: int | None = None, spacing: Spacing = "uniform", clip_x0: ClipX0 = "data") -> None:
        super().__init__(steps)
        require_spacing(spacing, steps, intervals=False)
        require_clip(clip_x0)
        self.spacing = spacing
        self.clip_x0 = clip_x0

    def plan(self, process: Process) -> list[Move]:
        """Moves from the end of time down to 0."""
        times = timesteps_to_zero(process, self.steps, self.spacing)
        return [Move(t, s) for t, s in zip(times, [*times[1:], 0.0], strict=True)]


def denoised(run: Run, x: Tensor, t: float | Tensor, clip_x0: ClipX0) -> Tensor:
    """The posterior mean at a time by Tweedie's formula, clipped to the range: the last step of most samplers."""
    return clipped(run.predict(x, t).x0, clip_x0, run.denoiser)


def at_time(x: Tensor, t: float | Tensor) -> Tensor:
    """The times of the rows of x, from one for all rows or one for each: float64 ``[B]``."""
    if isinstance(t, Tensor):
        return t.to(x.device, torch.float64).expand(x.shape[0])
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


def with_noise(x: Tensor, std: Tensor, s: Tensor, noise: SampleNoise) -> Tensor:
    """``x + std z``, and x alone where s is 0; std and s ``[B]``, or std ``[B, ...]``."""
    rows = (s > 0.0).view(-1, *[1] * (x.ndim - 1))
    std = std if std.ndim == x.ndim else std.view(rows.shape)
    return x + torch.where(rows, std, 0.0).to(x.dtype) * noise.normal()


def described(configured: Sampler | Guidance | Process) -> dict[str, Any]:
    """The class path and arguments of a sampler, guidance or process, read from attributes of its arguments' names."""
    kinds = Sampler | Guidance | Process
    arguments = {key: getattr(configured, key) for key in inspect.signature(type(configured)).parameters}
    plain = {key: described(value) if isinstance(value, kinds) else value for key, value in arguments.items()}
    return {"class_path": f"{type(configured).__module__}.{type(configured).__qualname__}", "init_args": plain}


def describe(sampler: Sampler | Guidance, denoiser: Denoiser) -> str:
    """A sampler or guidance as text, for a protocol: ``Ancestral(steps=null, variance=beta, clip_x0=data [-1, 1])``."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['class_path'].rpartition('.')[2]}({words(value['init_args'])})"
        return describe_clip(value, denoiser) if key == "clip_x0" else "null" if value is None else str(value)

    def words(arguments: dict[str, Any]) -> str:
        return ", ".join(f"{key}={word(key, value)}" for key, value in arguments.items())

    return word("", described(sampler))
