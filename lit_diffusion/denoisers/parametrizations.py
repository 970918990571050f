r"""What a network's output means, and what it is told of the noise level: the two tables.

A backbone's raw output F is one linear combination of what it must guess,

.. math::  F = u\, x_0 + v\, \epsilon, \qquad x_t = \alpha x_0 + \sigma \epsilon,

and ``(u, v)`` is all that tells one parametrization from another: they are the rows of :data:`PARAMETRIZATIONS`. No row
is singular and none cancels, where the same row in the form ``x_0 = c_skip x_t + c_out F`` divides by alpha or by
sigma; :class:`~lit_diffusion.denoisers.Prediction` derives that form, and every view, from ``(u, v)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.processes import Level, Process

Parametrization = Literal["eps", "score", "raw_score", "x0", "v", "velocity", "edm", "mean"]
NoiseInput = Literal["index", "log_sigma", "log_half_sigma", "quarter_log_sigma", "time", "time_999"]


def _edm(level: Level, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    root = torch.sqrt((level.alpha * sigma_data) ** 2 + level.sigma**2)
    return level.sigma / (sigma_data * root), -level.alpha * sigma_data / root


def _mean(level: Level, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    """DDPM's posterior mean ``E[x_{t-1} | x_t, x_0] = on_x0 x_0 + on_xt x_t`` (Ho et al. 2020, eq. 7)."""
    if process.levels is None:
        raise UserError("parametrization 'mean' is DDPM's step to the level below: the process needs levels")
    step = process.transition((level.t - 1.0 / process.levels).clamp(min=0.0), level.t)
    return step.on_x0 + step.on_xt * level.alpha, step.on_xt * level.sigma


PARAMETRIZATIONS: dict[str, Callable[[Level, Process, float], tuple[Tensor, Tensor]]] = {
    "eps": lambda level, process, sd: (torch.zeros_like(level.t), torch.ones_like(level.t)),
    "score": lambda level, process, sd: (torch.zeros_like(level.t), -torch.ones_like(level.t)),
    "raw_score": lambda level, process, sd: (torch.zeros_like(level.t), -1.0 / level.sigma),
    "x0": lambda level, process, sd: (torch.ones_like(level.t), torch.zeros_like(level.t)),
    "v": lambda level, process, sd: (-level.sigma, level.alpha),
    "velocity": lambda level, process, sd: (level.dalpha, level.dsigma),
    "edm": _edm,
    "mean": _mean,
}
"""``(u, v)`` of ``F = u x_0 + v eps`` by name: ``score`` is NCSNv2's ``F = sigma score``, ``raw_score`` NCSN's
``F = score``, ``v`` Salimans and Ho's ``alpha eps - sigma x_0``, ``edm`` Karras et al. 2022, ``mean`` DDPM's posterior
mean."""


def _index(process: Process, level: Level) -> Tensor:
    if process.levels is None:
        raise UserError("noise_input 'index' needs a process with levels; continuous time has no index")
    return (level.t * process.levels - 1.0).clamp(0.0, process.levels - 1.0)


NOISE_INPUTS: dict[str, Callable[[Process, Level], Tensor]] = {
    "index": _index,
    "log_sigma": lambda process, level: torch.log(level.sigma / level.alpha),
    "log_half_sigma": lambda process, level: torch.log(0.5 * level.sigma / level.alpha),
    "quarter_log_sigma": lambda process, level: 0.25 * torch.log(level.sigma / level.alpha),
    "time": lambda process, level: level.t,
    "time_999": lambda process, level: 999.0 * level.t,
}
"""``c_noise`` by name: what the backbone is told of the noise level. ``index`` is DDPM's t - 1, 0 .. levels - 1 on the
grid and interpolated between its points; no time is told as another than these. ``log_half_sigma`` is the VE SDE's and
``quarter_log_sigma`` EDM's in table 1 of Karras et al. 2022."""
