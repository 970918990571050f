"""The variance-preserving and the sub-VP process of score-based SDEs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError
from lit_diffusion.processes.base import LogProcess


class VP(LogProcess):
    r"""Variance preserving: ``alpha = e^{-B/2}``, ``sigma^2 = 1 - e^{-B}``.

    ``B(t) = beta_min t + (beta_max - beta_min) t^2/2``; the SDE is ``dx = -beta(t) x/2 dt + sqrt(beta(t)) dw`` (Song et
    al. 2021, https://arxiv.org/abs/2011.13456, appendix C).

    Args:
        beta_min: ``beta(0)``.
        beta_max: ``beta(1)``.
        t_min: the smallest time of training and of likelihoods.
        t_min_sampling: the smallest time that SDE and ODE samplers visit.

    Raises:
        UserError: unless ``0 < beta_min < beta_max``.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5, t_min_sampling: float = 1e-3
    ) -> None:
        super().__init__(None, t_min, t_min_sampling)
        if not 0.0 < beta_min < beta_max:
            raise UserError(f"beta_min {beta_min:g} and beta_max {beta_max:g}: need 0 < beta_min < beta_max")
        self.beta_min = beta_min
        self.beta_max = beta_max

    @property
    def prior_std(self) -> float:
        """``sigma(1)`` in the limit of no signal, 1."""
        return 1.0

    def beta(self, t: Tensor) -> Tensor:
        """``beta(t)``, the rate of the SDE."""
        return self.beta_min + (self.beta_max - self.beta_min) * t.to(torch.float64)

    def integral(self, t: Tensor) -> Tensor:
        """``B(t)``, the integral of beta from 0 to t."""
        t = t.to(torch.float64)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def t_at_integral(self, integral: Tensor) -> Tensor:
        """The inverse of :meth:`integral`, by the root of the quadratic that does not cancel."""
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * integral))

    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha = -B/2``."""
        return -0.5 * self.integral(t)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma = sqrt(1 - e^{-B})``."""
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``f = -beta/2``."""
        return -0.5 * self.beta(t)

    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt = beta e^{-B} / (2 sigma)``."""
        return 0.5 * self.beta(t) * torch.exp(-self.integral(t)) / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``g = sqrt(beta)``, also at t = 0, where the general formula is 0 times infinity."""
        return self.beta(t).sqrt()

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with ``log_snr = -log(e^B - 1)``."""
        return self.t_at_integral(nn.functional.softplus(-log_snr.to(torch.float64), threshold=700.0))


class SubVP(VP):
    """Sub-VP: ``alpha = e^{-B/2}``, ``sigma = 1 - e^{-B}``, never noisier than :class:`VP`.

    Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix C; arguments as for :class:`VP`.
    """

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma = 1 - e^{-B}``."""
        return -torch.expm1(-self.integral(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt = beta e^{-B}``."""
        return self.beta(t) * torch.exp(-self.integral(t))

    def diffusion(self, t: Tensor) -> Tensor:
        """``g = sqrt(beta (1 - e^{-2B}))``."""
        return torch.sqrt(-self.beta(t) * torch.expm1(-2.0 * self.integral(t)))

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with ``1 - u^2 = k u``, ``u = e^{-B/2}``, ``k = e^{-log_snr/2}``: ``u = 2 / (k + sqrt(k^2 + 4))``."""
        k = torch.exp(-0.5 * log_snr.to(torch.float64))
        # 1 - u from 1 - u = k u / (1 + u) keeps its digits where u is near 1.
        u = 2.0 / (k + torch.sqrt(k**2 + 4.0))
        return self.t_at_integral(-2.0 * torch.log1p(-k * u / (1.0 + u)))
