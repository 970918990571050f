r"""Denoising score matching: the law of the noise level, the weight, the loss of one image.

.. math::  L(\theta) = E_{t}\, \lambda(t)\, E_{x_0, \epsilon}\,
           \Big\| s_\theta(\alpha x_0 + \sigma \epsilon, t) + \frac{\epsilon}{\sigma} \Big\|^2

(Vincent 2011, eq. 9; Song and Ermon 2019, eqs. 5 and 6). It is computed as ``lambda/sigma^2 |eps_theta - eps|^2``,
which is the same number without the division of two small ones. For each t its minimiser is the score of the smoothed
density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.objectives.base import Loss
from lit_diffusion.processes import Level, Process
from lit_diffusion.randomness import keyed_normal, keyed_uniform

TimeLaw = Literal["levels", "uniform", "importance"]
Weight = Literal["sigma2", "one", "g2"]
Reduction = Literal["half_sum", "mean"]


def _levels(u: Tensor, process: Process) -> Tensor:
    grid = process.grid().to(u.device)
    return grid[(u.to(torch.float64) * len(grid)).long().clamp(max=len(grid) - 1)]


def _uniform(u: Tensor, process: Process) -> Tensor:
    return process.t_min + (1.0 - process.t_min) * u.to(torch.float64)


def _log_snr_ends(process: Process, device: torch.device) -> tuple[Tensor, Tensor]:
    ends = process.log_snr(torch.tensor([process.t_min, 1.0], dtype=torch.float64, device=device))
    return ends[0], ends[1]


def _importance(u: Tensor, process: Process) -> Tensor:
    start, end = _log_snr_ends(process, u.device)
    return process.t_at_log_snr(start + (end - start) * u.to(torch.float64)).clamp(process.t_min, 1.0)


TIME_LAWS: dict[str, Callable[[Tensor, Process], Tensor]] = {
    "levels": _levels,
    "uniform": _uniform,
    "importance": _importance,
}
"""Times ``[B]`` from uniform numbers ``[B]``: ``levels`` picks a grid point, ``uniform`` any time from t_min to 1,
``importance`` has the density ``p(t) ~ g^2 / sigma^2``, under which the likelihood weighting has the least variance
(Song et al. 2021, "Maximum likelihood training", section 4.2). As ``g^2 / sigma^2 = -d log SNR / dt`` for every
linear SDE, it is uniform in the log-SNR, and the inverse of its distribution function is the process's own
``t_at_log_snr``."""


def _importance_density(t: Tensor, process: Process) -> Tensor:
    start, end = _log_snr_ends(process, t.device)
    return (1.0 - process.t_min) * (process.diffusion(t) / process.sigma(t)) ** 2 / (start - end)


RELATIVE_DENSITIES: dict[str, Callable[[Tensor, Process], Tensor] | None] = {
    "levels": None,
    "uniform": None,
    "importance": _importance_density,
}
"""The density of a law of t over that of the law whose expectation the loss is; None where it is that law itself."""

WEIGHTS: dict[str, Callable[[Process, Level], Tensor]] = {
    "sigma2": lambda process, level: level.sigma**2,
    "one": lambda process, level: torch.ones_like(level.sigma),
    "g2": lambda process, level: process.diffusion(level.t) ** 2,
}
"""``lambda(t)``: ``sigma2`` makes all levels weigh alike (NCSN, DDPM's simple loss), ``one`` is plain score matching,
``g2`` the likelihood weighting, with ``half_sum`` an upper bound of the negative log-likelihood in nats up to a
constant (Song et al. 2021, "Maximum likelihood training", theorem 1)."""


class DenoisingScoreMatching:
    """The objective above.

    Args:
        time_law: how t is drawn, a row of :data:`TIME_LAWS`.
        weight: ``lambda(t)``, a row of :data:`WEIGHTS`.
        reduction: over the dimensions of an image: ``half_sum`` (NCSN's and score-SDE's 1/2 norm^2) or ``mean``
            (DDPM's).

    Raises:
        UserError: for a name that is not one of these.
    """

    def __init__(self, time_law: TimeLaw, weight: Weight = "sigma2", reduction: Reduction = "half_sum") -> None:
        require_choice("", "time_law", time_law, TIME_LAWS)
        require_choice("", "weight", weight, WEIGHTS)
        require_choice("", "reduction", reduction, get_args(Reduction))
        self.time_law = time_law
        self.weight = weight
        self.reduction = reduction

    def check(self, process: Process) -> None:
        """Refuse a process that has not the times asked for, before the first step.

        Raises:
            UserError: for levels in continuous time, and for an importance of one level.
        """
        if self.time_law == "importance" and process.levels == 1:
            raise UserError("time_law: importance has nothing to choose from, this process has one noise level")
        TIME_LAWS[self.time_law](torch.tensor([0.5]), process)

    def __call__(self, denoiser: Denoiser, x0: Tensor, seed: int, index: Tensor, cond: Condition | None = None) -> Loss:
        """The loss of the images that are number ``index`` ``[B]`` of a run: their times and noise are keyed by it."""
        t = TIME_LAWS[self.time_law](keyed_uniform(seed, "time", index), denoiser.process)
        eps = keyed_normal(seed, "noise", index, tuple(x0.shape[1:]), dtype=x0.dtype)
        loss = self.at(denoiser, x0, t, eps, cond)
        density = RELATIVE_DENSITIES[self.time_law]
        if density is None:
            return loss
        weighted = loss.per_sample / density(t, denoiser.process).to(x0.dtype)
        return Loss(weighted, t, unweighted=loss.shown)

    def at(self, denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, cond: Condition | None = None) -> Loss:
        """The loss at given times ``[B]`` and noise, whatever the law of t."""
        prediction = denoiser(denoiser.process.perturb(x0, t, eps), t, cond)
        level = prediction.level
        error = (prediction.eps - eps).flatten(1).square()
        per_sample = 0.5 * error.sum(1) if self.reduction == "half_sum" else error.mean(1)
        weight = WEIGHTS[self.weight](denoiser.process, level) / level.sigma**2
        return Loss(per_sample * weight.to(per_sample.dtype), t)
