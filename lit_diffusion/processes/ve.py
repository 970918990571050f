"""The variance-exploding process of NCSN and of score-based SDEs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.processes.base import Process


class VE(Process):
    r"""Variance exploding: ``alpha = 1``, ``sigma(t) = sigma_min (sigma_max / sigma_min)^t`` for t > 0 and 0 at 0.

    With ``num_timesteps: L`` the grid is NCSN's geometric sequence,
    ``sigma(i/L) = sigma_min (sigma_max/sigma_min)^{(i-1)/(L-1)}`` for i = 1 .. L, so that both ends are exact (Song and
    Ermon 2019, https://arxiv.org/abs/1907.05600, section 4; Song et al. 2021, https://arxiv.org/abs/2011.13456,
    appendix C, here with ``sigma(0) = 0``).

    Args:
        sigma_min: the smallest noise level, in units of the normalized data.
        sigma_max: the largest noise level.
        num_timesteps: NCSN's L, or None for continuous time.
        t_min: the smallest time of training and of likelihoods in continuous time.
        t_min_sampling: the smallest time that SDE and ODE samplers visit in continuous time.

    Raises:
        UserError: unless ``0 < sigma_min < sigma_max`` (equal for a single noise level).
    """

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        num_timesteps: int | None = None,
        t_min: float = 1e-5,
        t_min_sampling: float = 1e-5,
    ) -> None:
        super().__init__(num_timesteps, t_min, t_min_sampling)
        single = num_timesteps == 1 and sigma_min == sigma_max
        if not (0.0 < sigma_min < sigma_max or (single and sigma_min > 0.0)):
            raise UserError(
                f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g}: noise levels need 0 < sigma_min < sigma_max"
            )
        if num_timesteps == 1 and not single:
            raise UserError(
                "one noise level has one sigma: give sigma_min and sigma_max the same value, or raise num_timesteps"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        # d log sigma / dt: on a grid the L - 1 ratios span the time from 1/L to 1.
        stretch = 1.0 if num_timesteps is None else num_timesteps / max(num_timesteps - 1, 1)
        self.log_slope = stretch * math.log(sigma_max / sigma_min)

    @property
    def prior_std(self) -> float:
        """``sigma(1)``, that is sigma_max."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """``alpha = 1``: the mean is the data."""
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma = sigma_max exp(-(1 - t) log_slope)``, and 0 at t = 0."""
        t = t.to(torch.float64)
        return torch.where(t > 0, self.sigma_max * torch.exp((t - 1.0) * self.log_slope), 0.0)

    def dalpha(self, t: Tensor) -> Tensor:
        """``d alpha / dt = 0``."""
        return torch.zeros_like(t, dtype=torch.float64)

    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt = sigma log_slope``."""
        return self.sigma(t) * self.log_slope

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """``t = 1 + (log sigma - log sigma_max) / log_slope`` with ``log sigma = -log_snr / 2``."""
        if self.log_slope == 0.0:
            return torch.ones_like(log_snr, dtype=torch.float64)
        return 1.0 + (-0.5 * log_snr.to(torch.float64) - math.log(self.sigma_max)) / self.log_slope
