"""What every sampler is: a walk from the prior to the data, one ``step`` at a time, seeing only a denoiser."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import ClipX0, Denoiser, Prediction, clip_in_words, clipped, require_clip
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process
from lit_diffusion.randomness import SampleNoise


@dataclass(frozen=True)
class Progress:
    """Where a sampler is, for a progress bar or a trajectory.

    Attributes:
        step: steps done; of a solver that chooses its own steps, the percentage of the way.
        total: steps in all; 100 there.
        t: the time of the step just done.
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
        """Those of some rows of :attr:`Sampler.farthest`."""
        return cls(int((farthest > 0.0).sum()), len(farthest), max(farthest.tolist(), default=0.0))

    def __add__(self, other: Strays) -> Strays:
        """Of both."""
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
        data_range: of the data; None where they have none, and only what is not finite counts.
        sigma: of the noise in them.
    """
    rows = x.detach().flatten(1)
    largest = rows.abs().amax(1).nan_to_num(nan=math.inf, posinf=math.inf)
    low, high = (-math.inf, math.inf) if data_range is None else data_range
    margin = 0.0 if data_range is None else high - low + 6.0 * sigma
    far = (rows.amin(1) < low - margin) | (rows.amax(1) > high + margin) | largest.isinf()
    return torch.where(far, largest, 0.0)


class CountedDenoiser(Denoiser):
    """A denoiser that counts its evaluations."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.learned_variance = denoiser.learned_variance
        self.on_grid_only = denoiser.on_grid_only
        self.data_range = denoiser.data_range
        self.evaluations = 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """Evaluate and count."""
        self.evaluations += 1
        return self.denoiser(x_t, t, cond, began)


class Sampler(ABC):
    """A walk from noise to data.

    A subclass says which steps there are (:meth:`plan`, one entry a step with at least the time) and makes one
    (:meth:`step`). The state is float32 or better whatever the backbone computes in.

    Attributes:
        evaluations: network evaluations of each sample in the last call of :meth:`sample`.
        farthest: of its samples, see :func:`far_outside`: ``[B]``.
        strays: of the last generation of many samples.
    """

    evaluations: int = 0
    farthest: Tensor = torch.zeros(0)
    strays: Strays = Strays()

    adaptive: bool = False
    """Whether the number of steps follows from the samples, so that two batches may need different numbers of them."""

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027 (most samplers walk on any denoiser)
        """Refuse, before any work, a denoiser that this sampler cannot walk on.

        Raises:
            UserError: with the reason.
        """

    def start(self, process: Process, noise: SampleNoise) -> Tensor:
        """The first state, by default from the prior ``N(0, prior_std^2 I)``."""
        return process.prior_std * noise.normal()

    @abstractmethod
    def plan(self, process: Process) -> list[Any]:
        """What each step needs, in order; each entry has an attribute ``t``."""

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, move: Any, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """The state after one step: ``[B, ...]`` like x."""

    def length(self, process: Process) -> int:
        """The ``total`` that a walk reports: how long a progress bar is."""
        return len(self.plan(process))

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """What remains after the last step, by default nothing."""
        return x

    def walk(
        self, denoiser: Denoiser, x: Tensor, noise: SampleNoise, cond: Condition | None, on_step: OnStep | None
    ) -> Tensor:
        """All steps from a first state to the last one."""
        plan = self.plan(denoiser.process)
        for done, move in enumerate(plan, start=1):
            x = self.step(denoiser, x, move, noise, cond)
            if on_step is not None:
                on_step(Progress(done, len(plan), move.t, x))
        return x

    def _last_sigma(self, process: Process) -> float:
        """Of the noise that the last step leaves."""
        ends = [getattr(move, "s", move.t) for move in self.plan(process)[-1:]]
        return float(process.sigma(torch.tensor(ends[0] if ends else 1.0, dtype=torch.float64)))

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: SampleNoise,
        cond: Condition | None = None,
        on_step: OnStep | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Samples ``[B, *noise.shape]``.

        Args:
            denoiser: the model.
            noise: says which samples these are and gives each its own numbers.
            cond: the condition, ``[B]`` rows.
            on_step: called after every step.
            start: the state to start from; None for one of the sampler's own, see :meth:`start`.

        Raises:
            UserError: where the sampler does not fit the denoiser.
        """
        self.check(denoiser)
        counted = CountedDenoiser(denoiser)
        x = self.start(denoiser.process, noise) if start is None else start
        x = self.walk(counted, x, noise, cond, on_step)
        # Before the end, which may cut to the range what went astray on the way.
        self.farthest = far_outside(x, denoiser.data_range, self._last_sigma(denoiser.process))
        x = self.finish(counted, x, cond)
        self.evaluations = counted.evaluations
        return x


@dataclass(frozen=True)
class Move:
    """A step from time ``t`` to an earlier time ``s < t``, nearer to the data."""

    t: float
    s: float


Spacing = Literal["uniform", "quadratic"]


def subsequence(process: Process, steps: int | None, spacing: Spacing = "uniform") -> list[float]:
    """The times ``t_1 < .. < t_S = 1`` at which a walk of S steps evaluates the network; its last step ends at 0.

    On a grid they are grid points, ``tau_i = round(L i / S)`` or ``round(L i^2 / S^2)``, moved up where two would
    coincide (Song et al. 2021, DDIM, appendix D.2); in continuous time ``i / S`` or ``(i / S)^2``, shrunk towards 1
    where the first would be below the smallest time that samplers visit.

    Args:
        process: whose grid it is.
        steps: S; None for the whole grid, 1000 in continuous time.
        spacing: ``uniform`` or ``quadratic``, which has more of its steps near the data.

    Raises:
        UserError: for more steps than the grid has points.
    """
    count = steps or process.levels or 1000
    fraction = torch.arange(1, count + 1, dtype=torch.float64) / count
    if spacing == "quadratic":
        fraction = fraction**2
    if process.levels is None:
        first, end = float(fraction[0]), process.t_min_sampling
        if first < end:
            fraction = 1.0 - (1.0 - fraction) * ((1.0 - end) / (1.0 - first))
        return fraction.tolist()
    _require_points(process, count)
    index = (fraction * process.levels).round()
    step = torch.arange(1, count + 1, dtype=torch.float64)
    return (((index - step).clamp(min=0.0).cummax(0).values + step) / process.levels).tolist()


def to_the_smallest_time(process: Process, steps: int | None) -> list[float]:
    """The times ``1 = t_0 > .. > t_S`` of a walk of S equal steps to the smallest time that samplers visit.

    Raises:
        UserError: for more steps than the grid has, whose points are the times on a grid.
    """
    end = process.t_min_sampling
    if process.levels is None:
        return torch.linspace(1.0, end, (steps or 1000) + 1, dtype=torch.float64).tolist()
    count = steps or process.levels - 1
    _require_points(process, count + 1)
    return (torch.linspace(process.levels, 1, count + 1, dtype=torch.float64).round() / process.levels).tolist()


def _require_points(process: Process, points: int) -> None:
    assert process.levels is not None
    if points > process.levels:
        raise UserError(
            f"steps: this walk visits {points} noise levels and the model has {process.levels}; ask for fewer steps"
        )


class Predictor(Sampler):
    """A sampler that moves from one noise level to the next lower one, :class:`Move` by move.

    Args:
        steps: number of steps; null: every level of the model, or 1000 in continuous time.
    """

    def __init__(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps is {steps}; a sampler needs at least one, or null for every level of the model")
        self.steps = steps

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a model of one level, and more steps than the model has levels."""
        if denoiser.process.levels == 1:
            raise UserError(
                "this model has one noise level: there is no way from noise to data through it; choose langevin"
            )
        self.plan(denoiser.process)

    @abstractmethod
    def plan(self, process: Process) -> list[Move]:
        """The moves, in order."""


class ToTheData(Predictor):
    """What the walkers of a subsequence of the levels share: its times, down to 0, and a range for the predicted data.

    Args:
        steps: number of steps and network evaluations; null: every level of the model, or 1000 in continuous time.
        spacing: which levels a subsequence visits: ``uniform``, or ``quadratic`` with more of them near the data.
        clip_x0: keep the predicted clean image in a range: ``data``, that of the data (points have none), or ``[low,
            high]``; null: leave it.

    Raises:
        UserError: for a spacing that is not one of these, or an empty range.
    """

    def __init__(self, steps: int | None, spacing: Spacing, clip_x0: ClipX0) -> None:
        super().__init__(steps)
        require_choice("", "spacing", spacing, get_args(Spacing))
        require_clip(clip_x0)
        self.spacing = spacing
        self.clip_x0 = clip_x0

    def plan(self, process: Process) -> list[Move]:
        """From 1 down to 0."""
        times = subsequence(process, self.steps, self.spacing)[::-1]
        return [Move(t, s) for t, s in zip(times, [*times[1:], 0.0], strict=True)]


def denoised(denoiser: Denoiser, x: Tensor, t: float, cond: Condition | None, clip_x0: ClipX0) -> Tensor:
    """The posterior mean at a time, by Tweedie's formula, kept in the range: how most samplers end."""
    return clipped(denoiser(x, at_time(x, t), cond).x0, clip_x0, denoiser)


def at_time(x: Tensor, t: float) -> Tensor:
    """One time for every row of x: float64 ``[B]``."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


def described(sampler: Sampler) -> dict[str, Any]:
    """A sampler as its class path and arguments, which it keeps as attributes of the same names."""
    arguments = {key: getattr(sampler, key) for key in inspect.signature(type(sampler)).parameters}
    plain = {key: described(value) if isinstance(value, Sampler) else value for key, value in arguments.items()}
    return {"class_path": f"{type(sampler).__module__}.{type(sampler).__qualname__}", "init_args": plain}


def in_words(sampler: Sampler, denoiser: Denoiser) -> str:
    """A sampler as a protocol says it: ``Ancestral(steps=null, variance=beta, clip_x0=data [-1, 1])``."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['class_path'].rpartition('.')[2]}({words(value['init_args'])})"
        return clip_in_words(value, denoiser) if key == "clip_x0" else "null" if value is None else str(value)

    def words(arguments: dict[str, Any]) -> str:
        return ", ".join(f"{key}={word(key, value)}" for key, value in arguments.items())

    return word("", described(sampler))
