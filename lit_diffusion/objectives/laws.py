r"""Laws of t: the distributions of the time to which a training datum is noised.

A law maps uniform numbers to times. A law that is meant to reduce variance also returns its density relative to the law
whose expectation the loss is; the loss is divided by it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process


class TimeLaw(nn.Module, ABC):
    """A law ``p(t)`` of the times of training.

    A subclass implements :meth:`draw`; one that learns from the losses of every step also implements :meth:`learn`.
    """

    learns: bool = False
    """True where :meth:`learn` needs the losses of every step."""

    def check(self, process: Process) -> None:
        """Refuse a process without the law's times, before the first step.

        Raises:
            UserError: with the reason.
        """
        self.draw(torch.tensor([0.5]), process)

    @abstractmethod
    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """Times, and the density that the loss there is divided by.

        Args:
            u: uniform numbers in (0, 1), ``[B]``.
            process: the process of the times.

        Returns:
            Times, float64 ``[B]``, and the density of this law over that of the law whose expectation the loss is,
            float64 ``[B]``; None where it is that law itself.
        """

    def learn(self, t: Tensor, loss: Tensor) -> None:
        """Learn from the losses ``[B]`` of a whole step at times ``[B]``, in the batch's order; by default a no-op."""


class Levels(TimeLaw):
    """The uniform law of the process's grid points, NCSN's noise levels and DDPM's t.

    Song and Ermon 2019, https://arxiv.org/abs/1907.05600, eq. 6; Ho et al. 2020, https://arxiv.org/abs/2006.11239.
    """

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """Grid points of the process, all with the same probability."""
        grid = process.grid().to(u.device)
        return grid[(u.to(torch.float64) * len(grid)).long().clamp(max=len(grid) - 1)], None


class Uniform(TimeLaw):
    """The uniform law of t on ``[t_min, t_max]`` (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 7)."""

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """``t = t_min + (t_max - t_min) u``."""
        return process.t_min + (process.t_max - process.t_min) * u.to(torch.float64), None


def _log_snr_ends(process: Process, device: torch.device) -> tuple[Tensor, Tensor]:
    ends = process.log_snr(torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device=device))
    return ends[0], ends[1]


class LogUniform(TimeLaw):
    r"""A uniform law of the logarithm of the noise level, :math:`\log(\sigma / \alpha)`, over all of the process.

    (The VE column of Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1; in the time of
    :class:`~lit_diffusion.processes.VE` it is :class:`Uniform`.) :class:`Importance` draws the same times, and makes up
    for it.
    """

    def check(self, process: Process) -> None:
        """Refuse an infinite log-SNR, over which nothing is uniform."""
        if not bool(torch.stack(_log_snr_ends(process, torch.device("cpu"))).isfinite().all()):
            raise UserError(
                f"time_law: log_uniform is uniform in the log-SNR, which is infinite at the end of time of "
                f"{type(process).__name__}: set its t_max below 1, or choose uniform or logit_normal"
            )

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """Times that are uniform in the log-SNR."""
        start, end = _log_snr_ends(process, u.device)
        t = process.t_at_log_snr(start + (end - start) * u.to(torch.float64))
        return t.clamp(process.t_min, process.t_max), None


class Importance(LogUniform):
    r"""The law under which the likelihood-weighted loss has the least variance, with its importance weight.

    .. math::  p(t) \propto \frac{g^2}{\sigma^2} = -\frac{d \log SNR}{dt}

    for every linear SDE: uniform in the log-SNR (Song et al. 2021, "Maximum likelihood training",
    https://arxiv.org/abs/2101.09258, section 4.2). The expected loss is that of :class:`Uniform`.
    """

    def check(self, process: Process) -> None:
        """Refuse a process with a single noise level or an infinite log-SNR, where no such law exists."""
        if process.num_timesteps == 1:
            raise UserError("time_law: importance has nothing to choose from, this process has one noise level")
        if not bool(torch.stack(_log_snr_ends(process, torch.device("cpu"))).isfinite().all()):
            raise UserError(
                f"time_law: importance is uniform in the log-SNR, which is infinite at the largest time of "
                f"{type(process).__name__}: set its t_max below 1, or choose uniform or logit_normal"
            )

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """Times that are uniform in the log-SNR, and their density relative to the uniform law of t."""
        t, _ = super().draw(u, process)
        start, end = _log_snr_ends(process, u.device)
        span = process.t_max - process.t_min
        return t, span * (process.diffusion(t) / process.sigma(t)) ** 2 / (start - end)


class LogNormal(TimeLaw):
    r"""A normal law of the logarithm of the noise level, :math:`\log(\sigma / \alpha) \sim N(mean, std^2)`.

    (EDM: Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1.) Noise levels outside the process are moved to
    its ends.

    Args:
        mean: ``P_mean``; EDM's is -1.2 for data of standard deviation 0.5.
        std: ``P_std``; EDM's is 1.2.

    Raises:
        UserError: for a std that is not positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        _require_positive(std)
        self.mean, self.std = mean, std

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """The times of log-normal noise levels."""
        log_ratio = self.mean + self.std * torch.special.ndtri(u.to(torch.float64))
        return process.t_at_log_snr(-2.0 * log_ratio).clamp(process.t_min, process.t_max), None


class LogitNormal(TimeLaw):
    r"""A normal law of the logit of the time, :math:`\log \frac{t}{1 - t} \sim N(mean, std^2)`.

    (Esser et al. 2024, "Scaling rectified flow transformers", https://arxiv.org/abs/2403.03206, section 3.1.) Times
    outside the process are moved to its ends.

    Args:
        mean: the paper's m; above 0 it prefers noise.
        std: the paper's s.

    Raises:
        UserError: for a std that is not positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        _require_positive(std)
        self.mean, self.std = mean, std

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """``t = sigmoid(mean + std z)``, z standard normal."""
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.to(torch.float64)))
        return t.clamp(process.t_min, process.t_max), None


class SecondMoments(TimeLaw):
    r"""Grid points in proportion to the root of the second moment of their recent losses.

    .. math::  p_t \propto \sqrt{E[L_t^2]}

    over the last ten losses of each timestep, mixed with 0.001 of the uniform law, and uniform until every timestep has
    ten (Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 18 and section 3.3). The expected loss is that
    of :class:`Levels`, whose law it follows in evaluation mode, so that held-out losses are comparable. Its history is
    in the checkpoint.

    Args:
        num_timesteps: T.
        remembered: number of losses kept for each timestep.
        uniform_share: weight of the uniform law in the mixture.
    """

    learns = True
    history: Tensor
    counts: Tensor

    def __init__(self, num_timesteps: int, remembered: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("history", torch.zeros(num_timesteps, remembered, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Probabilities of the timesteps, from the least noise to the most: float64 ``[T]``."""
        num_timesteps, remembered = self.history.shape
        if bool((self.counts < remembered).any()):
            return torch.full_like(self.history[:, 0], 1.0 / num_timesteps)
        moments = self.history.square().mean(1).sqrt()
        share = self.uniform_share
        return (1.0 - share) * moments / moments.sum().clamp(min=1e-300) + share / num_timesteps

    def draw(self, u: Tensor, process: Process) -> tuple[Tensor, Tensor | None]:
        """Grid points, and T times their probabilities as the relative density."""
        if not self.training:
            return Levels().draw(u, process)
        probabilities = self.probabilities()
        cumulated = probabilities.cumsum(0)
        index = torch.searchsorted(cumulated, u.to(torch.float64) * cumulated[-1], right=True)
        index = index.clamp(max=len(probabilities) - 1)
        return process.grid().to(u.device)[index], len(probabilities) * probabilities[index]

    def learn(self, t: Tensor, loss: Tensor) -> None:
        """Add the losses to the history of their timesteps."""
        self.update((t * len(self.counts)).round().long() - 1, loss)

    @torch.no_grad()
    def update(self, index: Tensor, loss: Tensor) -> None:
        """Add the losses ``[B]`` of timestep indices ``[B]`` in their order; the oldest of a timestep goes first."""
        num_timesteps, remembered = self.history.shape
        order = torch.argsort(index, stable=True)
        index, loss = index[order], loss[order].to(self.history.dtype)
        arrived = torch.bincount(index, minlength=num_timesteps)
        # The rank of each among the losses of its timestep, in the order of arrival.
        place = torch.arange(len(index), device=index.device) - (arrived.cumsum(0) - arrived)[index]
        kept = place >= arrived[index] - remembered
        slot = (self.counts[index] + place) % remembered
        self.history[index[kept], slot[kept]] = loss[kept]
        self.counts += arrived


def _require_positive(std: float) -> None:
    if not 0.0 < std < math.inf:
        raise UserError(f"time_law: std is {std:g}; it must be positive")


LAWS: dict[str, type[TimeLaw]] = {
    "levels": Levels,
    "uniform": Uniform,
    "importance": Importance,
    "log_uniform": LogUniform,
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
}
"""Laws by name, with their default parameters: ``time_law: uniform``; one with other parameters is given by its class,
and so is :class:`SecondMoments`, which needs num_timesteps."""


def law_of(given: TimeLaw | str) -> TimeLaw:
    """The law that a configuration names or gives.

    Raises:
        UserError: for a name that is not in the table.
    """
    if isinstance(given, TimeLaw):
        return given
    require_choice("", "time_law", given, LAWS)
    return LAWS[given]()
