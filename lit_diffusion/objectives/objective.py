"""The interface of every objective of a denoiser: a law of t, the noise and its pairing, the loss of each datum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.objectives.base import Loss
from lit_diffusion.objectives.laws import TimeLaw
from lit_diffusion.processes import Process
from lit_diffusion.randomness import keyed_normal, keyed_uniform


class Objective(nn.Module, ABC):
    r"""A loss over noise levels, :math:`E_{t \sim p}\, E_{x_0, \epsilon}\, \ell(x_0, t, \epsilon)`.

    A subclass says the loss of each datum at given times and noise (:meth:`at`).

    Args:
        time_law: how t is drawn.
    """

    def __init__(self, time_law: TimeLaw) -> None:
        super().__init__()
        self.time_law = time_law

    def check(self, process: Process) -> None:
        """Refuse a process that does not have the times asked for, before the first step.

        Raises:
            UserError: with the reason.
        """
        self.time_law.check(process)

    def noise(self, x0: Tensor, seed: int, index: Tensor) -> Tensor:
        """The noise of the data that are number ``index`` ``[B]`` of a run: ``[B, ...]`` like x0."""
        return keyed_normal(seed, "noise", index, tuple(x0.shape[1:]), dtype=x0.dtype)

    @property
    def couples(self) -> bool:
        """Whether it pairs noise with data, by a :meth:`couple` of its own."""
        return type(self).couple is not Objective.couple

    def couple(self, x0: Tensor, eps: Tensor, cond: Condition | None = None) -> Tensor:
        """The noise paired with each datum, a permutation of the given; by default as it is given.

        An objective that pairs noise with data overrides it. The training step calls it once with the global batch, the
        rows of all processes, before that is split: what it returns is given to :meth:`forward` part by part. All
        processes call it and must find the same. Held-out data have their own noise.

        Args:
            x0: the data ``[N, ...]``.
            eps: the noise keyed to them, ``[N, ...]``.
            cond: their condition, ``[N]`` rows; no labels where the model is not told them.
        """
        return eps

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        seed: int,
        index: Tensor,
        cond: Condition | None = None,
        grey_levels: GreyLevels | None = None,
        eps: Tensor | None = None,
    ) -> Loss:
        """The loss of the data that are number ``index`` ``[B]`` of a run: their times and noise are keyed by it.

        Where the law of t learns, its ``kept`` are the times and the losses there, for :meth:`TimeLaw.learn`.

        Args:
            denoiser: the model.
            x0: the data ``[B, ...]``.
            seed: of the run.
            index: int64 ``[B]``.
            cond: the condition, ``[B]`` rows.
            grey_levels: of the data; None for points.
            eps: the noise paired with them, see :meth:`couple`; None: their own.
        """
        t, density = self.time_law.draw(keyed_uniform(seed, "time", index), denoiser.process)
        eps = self.noise(x0, seed, index) if eps is None else eps
        loss = self.at(denoiser, x0, t, eps, cond, grey_levels)
        if self.time_law.learns and self.training:
            loss = replace(loss, kept={**loss.kept, "t": t, "loss": loss.shown})
        if density is None:
            return loss
        return replace(loss, per_sample=loss.per_sample / density.to(x0.dtype), unweighted=loss.shown)

    @abstractmethod
    def at(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Condition | None = None,
        grey_levels: GreyLevels | None = None,
    ) -> Loss:
        """The loss at given times ``[B]`` and noise ``[B, ...]``, whatever the law of t."""
