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
from lit_diffusion.processes import Coefficients, Process

Parametrization = Literal["eps", "score", "raw_score", "x0", "v", "velocity", "edm", "mean"]
CNoise = Literal["index", "log_sigma", "log_half_sigma", "quarter_log_sigma", "time", "time_999"]


def _edm(coefficients: Coefficients, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    root = torch.sqrt((coefficients.alpha * sigma_data) ** 2 + coefficients.sigma**2)
    return coefficients.sigma / (sigma_data * root), -coefficients.alpha * sigma_data / root


def _mean(coefficients: Coefficients, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    """DDPM's posterior mean ``E[x_{t-1} | x_t, x_0]``, linear in x_0 and x_t (Ho et al. 2020, eq. 7)."""
    if process.num_timesteps is None:
        raise UserError("parametrization 'mean' is DDPM's step to the level below: the process needs levels")
    step = process.transition((coefficients.t - 1.0 / process.num_timesteps).clamp(min=0.0), coefficients.t)
    return step.x0_coefficient + step.xt_coefficient * coefficients.alpha, step.xt_coefficient * coefficients.sigma


PARAMETRIZATIONS: dict[str, Callable[[Coefficients, Process, float], tuple[Tensor, Tensor]]] = {
    "eps": lambda coefficients, process, sd: (torch.zeros_like(coefficients.t), torch.ones_like(coefficients.t)),
    "score": lambda coefficients, process, sd: (torch.zeros_like(coefficients.t), -torch.ones_like(coefficients.t)),
    "raw_score": lambda coefficients, process, sd: (torch.zeros_like(coefficients.t), -1.0 / coefficients.sigma),
    "x0": lambda coefficients, process, sd: (torch.ones_like(coefficients.t), torch.zeros_like(coefficients.t)),
    "v": lambda coefficients, process, sd: (-coefficients.sigma, coefficients.alpha),
    "velocity": lambda coefficients, process, sd: (coefficients.dalpha, coefficients.dsigma),
    "edm": _edm,
    "mean": _mean,
}
"""``(u, v)`` of ``F = u x_0 + v eps`` by name: ``score`` is NCSNv2's ``F = sigma score``, ``raw_score`` NCSN's
``F = score``, ``v`` Salimans and Ho's ``alpha eps - sigma x_0``, ``edm`` Karras et al. 2022, ``mean`` DDPM's posterior
mean."""


def _index(process: Process, coefficients: Coefficients) -> Tensor:
    if process.num_timesteps is None:
        raise UserError("c_noise 'index' needs a process with levels; continuous time has no index")
    return (coefficients.t * process.num_timesteps - 1.0).clamp(0.0, process.num_timesteps - 1.0)


C_NOISE: dict[str, Callable[[Process, Coefficients], Tensor]] = {
    "index": _index,
    "log_sigma": lambda process, coefficients: torch.log(coefficients.sigma / coefficients.alpha),
    "log_half_sigma": lambda process, coefficients: torch.log(0.5 * coefficients.sigma / coefficients.alpha),
    "quarter_log_sigma": lambda process, coefficients: 0.25 * torch.log(coefficients.sigma / coefficients.alpha),
    "time": lambda process, coefficients: coefficients.t,
    "time_999": lambda process, coefficients: 999.0 * coefficients.t,
}
"""``c_noise`` by name: what the backbone is told of the noise level. ``index`` is DDPM's t - 1, 0 .. levels - 1 on the
grid and interpolated between its points; no time is told as another than these. ``log_half_sigma`` is the VE SDE's and
``quarter_log_sigma`` EDM's in table 1 of Karras et al. 2022."""
