"""DDPM's discrete process, given by its betas, with the linear and the cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError
from lit_diffusion.processes.base import LogProcess


class Betas(LogProcess):
    r"""A discrete variance-preserving process given by its betas: ``abar_i = prod_{j <= i} (1 - beta_j)``.

    ``alpha(i/T) = sqrt(abar_i)`` and ``sigma(i/T) = sqrt(1 - abar_i)`` exactly; ``log abar`` is linear in t between the
    grid points (DDPM: Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 4).

    Args:
        betas: float64 ``[T]``, each in (0, 1); see :func:`linear_betas` and :func:`cosine_betas`.

    Raises:
        UserError: for a beta outside (0, 1).
    """

    log_alpha_bar: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__(num_timesteps=len(betas))
        betas = betas.to(torch.float64)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError("every beta must lie strictly between 0 and 1")
        # At t = 0 the product is empty: log 1. Not persistent: a checkpoint holds the configuration that gives them.
        table = torch.cat((torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)))
        self.register_buffer("log_alpha_bar", table, persistent=False)

    @property
    def prior_std(self) -> float:
        """``sigma(1)`` in the limit of no signal, 1."""
        return 1.0

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the left grid point of each time's cell, and the position inside the cell in [0, 1]."""
        assert self.num_timesteps is not None
        position = t.to(torch.float64) * self.num_timesteps
        # i/T * T may fall a rounding short of i: snap, so that grid points are exact.
        position = torch.where((position - position.round()).abs() < 1e-9, position.round(), position)
        left = (position.ceil().long() - 1).clamp(0, self.num_timesteps - 1)
        return left, position - left

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        left, fraction = self._cell(t)
        table = self.log_alpha_bar.to(t.device)
        start, end = table[left], table[left + 1]
        return torch.where(fraction == 1.0, end, start + fraction * (end - start))

    def _slope(self, t: Tensor) -> Tensor:
        assert self.num_timesteps is not None
        left, _ = self._cell(t)
        table = self.log_alpha_bar.to(t.device)
        return self.num_timesteps * (table[left + 1] - table[left])

    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha = log(abar) / 2``."""
        return 0.5 * self._log_alpha_bar(t)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma = sqrt(1 - abar)``."""
        return torch.sqrt(-torch.expm1(self._log_alpha_bar(t)))

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``f = (d log abar / dt) / 2``, half the slope of ``log abar`` in the cell that ends at or contains t."""
        return 0.5 * self._slope(t)

    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt = -abar (d log abar / dt) / (2 sigma)``."""
        return -0.5 * self._log_alpha_bar(t).exp() * self._slope(t) / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``g = sqrt(-d log abar / dt)``, also at t = 0."""
        return torch.sqrt(-self._slope(t))

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with ``log abar(t) = -log(1 + e^{-log_snr})``, by inverting the piecewise linear table."""
        assert self.num_timesteps is not None
        target = -nn.functional.softplus(-log_snr.to(torch.float64), threshold=700.0)
        table = self.log_alpha_bar.to(target.device)
        left = (torch.searchsorted(-table, -target) - 1).clamp(0, self.num_timesteps - 1)
        start, end = table[left], table[left + 1]
        return (left + (target - start) / (end - start)) / self.num_timesteps


def linear_betas(num_timesteps: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """DDPM's betas, linear from ``beta_1`` to ``beta_T``: float64 ``[num_timesteps]``.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 4.
    """
    return torch.linspace(beta_1, beta_T, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """The betas of ``abar(t) ~ cos^2(pi/2 (t + s)/(1 + s))``, clipped at ``beta_max``: float64 ``[num_timesteps]``.

    Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17; s is ``offset``.
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos(0.5 * math.pi * (t + offset) / (1.0 + offset)) ** 2
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)
