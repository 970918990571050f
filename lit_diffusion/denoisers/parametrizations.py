r"""Parametrizations of a network's output, and encodings ``c_noise`` of the noise level: two tables.

A backbone's raw output F is one linear combination of the clean datum and the noise,

.. math::  F = u\, x_0 + v\, \epsilon, \qquad x_t = \alpha x_0 + \sigma \epsilon,

and ``(u, v)`` is all that distinguishes one parametrization from another: the rows of :data:`PARAMETRIZATIONS`. No row
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
        raise UserError(
            "parametrization 'mean' is DDPM's step to the previous timestep: the process needs num_timesteps"
        )
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
"""``(u, v)`` of ``F = u x_0 + v eps`` by name: ``eps`` the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239),
``score`` sigma times the score (NCSNv2: Song and Ermon 2020, https://arxiv.org/abs/2006.09011), ``raw_score`` the score
(NCSN: Song and Ermon 2019, https://arxiv.org/abs/1907.05600), ``x0`` the clean datum, ``v`` ``alpha eps - sigma x_0``
(Salimans and Ho 2022, https://arxiv.org/abs/2202.00512), ``velocity`` ``alpha' x_0 + sigma' eps`` (Lipman et al. 2023,
https://arxiv.org/abs/2210.02747), ``edm`` (Karras et al. 2022, https://arxiv.org/abs/2206.00364), ``mean`` DDPM's
posterior mean."""


def _index(process: Process, coefficients: Coefficients) -> Tensor:
    if process.num_timesteps is None:
        raise UserError("c_noise 'index' needs a process with num_timesteps; continuous time has no index")
    return (coefficients.t * process.num_timesteps - 1.0).clamp(0.0, process.num_timesteps - 1.0)


C_NOISE: dict[str, Callable[[Process, Coefficients], Tensor]] = {
    "index": _index,
    "log_sigma": lambda process, coefficients: torch.log(coefficients.sigma / coefficients.alpha),
    "log_half_sigma": lambda process, coefficients: torch.log(0.5 * coefficients.sigma / coefficients.alpha),
    "quarter_log_sigma": lambda process, coefficients: 0.25 * torch.log(coefficients.sigma / coefficients.alpha),
    "time": lambda process, coefficients: coefficients.t,
    "time_999": lambda process, coefficients: 999.0 * coefficients.t,
}
"""``c_noise`` by name, the encoding of the noise level that the backbone receives: ``index`` is DDPM's t - 1, from 0 to
num_timesteps - 1 on the grid and interpolated between its points; ``log_sigma`` is ``log(sigma / alpha)``,
``log_half_sigma`` ``log(sigma / (2 alpha))`` (the VE SDE in table 1 of Karras et al. 2022), ``quarter_log_sigma`` a
quarter of ``log_sigma`` (EDM), ``time`` t and ``time_999`` 999 t (score-SDE)."""
