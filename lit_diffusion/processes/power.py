"""The variance-exploding process whose noise level is a power of time, of EDM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.processes.base import Process


class PowerVE(Process):
    r"""Variance exploding by a power of time: ``alpha = 1``, ``sigma(t) = sigma_max t^power``.

    With the power 1 time is the noise level, and the probability-flow ODE is ``dx/dsigma = (x - D(x; sigma)) / sigma``,
    a step of which straight to 0 is the denoised datum: EDM's schedule. With 1/2 time is the variance, as of the
    variance-exploding SDE (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1 and section 3). The paper's
    time is this one times ``sigma_max^(1 / power)``. Give its samplers the spacing ``karras`` or ``log_snr``: of equal
    steps in this time the last few would have to take off nearly all of the noise.

    Args:
        sigma_min: the smallest noise level of training and of sampling, in units of the normalized data.
        sigma_max: the largest noise level, the standard deviation of the prior.
        power: the exponent of the time.

    Raises:
        UserError: unless ``0 < sigma_min < sigma_max``, and for a power that is not positive or so small that the time
            of sigma_min is none.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, power: float = 1.0) -> None:
        if not 0.0 < sigma_min < sigma_max < math.inf:
            raise UserError(
                f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g}: the levels need 0 < sigma_min < sigma_max"
            )
        if not 0.0 < power < math.inf:
            raise UserError(f"power is {power:g}; it must be positive: 1 for EDM's schedule, 0.5 for the VE SDE's")
        t_min = (sigma_min / sigma_max) ** (1.0 / power)
        if t_min < 1e-12:
            raise UserError(f"power is {power:g}; the time of sigma_min would be {t_min:g}, below 1e-12: raise power")
        super().__init__(None, t_min, t_min)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.power = power

    @property
    def prior_std(self) -> float:
        """``sigma_max``."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """1: the mean is the data."""
        return torch.ones_like(t, dtype=torch.float64)

    def dalpha(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma_max t^power``."""
        return self.sigma_max * t.to(torch.float64) ** self.power

    def dsigma(self, t: Tensor) -> Tensor:
        """``sigma_max power t^(power - 1)``."""
        return self.sigma_max * self.power * t.to(torch.float64) ** (self.power - 1.0)

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """``t = (sigma / sigma_max)^(1 / power)`` with ``log sigma = -log_snr / 2``."""
        log_sigma = -0.5 * log_snr.to(torch.float64)
        return torch.exp((log_sigma - math.log(self.sigma_max)) / self.power)
