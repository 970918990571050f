"""The interface of a denoiser's objective: a law of t, the noise and its coupling, the loss of each datum."""

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

    A subclass implements the loss of each datum at given times and noise (:meth:`at`).

    Args:
        time_law: the law p of t.
    """

    def __init__(self, time_law: TimeLaw) -> None:
        super().__init__()
        self.time_law = time_law

    def check(self, process: Process) -> None:
        """Refuse a process without the law's times, before the first step.

        Raises:
            UserError: with the reason.
        """
        self.time_law.check(process)

    def noise(self, x0: Tensor, seed: int, index: Tensor) -> Tensor:
        """The noise of the run's data number ``index`` ``[B]``: ``[B, ...]`` like x0."""
        return keyed_normal(seed, "noise", index, tuple(x0.shape[1:]), dtype=x0.dtype)

    @property
    def couples(self) -> bool:
        """True where it pairs noise with data, by a :meth:`couple` of its own."""
        return type(self).couple is not Objective.couple

    def couple(self, x0: Tensor, eps: Tensor, cond: Condition | None = None) -> Tensor:
        """The noise coupled with each datum, a permutation of the given noise; by default the given order.

        An objective that couples noise with data overrides it. The training step calls it once with the global batch,
        the rows of all processes, before the batch is split; :meth:`forward` receives the result part by part. All
        processes call it and must find the same. Held-out data have their own noise.

        Args:
            x0: the data ``[N, ...]``.
            eps: the noise keyed to the data, ``[N, ...]``.
            cond: the condition, ``[N]`` rows; without labels where the model is not class-conditional.
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
        """The loss of the run's data number ``index`` ``[B]``, whose times and noise are keyed by that number.

        Where the law of t learns, the loss keeps the times and losses for :meth:`TimeLaw.learn`.

        Args:
            denoiser: the model.
            x0: the data ``[B, ...]``.
            seed: the run's seed.
            index: the data's numbers in the run, int64 ``[B]``.
            cond: the condition, ``[B]`` rows.
            grey_levels: the data's grey levels; None for points.
            eps: the noise coupled with the data, see :meth:`couple`; None: the noise of :meth:`noise`.
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
