"""What every sampler is: a walk from the prior to the data, one ``step`` at a time, seeing only a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.backbones.base import Condition
from lit_diffusion.denoisers import Denoiser, Prediction
from lit_diffusion.processes import Process
from lit_diffusion.randomness import SampleNoise


@dataclass(frozen=True)
class Progress:
    """Where a sampler is, for a progress bar or a trajectory.

    Attributes:
        step: steps done.
        total: steps in all.
        t: the time of the step just done.
        x: the state after it, ``[B, ...]``.
    """

    step: int
    total: int
    t: float
    x: Tensor


OnStep = Callable[[Progress], None]


class CountedDenoiser(Denoiser):
    """A denoiser that counts its evaluations."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.evaluations = 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        """Evaluate and count."""
        self.evaluations += 1
        return self.denoiser(x_t, t, cond)


class Sampler(ABC):
    """A walk from noise to data.

    A subclass says which steps there are (:meth:`plan`, one entry a step with at least the time) and makes one
    (:meth:`step`). The state is float32 or better whatever the backbone computes in.

    Attributes:
        evaluations: network evaluations of each sample in the last call of :meth:`sample`.
    """

    evaluations: int = 0

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027 (most samplers walk on any denoiser)
        """Refuse, before any work, a denoiser that this sampler cannot walk on.

        Raises:
            UserError: with the reason.
        """

    def start(self, process: Process, noise: SampleNoise) -> Tensor:
        """The first state, by default from the prior ``N(0, sigma(1)^2 I)``."""
        return process.prior_std * noise.normal()

    @abstractmethod
    def plan(self, process: Process) -> list[Any]:
        """What each step needs, in order; each entry has an attribute ``t``."""

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, move: Any, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """The state after one step: ``[B, ...]`` like x."""

    def finish(self, denoiser: Denoiser, x: Tensor, cond: Condition | None) -> Tensor:
        """What remains after the last step, by default nothing."""
        return x

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, noise: SampleNoise, cond: Condition | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Samples ``[B, *noise.shape]``.

        Args:
            denoiser: the model.
            noise: says which samples these are and gives each its own numbers.
            cond: the condition, ``[B]`` rows.
            on_step: called after every step.

        Raises:
            UserError: where the sampler does not fit the denoiser.
        """
        self.check(denoiser)
        counted = CountedDenoiser(denoiser)
        plan = self.plan(denoiser.process)
        x = self.start(denoiser.process, noise)
        for done, move in enumerate(plan, start=1):
            x = self.step(counted, x, move, noise, cond)
            if on_step is not None:
                on_step(Progress(done, len(plan), move.t, x))
        x = self.finish(counted, x, cond)
        self.evaluations = counted.evaluations
        return x


def at_time(x: Tensor, t: float) -> Tensor:
    """One time for every row of x: float64 ``[B]``."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)
