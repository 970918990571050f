r"""Forward noising processes ``q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)``, t in [0, 1], t = 0 the data.

Each is a linear SDE ``dx = f(t) x dt + g(t) dw`` with

.. math::  f = \frac{d \log\alpha}{dt}, \qquad g^2 = \frac{d\sigma^2}{dt} - 2 f \sigma^2

(the moment equations of a linear SDE: Särkkä and Solin 2019, section 5.5; the kernels are in Song et al. 2021,
"Score-based generative modeling through SDEs", appendix B). All of this is computed in float64 whatever
the state's type, because the ratios of small levels are what samplers divide by.

A discrete method is the same process read on a grid ``t_i = i / levels``, ``i = 1 .. levels``: NCSN's L levels and
DDPM's T betas are exact at their points, and interpolated in between.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_diffusion.errors import UserError


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient ``[B]`` as ``[B, 1, ...]`` in x's type, ready to multiply x."""
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Transition:
    r"""The steps between two times ``s < t``, float64 ``[B]`` each.

    .. math::
        q(x_t | x_s) &= N(a\, x_s, \beta I), \quad a = \alpha_t / \alpha_s, \quad
        \beta = \sigma_t^2 - a^2 \sigma_s^2 \\
        q(x_s | x_t, x_0) &= N(c_0 x_0 + c_t x_t, \tilde\beta I), \quad c_0 = \alpha_s \beta / \sigma_t^2, \quad
        c_t = a \sigma_s^2 / \sigma_t^2, \quad \tilde\beta = \beta \sigma_s^2 / \sigma_t^2

    On DDPM's grid these are its ``beta_t``, ``sqrt(alpha_t)`` and the posterior's mean and variance (Ho et al. 2020,
    eqs. 2, 6 and 7).

    Attributes:
        scale: ``a``, of the mean of the forward step.
        beta: variance of the forward step.
        on_x0: ``c_0``.
        on_xt: ``c_t``.
        beta_tilde: variance of the posterior; 0 where s is 0.
    """

    scale: Tensor
    beta: Tensor
    on_x0: Tensor
    on_xt: Tensor
    beta_tilde: Tensor


@dataclass(frozen=True)
class Level:
    """The coefficients of a process at times ``[B]``, float64.

    Attributes:
        t: the times.
        alpha: of the mean, ``alpha(t)``.
        sigma: standard deviation of the noise, ``sigma(t)``.
        dalpha: ``d alpha / dt``.
        dsigma: ``d sigma / dt``.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


class Process(nn.Module, ABC):
    """A forward noising process.

    Args:
        levels: the number of grid points of a discrete method, None for continuous time.
        t_min: the smallest time of training and of likelihoods in continuous time; on a grid it is the first grid
            point. At t = 0 itself the score of data on a grid of grey levels is unbounded.
        t_min_sampling: the smallest time that SDE and ODE samplers visit, ``t_min`` if that is larger: below it nothing
            was learned; on a grid it is the first grid point.
    """

    def __init__(self, levels: int | None = None, t_min: float = 1e-5, t_min_sampling: float = 1e-5) -> None:
        super().__init__()
        if levels is not None and levels < 1:
            raise UserError(f"levels is {levels}; a process needs at least one noise level")
        for key, value in (("t_min", t_min), ("t_min_sampling", t_min_sampling)):
            if not 0.0 < value < 1.0:
                raise UserError(f"{key} is {value:g}; it must lie strictly between 0 and 1, where the score is finite")
        self.levels = levels
        self.t_min = t_min if levels is None else 1.0 / levels
        self.t_min_sampling = max(t_min, t_min_sampling) if levels is None else 1.0 / levels

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha(t)`` for t in [0, 1], float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """``sigma(t)`` for t in [0, 1], float64; 0 at t = 0."""

    @abstractmethod
    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``f(t) = d log alpha / dt`` for t in (0, 1]."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt`` for t in (0, 1]."""

    @abstractmethod
    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the prior ``N(0, prior_std^2 I)`` from which sampling starts."""

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior at ``[B, ...]``: float64 ``[B]``, in nats."""
        scaled = x.flatten(1).to(torch.float64) / self.prior_std
        dimension = scaled.shape[1]
        return -0.5 * scaled.square().sum(1) - dimension * (0.5 * LOG_2PI + math.log(self.prior_std))

    def alpha(self, t: Tensor) -> Tensor:
        """``alpha(t)``, float64."""
        return self.log_alpha(t).exp()

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``, decreasing in t."""
        return 2.0 * (self.log_alpha(t) - self.sigma(t).log())

    def t_at_sigma(self, sigma: float) -> float:
        """The time at which the noise-to-signal ratio ``sigma / alpha`` is the given one.

        Raises:
            UserError: if the process does not have that ratio from its smallest time to 1.
        """

        def ratio(t: float) -> float:
            return math.exp(-0.5 * float(self.log_snr(torch.tensor(t, dtype=torch.float64))))

        if sigma > 0.0:
            t = float(self.t_at_log_snr(torch.tensor(-2.0 * math.log(sigma), dtype=torch.float64)))
            # Both ends belong to the process, whichever way they were rounded.
            t = min(max(t, 1e-12 if self.levels is None else self.t_min), 1.0)
            # In continuous time the smallest level may be the limit at 0, as good as that at the smallest time.
            if abs(ratio(t) / sigma - 1.0) < 1e-6 and ratio(self.t_min) < 1.001 * sigma:
                return t
        raise UserError(
            f"noise level {sigma:g} is outside this process, whose levels run from {ratio(self.t_min):g} "
            f"(at its smallest time) to {ratio(1.0):g}"
        )

    def require_time(self, key: str, t: float) -> None:
        """Refuse a time that no network learns on this process.

        Args:
            key: that gives the time, for the message.
            t: the time.

        Raises:
            UserError: unless ``t_min <= t < 1``; on a grid t_min is the first grid point.
        """
        if not self.t_min * (1.0 - 1e-9) <= t < 1.0:
            where = "" if self.levels is None else f", the first of its {self.levels} levels"
            raise UserError(
                f"{key} is {t:g}; this model knows the times from {self.t_min:g}{where}, to 1: give one of them below 1"
            )

    def drift(self, t: Tensor) -> Tensor:
        """``f(t)`` of the SDE ``dx = f(t) x dt + g(t) dw``."""
        return self.dlog_alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``g(t)`` of the SDE ``dx = f(t) x dt + g(t) dw``."""
        sigma = self.sigma(t)
        return (2.0 * sigma * (self.dsigma(t) - self.dlog_alpha(t) * sigma)).clamp(min=0.0).sqrt()

    def level(self, t: Tensor) -> Level:
        """All coefficients at times ``[B]`` at once."""
        t = t.to(torch.float64)
        alpha = self.alpha(t)
        return Level(t, alpha, self.sigma(t), alpha * self.dlog_alpha(t), self.dsigma(t))

    def transition(self, s: Tensor, t: Tensor) -> Transition:
        """What happens between times ``s < t``, ``[B]`` each; s may be 0."""
        s, t = s.to(torch.float64), t.to(torch.float64)
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        variance_s, variance_t = self.sigma(s) ** 2, self.sigma(t) ** 2
        # SNR_t / SNR_s; the share of noise that is new is 1 minus it, taken without cancellation.
        log_ratio = self.log_snr(t) - self.log_snr(s)
        fresh = -torch.expm1(log_ratio)
        return Transition(
            scale=alpha_t / alpha_s,
            beta=variance_t * fresh,
            on_x0=alpha_s * fresh,
            on_xt=alpha_t / alpha_s * variance_s / variance_t,
            beta_tilde=variance_s * fresh,
        )

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """``x_t = alpha(t) x_0 + sigma(t) eps``; x0 and eps ``[B, ...]``, t ``[B]``."""
        return expand_like(self.alpha(t), x0) * x0 + expand_like(self.sigma(t), x0) * eps

    def grid(self) -> Tensor:
        """The times of a discrete method, ``i / levels`` for i = 1 .. levels: float64 ``[levels]``, rising.

        Raises:
            UserError: for a process in continuous time, which has no grid of its own.
        """
        if self.levels is None:
            raise UserError("this process is in continuous time: give the number of levels to visit")
        return torch.arange(1, self.levels + 1, dtype=torch.float64) / self.levels

    def level_index(self, t: Tensor) -> Tensor:
        """The grid index ``0 .. levels - 1`` (0 the least noise) nearest to times ``[B]``: int64 ``[B]``."""
        if self.levels is None:
            raise UserError("noise_input 'index' needs a process with levels; continuous time has no index")
        return ((t.to(torch.float64) * self.levels).round().long() - 1).clamp(0, self.levels - 1)


class VE(Process):
    r"""Variance exploding: ``alpha = 1``, ``sigma(t) = sigma_min (sigma_max / sigma_min)^t`` for t > 0 and 0 at 0.

    With ``levels: L`` the grid is NCSN's geometric sequence,
    ``sigma(i/L) = sigma_min (sigma_max/sigma_min)^{(i-1)/(L-1)}`` for i = 1 .. L, so that both ends are exact (Song and
    Ermon 2019, section 4; Song et al. 2021, appendix C, with the courses' ``sigma(0) = 0``).

    Args:
        sigma_min: the smallest level, in units of the normalised data.
        sigma_max: the largest level.
        levels: L of NCSN, or None for continuous time.
        t_min: the smallest time of training and of likelihoods in continuous time.
        t_min_sampling: the smallest time that SDE and ODE samplers visit in continuous time.

    Raises:
        UserError: unless ``0 < sigma_min < sigma_max`` (equal for a single level).
    """

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        levels: int | None = None,
        t_min: float = 1e-5,
        t_min_sampling: float = 1e-5,
    ) -> None:
        super().__init__(levels, t_min, t_min_sampling)
        single = levels == 1 and sigma_min == sigma_max
        if not (0.0 < sigma_min < sigma_max or (single and sigma_min > 0.0)):
            raise UserError(
                f"sigma_min {sigma_min:g} and sigma_max {sigma_max:g}: the levels need 0 < sigma_min < sigma_max"
            )
        if levels == 1 and not single:
            raise UserError("one level has one sigma: give sigma_min and sigma_max the same value, or more levels")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        # d log sigma / dt: on a grid the L - 1 ratios span the time from 1/L to 1.
        stretch = 1.0 if levels is None else levels / max(levels - 1, 1)
        self.log_slope = stretch * math.log(sigma_max / sigma_min)

    @property
    def prior_std(self) -> float:
        """``sigma_max``."""
        return self.sigma_max

    def log_alpha(self, t: Tensor) -> Tensor:
        """0: the mean is the data."""
        return torch.zeros_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma_max exp(-(1 - t) log_slope)``, 0 at 0."""
        t = t.to(torch.float64)
        return torch.where(t > 0, self.sigma_max * torch.exp((t - 1.0) * self.log_slope), 0.0)

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t, dtype=torch.float64)

    def dsigma(self, t: Tensor) -> Tensor:
        """``sigma log_slope``."""
        return self.sigma(t) * self.log_slope

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """``t = 1 + (log sigma - log sigma_max) / log_slope`` with ``log sigma = -log_snr / 2``."""
        if self.log_slope == 0.0:
            return torch.ones_like(log_snr, dtype=torch.float64)
        return 1.0 + (-0.5 * log_snr.to(torch.float64) - math.log(self.sigma_max)) / self.log_slope


class VP(Process):
    r"""Variance preserving: ``alpha = e^{-B/2}``, ``sigma^2 = 1 - e^{-B}``.

    ``B(t) = beta_min t + (beta_max - beta_min) t^2/2`` (Song et al. 2021, appendix C); the SDE is
    ``dx = -beta(t) x/2 dt + sqrt(beta(t)) dw``.

    Args:
        beta_min: ``beta(0)``.
        beta_max: ``beta(1)``.
        t_min: the smallest time of training and of likelihoods.
        t_min_sampling: the smallest time that SDE and ODE samplers visit.
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
        """1."""
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
        """``-B/2``."""
        return -0.5 * self.integral(t)

    def sigma(self, t: Tensor) -> Tensor:
        """``sqrt(1 - e^{-B})``."""
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``-beta/2``."""
        return -0.5 * self.beta(t)

    def dsigma(self, t: Tensor) -> Tensor:
        """``beta e^{-B} / (2 sigma)``."""
        return 0.5 * self.beta(t) * torch.exp(-self.integral(t)) / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``sqrt(beta)``, also at t = 0, where the general formula is 0 times infinity."""
        return self.beta(t).sqrt()

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """From ``log_snr = -log(e^B - 1)``."""
        return self.t_at_integral(nn.functional.softplus(-log_snr.to(torch.float64), threshold=700.0))


class SubVP(VP):
    r"""Sub-VP: ``alpha = e^{-B/2}``, ``sigma = 1 - e^{-B}``, never noisier than VP (Song et al. 2021,
    appendix C)."""

    def sigma(self, t: Tensor) -> Tensor:
        """``1 - e^{-B}``."""
        return -torch.expm1(-self.integral(t))

    def dsigma(self, t: Tensor) -> Tensor:
        """``beta e^{-B}``."""
        return self.beta(t) * torch.exp(-self.integral(t))

    def diffusion(self, t: Tensor) -> Tensor:
        """``sqrt(beta (1 - e^{-2B}))``."""
        return torch.sqrt(-self.beta(t) * torch.expm1(-2.0 * self.integral(t)))

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """With ``u = e^{-B/2}`` and ``k = e^{-log_snr/2}``: ``1 - u^2 = k u``, so ``u = 2 / (k + sqrt(k^2 + 4))``."""
        k = torch.exp(-0.5 * log_snr.to(torch.float64))
        # 1 - u from 1 - u = k u / (1 + u) keeps its digits where u is near 1.
        u = 2.0 / (k + torch.sqrt(k**2 + 4.0))
        return self.t_at_integral(-2.0 * torch.log1p(-k * u / (1.0 + u)))


class Betas(Process):
    r"""A discrete variance-preserving process given by its betas: ``abar_i = prod_{j <= i} (1 - beta_j)``.

    ``alpha(i/T) = sqrt(abar_i)`` exactly, ``log abar`` is linear in t between the points (Ho et al. 2020, eq. 4).

    Args:
        betas: float64 ``[T]``, each in (0, 1); see :func:`linear_betas` and :func:`cosine_betas`.
    """

    log_alpha_bar: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__(levels=len(betas))
        betas = betas.to(torch.float64)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError("every beta must lie strictly between 0 and 1")
        # At t = 0 the product is empty: log 1. Not persistent: a checkpoint holds the configuration that gives them.
        table = torch.cat((torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)))
        self.register_buffer("log_alpha_bar", table, persistent=False)

    @property
    def prior_std(self) -> float:
        """1."""
        return 1.0

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The left grid point of each time's cell and the position inside it in [0, 1]."""
        assert self.levels is not None
        position = t.to(torch.float64) * self.levels
        # i/T * T may fall a rounding short of i: snap, so that grid points are exact.
        position = torch.where((position - position.round()).abs() < 1e-9, position.round(), position)
        left = (position.ceil().long() - 1).clamp(0, self.levels - 1)
        return left, position - left

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        left, fraction = self._cell(t)
        table = self.log_alpha_bar.to(t.device)
        start, end = table[left], table[left + 1]
        return torch.where(fraction == 1.0, end, start + fraction * (end - start))

    def _slope(self, t: Tensor) -> Tensor:
        assert self.levels is not None
        left, _ = self._cell(t)
        table = self.log_alpha_bar.to(t.device)
        return self.levels * (table[left + 1] - table[left])

    def log_alpha(self, t: Tensor) -> Tensor:
        """``log(abar) / 2``."""
        return 0.5 * self._log_alpha_bar(t)

    def sigma(self, t: Tensor) -> Tensor:
        """``sqrt(1 - abar)``."""
        return torch.sqrt(-torch.expm1(self._log_alpha_bar(t)))

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """Half the slope of ``log abar`` in the cell that ends at or contains t."""
        return 0.5 * self._slope(t)

    def dsigma(self, t: Tensor) -> Tensor:
        """``-abar (d log abar / dt) / (2 sigma)``."""
        return -0.5 * self._log_alpha_bar(t).exp() * self._slope(t) / self.sigma(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``sqrt(-d log abar / dt)``, also at t = 0."""
        return torch.sqrt(-self._slope(t))

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """From ``log abar = -log(1 + e^{-log_snr})``, by inverting the piecewise linear table."""
        assert self.levels is not None
        target = -nn.functional.softplus(-log_snr.to(torch.float64), threshold=700.0)
        table = self.log_alpha_bar.to(target.device)
        left = (torch.searchsorted(-table, -target) - 1).clamp(0, self.levels - 1)
        start, end = table[left], table[left + 1]
        return (left + (target - start) / (end - start)) / self.levels


def linear_betas(levels: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Tensor:
    """DDPM's betas, linear from ``beta_1`` to ``beta_T`` (Ho et al. 2020, section 4): float64 ``[levels]``."""
    return torch.linspace(beta_1, beta_T, levels, dtype=torch.float64)


def cosine_betas(levels: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """The betas of ``abar(t) ~ cos^2(pi/2 (t + s)/(1 + s))``, clipped (Nichol and Dhariwal 2021, eq. 17)."""
    t = torch.arange(levels + 1, dtype=torch.float64) / levels
    alpha_bar = torch.cos(0.5 * math.pi * (t + offset) / (1.0 + offset)) ** 2
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)
