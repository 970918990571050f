r"""The reverse chain ``p(x_s | x_t)``: what ancestral sampling draws from and the variational bound scores.

.. math::
    p(x_s | x_t) = N\big(c_0\, \hat x_0(x_t) + c_t x_t,\; v I\big), \qquad
    v \in \{\beta,\; \tilde\beta,\; \beta^{w} \tilde\beta^{1-w}\}

(Ho et al. 2020, section 3.2; the last is learned: Nichol and Dhariwal 2021, eq. 15). ``c_0``, ``c_t`` and the
variances are those of :class:`~lit_diffusion.processes.Transition`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_diffusion.data.facts import GreyLevels
from lit_diffusion.denoisers import Denoiser, Prediction
from lit_diffusion.errors import UserError
from lit_diffusion.processes import LOG_2PI, Process, Transition, expand_like

ReverseVariance = Literal["beta", "beta_tilde", "learned"]


def require_variance(variance: ReverseVariance, denoiser: Denoiser) -> None:
    """Refuse a learned variance of a model that has none.

    Raises:
        UserError: with what to choose instead.
    """
    if variance == "learned" and not denoiser.learned_variance:
        raise UserError("variance: this model has not learned a reverse variance; choose beta or beta_tilde")


def reverse_mean(prediction: Prediction, step: Transition, x0: Tensor | None = None) -> Tensor:
    """``c_0 x0 + c_t x_t``, with the predicted x0 or the one given: ``[B, ...]``."""
    x_t = prediction.x_t
    return expand_like(step.on_x0, x_t) * (prediction.x0 if x0 is None else x0) + expand_like(step.on_xt, x_t) * x_t


def reverse_log_variance(
    prediction: Prediction, process: Process, step: Transition, s: Tensor, variance: ReverseVariance
) -> Tensor:
    """``log v``, in nats: ``[B, 1, ...]``, or ``[B, ...]`` where it is learned; float64.

    Where s is 0 beta~ is 0: the one of the next step, from 2t to t, takes its place, as in both papers' code; in a
    walk of one step, which has no next one, beta does.
    """
    t = prediction.level.t
    last = s == 0.0
    beta_tilde = step.beta_tilde
    if bool(last.any()):
        above = process.transition(torch.where(last, t, s), torch.where(last, (2.0 * t).clamp(max=1.0), t))
        beta_tilde = torch.where(last, torch.where(t < 1.0, above.beta_tilde, step.beta), beta_tilde)
    shape = (-1, *[1] * (prediction.x_t.ndim - 1))
    log_beta, log_beta_tilde = step.beta.log().view(shape), beta_tilde.log().view(shape)
    if variance == "beta":
        return log_beta
    if variance == "beta_tilde":
        return log_beta_tilde
    assert prediction.variance_share is not None
    share = prediction.variance_share.to(torch.float64)
    return share * log_beta + (1.0 - share) * log_beta_tilde


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """``KL(N(mean, e^lv) || N(other_mean, e^olv))`` of each entry, in nats; shapes broadcast."""
    difference = log_variance - other_log_variance
    return 0.5 * (torch.expm1(difference) - difference + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def discretised_log_prob(
    x: Tensor, mean: Tensor, log_variance: Tensor, bin_width: float, low: float, high: float
) -> Tensor:
    r"""Log-probability of a grey level under a Gaussian, in nats: ``[B, ...]``, float64.

    .. math::  \log \int_{x - w/2}^{x + w/2} N(y; m, v)\, dy

    with the outermost bins reaching to infinity (Ho et al. 2020, eq. 13).

    Args:
        x: the levels' values, at the centres of their bins.
        mean: m.
        log_variance: log v.
        bin_width: w, the distance of two levels.
        low: value of the lowest level.
        high: value of the highest level.
    """
    x, mean = x.to(torch.float64), mean.to(torch.float64)
    scale = torch.exp(-0.5 * log_variance)
    upper = (x + 0.5 * bin_width - mean) * scale
    lower = (x - 0.5 * bin_width - mean) * scale
    upper = torch.where(x > high - 0.25 * bin_width, torch.inf, upper)
    lower = torch.where(x < low + 0.25 * bin_width, -torch.inf, lower)
    # Both ends to the left of the mean, where cumulated probabilities keep their digits.
    right = lower > 0.0
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-300)))


def bound_term(
    prediction: Prediction,
    process: Process,
    x0: Tensor,
    s: Tensor,
    variance: ReverseVariance,
    grey_levels: GreyLevels | None,
) -> Tensor:
    """What the step from t to s adds to ``-log p(x_0)``, in nats: float64 ``[B]``.

    ``KL(q(x_s | x_t, x_0) || p(x_s | x_t))`` where ``s > 0``, the decoder ``-log p(x_0 | x_t)`` where s is 0 (Ho et al.
    2020, eq. 5): the probability of the grey levels, or, for points, the density.

    Args:
        prediction: of the model at ``x_t``.
        process: of the model.
        x0: the clean data ``[B, ...]``; the decoder scores the grey level in whose bin a value lies.
        s: times ``[B]`` of the ends of the steps.
        variance: of the reverse step.
        grey_levels: of the data, None for points.
    """
    step = process.transition(s, prediction.level.t)
    mean = reverse_mean(prediction, step).to(torch.float64)
    log_variance = reverse_log_variance(prediction, process, step, s, variance)
    last = s == 0.0
    wide = (-1, *[1] * (x0.ndim - 1))
    true_mean = reverse_mean(prediction, step, x0).to(torch.float64)
    true_log_variance = torch.where(last, 1.0, step.beta_tilde).log().view(wide)
    term = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).sum(1)
    if bool(last.any()):
        if grey_levels is None:
            square = (x0.to(torch.float64) - mean) ** 2 * torch.exp(-log_variance)
            decoder = 0.5 * (square + log_variance + LOG_2PI)
        else:
            low, high, width = grey_levels.low, grey_levels.high, grey_levels.width
            decoder = -discretised_log_prob(grey_levels.centre(x0), mean, log_variance, width, low, high)
        term = torch.where(last, decoder.flatten(1).sum(1), term)
    return term
