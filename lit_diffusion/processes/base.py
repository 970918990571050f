r"""Forward noising processes ``q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)``, t in [0, 1], t = 0 the data.

Each is a linear SDE ``dx = f(t) x dt + g(t) dw`` with

.. math::  f = \frac{d \log\alpha}{dt}, \qquad g^2 = \frac{d\sigma^2}{dt} - 2 f \sigma^2

(the moment equations of a linear SDE: Särkkä and Solin 2019, "Applied stochastic differential equations", section 5.5;
the kernels: Song et al. 2021, "Score-based generative modeling through SDEs", appendix B,
https://arxiv.org/abs/2011.13456). All of this is computed in float64 whatever the state's type, because samplers divide
by ratios of small noise levels.

A discrete method is the same process read on a grid ``t_i = i / num_timesteps``, ``i = 1 .. num_timesteps``: NCSN's L
noise levels and DDPM's T betas are exact at the grid points and interpolated in between.

A process is given by four functions of t, :meth:`Process.alpha`, :meth:`Process.sigma` and their derivatives. Where
alpha reaches 0, as a flow's does at t = 1, f, g and the log-SNR are infinite, and nothing is NaN: transitions, the
drift of the probability-flow ODE and every view of a prediction keep their finite limits there.
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
    r"""The forward step and its posterior between two times ``s < t``, float64 ``[B]`` each.

    .. math::
        q(x_t | x_s) &= N(a\, x_s, \beta I), \quad a = \alpha_t / \alpha_s, \quad
        \beta = \sigma_t^2 - a^2 \sigma_s^2 \\
        q(x_s | x_t, x_0) &= N(c_0 x_0 + c_t x_t, \tilde\beta I), \quad c_0 = \alpha_s \beta / \sigma_t^2, \quad
        c_t = a \sigma_s^2 / \sigma_t^2, \quad \tilde\beta = \beta \sigma_s^2 / \sigma_t^2

    On DDPM's grid these are its ``beta_t``, ``sqrt(alpha_t)`` and the posterior's mean and variance (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, eqs. 2, 6 and 7).

    Attributes:
        scale: ``a``, the factor of x_s in the mean of the forward step.
        beta: variance of the forward step.
        x0_coefficient: ``c_0``.
        xt_coefficient: ``c_t``.
        beta_tilde: variance of the posterior; 0 where s is 0.
    """

    scale: Tensor
    beta: Tensor
    x0_coefficient: Tensor
    xt_coefficient: Tensor
    beta_tilde: Tensor


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a process at times ``[B]``, float64.

    Attributes:
        t: the times.
        alpha: ``alpha(t)``, the factor of the clean datum in the mean.
        sigma: ``sigma(t)``, the standard deviation of the noise.
        dalpha: ``d alpha / dt``.
        dsigma: ``d sigma / dt``.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


class Process(nn.Module, ABC):
    """A forward noising process ``q(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)`` for t in [0, 1].

    It is the linear SDE ``dx = f(t) x dt + g(t) dw`` with ``f = d log alpha / dt`` and
    ``g^2 = d sigma^2 / dt - 2 f sigma^2`` (Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix B). It may have
    parameters; everything below is differentiable in them.

    Args:
        num_timesteps: the number of grid points of a discrete method, None for continuous time.
        t_min: the smallest time of training and of likelihoods in continuous time; on a grid it is the first grid
            point. At t = 0 itself the score of data on a grid of grey levels is unbounded.
        t_min_sampling: the smallest time that SDE and ODE samplers visit, ``t_min`` if that is larger: below it nothing
            was learned; on a grid it is the first grid point.
        t_max: the largest time of training, from which sampling starts; 1 on a grid.

    Raises:
        UserError: unless ``0 < t_min, t_min_sampling < t_max <= 1`` and ``num_timesteps >= 1``.
    """

    def __init__(
        self, num_timesteps: int | None = None, t_min: float = 1e-5, t_min_sampling: float = 1e-5, t_max: float = 1.0
    ) -> None:
        super().__init__()
        if num_timesteps is not None and num_timesteps < 1:
            raise UserError(f"num_timesteps is {num_timesteps}; a process needs at least one")
        for key, value in (("t_min", t_min), ("t_min_sampling", t_min_sampling)):
            if not 0.0 < value < 1.0:
                raise UserError(f"{key} is {value:g}; it must lie strictly between 0 and 1, where the score is finite")
        if not max(t_min, t_min_sampling) < t_max <= 1.0:
            raise UserError(
                f"t_max is {t_max:g}; it must lie above t_min {t_min:g} and t_min_sampling {t_min_sampling:g}, and be "
                f"at most 1"
            )
        self.num_timesteps = num_timesteps
        self.t_min = t_min if num_timesteps is None else 1.0 / num_timesteps
        self.t_min_sampling = max(t_min, t_min_sampling) if num_timesteps is None else 1.0 / num_timesteps
        self.t_max = t_max if num_timesteps is None else 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """``alpha(t)`` for t in [0, 1], float64; 1 at t = 0."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """``d alpha / dt`` for t in (0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """``sigma(t)`` for t in [0, 1], float64; 0 at t = 0."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt`` for t in (0, 1]."""

    @abstractmethod
    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of :meth:`log_snr`; minus infinity gives the time at which alpha is 0."""

    @property
    @abstractmethod
    def prior_std(self) -> float | Tensor:
        """Standard deviation of the prior ``N(0, prior_std^2 I)`` from which sampling starts.

        A tensor is float64, broadcasts against one datum, and may have a gradient.
        """

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior at ``[B, ...]``: float64 ``[B]``, in nats."""
        std = torch.as_tensor(self.prior_std, dtype=torch.float64, device=x.device)
        scaled = (x.to(torch.float64) / std).flatten(1)
        log_volume = std.log().expand(x.shape[1:]).sum()
        return -0.5 * scaled.square().sum(1) - scaled.shape[1] * 0.5 * LOG_2PI - log_volume

    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha(t)``, float64; minus infinity where alpha is 0."""
        return self.alpha(t).log()

    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``f(t) = d log alpha / dt``; minus infinity where alpha is 0."""
        return self.dalpha(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``, decreasing in t; minus infinity where alpha is 0."""
        return 2.0 * (self.log_alpha(t) - self.sigma(t).log())

    def t_at_sigma(self, sigma: float) -> float:
        """The time at which the noise-to-signal ratio ``sigma / alpha`` has the given value.

        Raises:
            UserError: if the ratio lies outside the process's range of times.
        """

        def ratio(t: float) -> float:
            return math.exp(-0.5 * float(self.log_snr(torch.tensor(t, dtype=torch.float64))))

        if sigma > 0.0:
            t = float(self.t_at_log_snr(torch.tensor(-2.0 * math.log(sigma), dtype=torch.float64)))
            # Both ends belong to the process, whichever way they were rounded.
            t = min(max(t, 1e-12 if self.num_timesteps is None else self.t_min), self.t_max)
            # In continuous time the smallest noise level may be the limit at 0, as good as that at the smallest time.
            same = ratio(t) == sigma or abs(ratio(t) / sigma - 1.0) < 1e-6  # Equal, too, where both are infinite.
            if same and ratio(self.t_min) < 1.001 * sigma:
                return t
        raise UserError(
            f"noise level {sigma:g} is outside this process, whose noise levels run from {ratio(self.t_min):g} "
            f"(at its smallest time) to {ratio(self.t_max):g}"
        )

    def require_time(self, key: str, t: float) -> None:
        """Refuse a time at which no network is trained on this process.

        Args:
            key: the configuration key of the time, for the message.
            t: the time.

        Raises:
            UserError: unless ``t_min <= t < t_max``; on a grid t_min is the first grid point.
        """
        if not self.t_min * (1.0 - 1e-9) <= t < self.t_max:
            where = "" if self.num_timesteps is None else f", the first of its {self.num_timesteps} timesteps"
            raise UserError(
                f"{key} is {t:g}; this model is trained on times from {self.t_min:g}{where}, to {self.t_max:g}: give "
                f"one of them below {self.t_max:g}"
            )

    def drift(self, t: Tensor) -> Tensor:
        """``f(t)`` of the SDE ``dx = f(t) x dt + g(t) dw``."""
        return self.dlog_alpha(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """``g(t)`` of the SDE ``dx = f(t) x dt + g(t) dw``."""
        sigma = self.sigma(t)
        return (2.0 * sigma * (self.dsigma(t) - self.dlog_alpha(t) * sigma)).clamp(min=0.0).sqrt()

    def coefficients(self, t: Tensor) -> Coefficients:
        """All coefficients at times ``[B]`` at once."""
        t = t.to(torch.float64)
        return Coefficients(t, self.alpha(t), self.sigma(t), self.dalpha(t), self.dsigma(t))

    def transition(self, s: Tensor, t: Tensor) -> Transition:
        """The forward step from s to t and its posterior, for times ``s < t``, ``[B]`` each; s may be 0."""
        s, t = s.to(torch.float64), t.to(torch.float64)
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        variance_s, variance_t = self.sigma(s) ** 2, self.sigma(t) ** 2
        # 1 - SNR_t / SNR_s, the share of new noise, without cancellation. From s without noise or to t without signal
        # it is 1; these rows stay out of the logarithms, whose gradient would be NaN there.
        inside = (variance_s > 0.0) & (alpha_t > 0.0)
        log_ratio = self.log_snr(torch.where(inside, t, self.t_min)) - self.log_snr(torch.where(inside, s, self.t_min))
        fresh = torch.where(inside, -torch.expm1(log_ratio), 1.0)
        return Transition(
            scale=alpha_t / alpha_s,
            beta=variance_t * fresh,
            x0_coefficient=alpha_s * fresh,
            xt_coefficient=alpha_t / alpha_s * variance_s / variance_t,
            beta_tilde=variance_s * fresh,
        )

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """``x_t = alpha(t) x_0 + sigma(t) eps``; x0 and eps ``[B, ...]``, t ``[B]``."""
        return expand_like(self.alpha(t), x0) * x0 + expand_like(self.sigma(t), x0) * eps

    def first_order_step(self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        r"""One step of the probability-flow ODE from t to s with the predicted clean datum held constant.

        .. math::  x_s = \alpha_s x_0 + \frac{\sigma_s}{\sigma_t} (x_t - \alpha_t x_0)

        Exact where the prediction does not change, of order 1 where it does (DDIM: Song, Meng and Ermon 2021,
        https://arxiv.org/abs/2010.02502, eq. 12). Where ``alpha_t`` is 0 and the log-SNR infinite it is the first step:
        ``x_s = (sigma_s / sigma_t) x_t + alpha_s x_0``.

        Args:
            x_t: states ``[B, ...]``.
            x0: the predicted clean data ``[B, ...]``.
            t: times ``[B]`` of the states.
            s: times ``[B]`` to go to.
        """
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        ratio = self.sigma(s) / self.sigma(t)
        return expand_like(alpha_s - ratio * alpha_t, x_t) * x0 + expand_like(ratio, x_t) * x_t

    def grid(self) -> Tensor:
        """The times of a discrete method, ``i / T`` for i = 1 .. T = num_timesteps: float64 ``[T]``, rising.

        Raises:
            UserError: for a process in continuous time, which has no grid.
        """
        if self.num_timesteps is None:
            raise UserError("this process is in continuous time: give the number of timesteps to visit")
        return torch.arange(1, self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps

    def level_index(self, t: Tensor) -> Tensor:
        """The index ``0 .. num_timesteps - 1`` of the grid point nearest to times ``[B]``: int64 ``[B]``.

        Index 0 is the least noise.

        Raises:
            UserError: for a process in continuous time.
        """
        if self.num_timesteps is None:
            raise UserError("c_noise 'index' needs a process with num_timesteps; continuous time has no index")
        return ((t.to(torch.float64) * self.num_timesteps).round().long() - 1).clamp(0, self.num_timesteps - 1)


class LogProcess(Process):
    """A process given by ``log alpha`` and its derivative, so that alpha is never 0."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha(t)`` for t in [0, 1], float64."""

    @abstractmethod
    def dlog_alpha(self, t: Tensor) -> Tensor:
        """``f(t) = d log alpha / dt`` for t in (0, 1]."""

    def alpha(self, t: Tensor) -> Tensor:
        """``alpha = exp(log alpha)``."""
        return self.log_alpha(t).exp()

    def dalpha(self, t: Tensor) -> Tensor:
        """``d alpha / dt = alpha d log alpha / dt``."""
        return self.alpha(t) * self.dlog_alpha(t)

    def coefficients(self, t: Tensor) -> Coefficients:
        """All coefficients at times ``[B]`` at once, with alpha evaluated once."""
        t = t.to(torch.float64)
        alpha = self.alpha(t)
        return Coefficients(t, alpha, self.sigma(t), alpha * self.dlog_alpha(t), self.dsigma(t))
