r"""The sampler and its run: a trajectory from the prior to the data, one step at a time, seeing only a denoiser.

A sampler is a configuration and keeps nothing of what it made. One call of :meth:`Sampler.sample` is a :class:`Run`:
the moves planned once, the evaluations counted, the state of a multistep solver. Every step is written for times of
each row's own, so that a training loss may make one, too.
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
    """Where a sampler is, for a progress bar or a trajectory.

    Attributes:
        step: steps done; of a solver that chooses its own steps, the percentage of the way.
        total: steps in all; 100 there.
        t: the time at which the step just done began; of such a solver the one at which it ended.
        x: the state after it, ``[B, ...]``.
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
        count: how many they are.
        of: among how many samples.
        largest: the largest absolute value in them.
    """

    count: int = 0
    of: int = 0
    largest: float = 0.0

    @classmethod
    def among(cls, farthest: Tensor) -> Strays:
        """Those of some rows of :attr:`Samples.farthest`."""
        return cls(int((farthest > 0.0).sum()), len(farthest), max(farthest.tolist(), default=0.0))

    def __add__(self, other: Strays) -> Strays:
        """The sum of both."""
        return Strays(self.count + other.count, self.of + other.of, max(self.largest, other.largest))

    def __str__(self) -> str:
        """The line."""
        return (
            f"{self.count} of {self.of} samples ended far outside the data's range before they were cut to it, the "
            f"largest value {self.largest:.3g}: the sampler amplified the network's errors; try clip_x0: data, more "
            f"steps, another sampler such as ancestral, or other weights"
        )


def far_outside(x: Tensor, data_range: tuple[float, float] | None, sigma: float) -> Tensor:
    """The largest absolute value of each row that is not finite or far outside a range, 0 of the others: ``[B]``.

    Far is more than the range's own width beyond it, and six standard deviations of the noise that is left.

    Args:
        x: states ``[B, ...]``.
        data_range: least and largest value of the data; None where they have none, and only what is not finite counts.
        sigma: standard deviation of the noise in the states.
    """
    rows = x.detach().flatten(1)
    largest = rows.abs().amax(1).nan_to_num(nan=math.inf, posinf=math.inf)
    low, high = (-math.inf, math.inf) if data_range is None else data_range
    margin = 0.0 if data_range is None else high - low + 6.0 * sigma
    far = (rows.amin(1) < low - margin) | (rows.amax(1) > high + margin) | largest.isinf()
    return torch.where(far, largest, 0.0)


@dataclass  # Not frozen: such a one cannot be moved between devices by a Trainer that predicts.
class Samples:
    """The result of one call of a sampler.

    Attributes:
        x: the samples, ``[B, ...]``.
        evaluations: network evaluations of each of them; of a solver with steps of each row's own, of the row that
            needs the most.
        farthest: how far each was outside the data's range after the last step, ``[B]``; see :func:`far_outside`.
    """

    x: Tensor
    evaluations: int
    farthest: Tensor


@dataclass(frozen=True)
class Move:
    """A step from time ``t`` to a time ``s <= t``, nearer to the data or, as in Langevin dynamics, the same.

    Attributes:
        t: one number for all rows, or float64 ``[B]``.
        s: likewise.
    """

    t: float | Tensor
    s: float | Tensor


@dataclass
class Run:
    """One call of a sampler: whatever belongs to these samples and not to the sampler.

    Attributes:
        denoiser: the model; steps evaluate it through :meth:`predict`.
        noise: the samples' own random numbers.
        cond: the condition, ``[B]`` rows.
        plan: the moves, in order.
        on_step: called after every step.
        evaluations: network evaluations so far.
        began: the time at which the step being made began, which the denoiser is told; None outside of
            :meth:`Sampler.sample`, then each evaluation's own.
        state: what a multistep solver or a sampler around another keeps from step to step; None at the beginning.
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
        """One evaluation of the denoiser at x ``[B, ...]`` and times ``[B]`` or one for all rows; counted."""
        self.evaluations += 1
        began = None if self.began is None else at_time(x, self.began)
        return self.denoiser(x, at_time(x, t), self.cond, began)


class Sampler(ABC):
    """A way from noise to data.

    A subclass says which steps there are (:meth:`plan`) and makes one (:meth:`step`); a multistep solver keeps its
    history in ``run.state``, which :meth:`begin` sets. The samples' state is float32 or better whatever the backbone
    computes in.
    """

    adaptive: bool = False
    """Whether the number of steps follows from the samples, so that two batches may need different numbers of them."""

    takes_end_points: bool = False
    """Whether its steps ask a prediction for x0 alone, which is all that a model of end points says."""

    def check(self, denoiser: Denoiser) -> None:
        """Refuse, before any work, a denoiser that this sampler does not fit.

        Raises:
            UserError: with the reason.
        """
        plan = self.plan(denoiser.process)
        self._require_means(denoiser)
        self.require_fit(denoiser, plan)

    def _require_means(self, denoiser: Denoiser) -> None:
        if denoiser.predicts == "end_point" and not self.takes_end_points:
            raise UserError(
                f"{type(self).__name__} needs posterior means, and this model predicts end points: choose a sampler "
                f"for those"
            )

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:  # noqa: B027 (most fit any denoiser)
        """Refuse a denoiser that the planned moves cannot be made with.

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
            UserError: where they cannot be made on it.
        """

    def begin(self, run: Run) -> None:  # noqa: B027 (most samplers keep nothing from step to step)
        """Prepare ``run.state`` before the first step, by default nothing."""

    @abstractmethod
    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The state after one move, whose times may be each row's own: ``[B, ...]`` like x."""

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The samples from the state after the last step, by default that state."""
        return x

    def length(self, process: Process) -> int:
        """The ``total`` of its progress: how long a progress bar is."""
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
            noise: says which samples these are and gives each its own numbers.
            cond: the condition, ``[B]`` rows.
            on_step: called after every step.
            start: the state to start from; None for one of the sampler's own, see :meth:`start`.

        Raises:
            UserError: where the sampler does not fit the denoiser.
        """
        plan = self.plan(denoiser.process)
        self._require_means(denoiser)
        self.require_fit(denoiser, plan)
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
        # Before the end, which may cut to the range what went astray on the way.
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
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps is {steps}; a sampler needs at least one, or null for every level of the model")
        self.steps = steps


class EndsAtZero(Predictor):
    """The base of samplers that visit a subsequence of the levels and then time 0, where the prediction is the sample.

    Args:
        steps: number of steps and network evaluations; null: every level of the model, or 1000 in continuous time.
        spacing: which levels it visits: ``uniform`` in time, ``quadratic`` with more of them near the data, ``log_snr``
            or ``karras:RHO`` (Karras et al. 2022) between the ends of the log-SNR, or the times themselves, falling.
        clip_x0: keep the predicted clean image in a range: ``data``, that of the data (points have none), or ``[low,
            high]``; null: leave it.

    Raises:
        UserError: for a spacing that is not one of these, or an empty range.
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
    """The posterior mean at a time, by Tweedie's formula, kept in the range: how most samplers end."""
    return clipped(run.predict(x, t).x0, clip_x0, run.denoiser)


def at_time(x: Tensor, t: float | Tensor) -> Tensor:
    """One time for every row of x, or each row's own: float64 ``[B]``."""
    if isinstance(t, Tensor):
        return t.to(x.device, torch.float64).expand(x.shape[0])
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


def with_noise(x: Tensor, std: Tensor, s: Tensor, noise: SampleNoise) -> Tensor:
    """``x + std z``, and x alone where s is 0; std and s ``[B]``, or std ``[B, ...]``."""
    rows = (s > 0.0).view(-1, *[1] * (x.ndim - 1))
    std = std if std.ndim == x.ndim else std.view(rows.shape)
    return x + torch.where(rows, std, 0.0).to(x.dtype) * noise.normal()


def described(configured: Sampler | Guidance | Process) -> dict[str, Any]:
    """A sampler, guidance or process as its class path and arguments, which it keeps as attributes of their names."""
    kinds = Sampler | Guidance | Process
    arguments = {key: getattr(configured, key) for key in inspect.signature(type(configured)).parameters}
    plain = {key: described(value) if isinstance(value, kinds) else value for key, value in arguments.items()}
    return {"class_path": f"{type(configured).__module__}.{type(configured).__qualname__}", "init_args": plain}


def describe(sampler: Sampler | Guidance, denoiser: Denoiser) -> str:
    """A sampler as a protocol says it: ``Ancestral(steps=null, variance=beta, clip_x0=data [-1, 1])``."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['class_path'].rpartition('.')[2]}({words(value['init_args'])})"
        return describe_clip(value, denoiser) if key == "clip_x0" else "null" if value is None else str(value)

    def words(arguments: dict[str, Any]) -> str:
        return ", ".join(f"{key}={word(key, value)}" for key, value in arguments.items())

    return word("", described(sampler))
