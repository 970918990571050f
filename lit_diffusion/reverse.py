r"""The reverse chain ``p(x_s | x_t)`` of ancestral sampling and of the variational bound.

.. math::
    p(x_s | x_t) = N\big(c_0\, \hat x_0(x_t) + c_t x_t,\; v I\big), \qquad
    v \in \{\beta,\; \tilde\beta,\; \beta^{w} \tilde\beta^{1-w}\}

(Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 3.2; the last is learned: Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672, eq. 15). ``c_0``, ``c_t`` and the variances are those of
:class:`~lit_diffusion.processes.Transition`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser, Prediction, clipped, describe_clip, require_clip
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import LOG_2PI, VP, Betas, Transition, expand_like

if TYPE_CHECKING:  # Samplers do without the data sources.
    from lit_diffusion.data_spec import GreyLevels

ReverseVariance = Literal["beta", "beta_tilde", "learned"]


@dataclass(frozen=True)
class ReverseChain:
    r"""The reverse chain of a denoiser, down to its last step.

    .. math::  p(x_s | x_t) = N\big(c_0\, \hat x_0(x_t) + c_t x_t,\; v I\big)

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239, section 3.2.) The last step, to s = 0, is the decoder, whose own
    beta~ is 0: beta~ of the step before it, which ends at t, replaces it. It also replaces ``beta`` where the decoder
    is a probability of grey levels, as in the code of Ho et al. 2020 (``posterior_variance[1:2]``); a density of
    points, which no paper has, keeps beta. In a chain of one step, which has none before it, beta replaces both.
    Sampling adds no noise in the last step.

    Attributes:
        variance: the variance v of a step: ``beta``, the forward step's; ``beta_tilde``, its posterior's; ``learned``,
            the model's; None: the papers' choice, ``learned`` if the model has one, else ``beta`` where the variance is
            preserved (Ho et al. 2020) and ``beta_tilde`` where it is not (Song et al. 2021,
            https://arxiv.org/abs/2011.13456, eq. 47).
        clip_x0: the range to which the predicted clean datum is clipped, see :data:`~lit_diffusion.denoisers.ClipX0`.

    Raises:
        UserError: for a name that is not one of these, or an empty range.
    """

    variance: ReverseVariance | None = None
    clip_x0: ClipX0 = "data"

    def __post_init__(self) -> None:
        if self.variance is not None:
            require_choice("", "variance", self.variance, get_args(ReverseVariance))
        require_clip(self.clip_x0)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a learned variance for a model that has none.

        Raises:
            UserError: with the choices that remain.
        """
        if self.variance == "learned" and not denoiser.learned_variance:
            raise UserError("variance: this model has not learned a reverse variance; choose beta or beta_tilde")

    def variance_of(self, denoiser: Denoiser) -> ReverseVariance:
        """The variance in use with a denoiser, None resolved to the papers' choice."""
        if self.variance is not None:
            return self.variance
        if denoiser.learned_variance:
            return "learned"
        return "beta" if isinstance(denoiser.process, VP | Betas) else "beta_tilde"

    def mean(self, prediction: Prediction, denoiser: Denoiser, step: Transition) -> Tensor:
        """The mean ``c_0 x0 + c_t x_t`` with the predicted x0 clipped to its range: ``[B, ...]``."""
        return posterior_mean(clipped(prediction.x0, self.clip_x0, denoiser), prediction.x_t, step)

    def log_variance(
        self,
        prediction: Prediction,
        denoiser: Denoiser,
        step: Transition,
        s: Tensor,
        of_grey_levels: bool = False,
        before_last: float | None = None,
    ) -> Tensor:
        """The log-variance ``log v``, in nats: float64 ``[B, 1, ...]``, or ``[B, ...]`` where it is learned.

        Args:
            prediction: the prediction at the beginning of the steps.
            denoiser: the denoiser of the prediction.
            step: the transitions to s.
            s: times ``[B]`` of the ends of the steps.
            of_grey_levels: if true, the last step is a probability of grey levels.
            before_last: the time at which the step before the last one begins; None: 2t, as on a whole grid.
        """
        variance, process = self.variance_of(denoiser), denoiser.process
        t, last = prediction.coefficients.t, s == 0.0
        beta, beta_tilde = step.beta, step.beta_tilde
        if bool(last.any()):
            begin = (2.0 * t).clamp(max=process.t_max) if before_last is None else torch.full_like(t, before_last)
            followed = last & (t < begin)
            above = process.transition(torch.where(followed, t, s), torch.where(followed, begin, t))
            replacement = torch.where(followed, above.beta_tilde, beta)
            beta_tilde = torch.where(last, replacement, beta_tilde)
            if variance == "beta" and of_grey_levels:
                beta = beta_tilde.where(last, beta)
        if variance == "learned":
            assert prediction.reverse_log_variance is not None
            return prediction.reverse_log_variance(replace(step, beta=beta, beta_tilde=beta_tilde), s)
        chosen = beta if variance == "beta" else beta_tilde
        return chosen.log().view(-1, *[1] * (prediction.x_t.ndim - 1))

    def describe(self, denoiser: Denoiser, of_grey_levels: bool) -> dict[str, str]:
        """The chain's variances and range as text, for a protocol."""
        variance = self.variance_of(denoiser)
        first = {
            "beta": "beta_tilde of the second step" if of_grey_levels else "beta",
            "beta_tilde": "beta_tilde of the second step",
            "learned": "between beta and beta_tilde of the second step",
        }[variance]
        return {"variance": variance, "first_variance": first, "clip_x0": describe_clip(self.clip_x0, denoiser)}


def posterior_mean(x0: Tensor, x_t: Tensor, step: Transition) -> Tensor:
    """The mean ``c_0 x0 + c_t x_t`` of ``q(x_s | x_t, x_0)``: ``[B, ...]``."""
    return expand_like(step.x0_coefficient, x_t) * x0 + expand_like(step.xt_coefficient, x_t) * x_t


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """``KL(N(mean, e^lv) || N(other_mean, e^olv))`` of each entry, in nats; lv, olv the log-variances."""
    difference = log_variance - other_log_variance
    return 0.5 * (torch.expm1(difference) - difference + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def discretised_log_prob(
    x: Tensor, mean: Tensor, log_variance: Tensor, bin_width: float, low: float, high: float
) -> Tensor:
    r"""Log-probability of a grey level under a Gaussian, in nats: ``[B, ...]``, float64.

    .. math::  \log \int_{x - w/2}^{x + w/2} N(y; m, v)\, dy

    with the outermost bins reaching to infinity (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 13).

    Args:
        x: the grey levels' values, at the centers of their bins.
        mean: m.
        log_variance: log v.
        bin_width: w, the distance of two grey levels.
        low: value of the lowest grey level.
        high: value of the highest grey level.
    """
    x, mean = x.to(torch.float64), mean.to(torch.float64)
    scale = torch.exp(-0.5 * log_variance)
    upper = (x + 0.5 * bin_width - mean) * scale
    lower = (x - 0.5 * bin_width - mean) * scale
    upper = torch.where(x > high - 0.25 * bin_width, torch.inf, upper)
    lower = torch.where(x < low + 0.25 * bin_width, -torch.inf, lower)
    # Both ends to the left of the mean, where cumulative probabilities keep their digits.
    right = lower > 0.0
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-300)))


def bound_term(
    prediction: Prediction,
    denoiser: Denoiser,
    x0: Tensor,
    s: Tensor,
    chain: ReverseChain,
    grey_levels: GreyLevels | None,
    before_last: float | None = None,
) -> Tensor:
    """The term of the step from t to s in the bound of ``-log p(x_0)``, in nats: float64 ``[B]``.

    ``KL(q(x_s | x_t, x_0) || p(x_s | x_t))`` where ``s > 0``, the decoder ``-log p(x_0 | x_t)`` where s is 0 (Ho et al.
    2020, eq. 5): a probability of grey levels or, for points, a density.

    Args:
        prediction: the model's prediction at ``x_t``.
        denoiser: the denoiser of the prediction.
        x0: the clean data ``[B, ...]``; the decoder scores the grey level in whose bin a value lies.
        s: times ``[B]`` of the ends of the steps.
        chain: the reverse chain.
        grey_levels: the data's grey levels, None for points.
        before_last: the time at which the step before the decoder's begins; None: 2t, as on a whole grid.
    """
    step = denoiser.process.transition(s, prediction.coefficients.t)
    mean = chain.mean(prediction, denoiser, step).to(torch.float64)
    log_variance = chain.log_variance(prediction, denoiser, step, s, grey_levels is not None, before_last)
    last = s == 0.0
    wide = (-1, *[1] * (x0.ndim - 1))
    true_mean = posterior_mean(x0, prediction.x_t, step).to(torch.float64)
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
