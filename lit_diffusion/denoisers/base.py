r"""Denoisers and their predictions: the views of one output F, of a network or of anything else.

An output F is one linear combination of the clean datum and the noise,

.. math::  F = u\, x_0 + v\, \epsilon, \qquad x_t = \alpha x_0 + \sigma \epsilon.

Solving the two equations gives every view in closed form, with ``det = alpha v - sigma u``:

.. math::
    x_0 = \frac{v x_t - \sigma F}{det}, \quad \epsilon = \frac{\alpha F - u x_t}{det}, \quad
    s = -\frac{\epsilon}{\sigma}, \quad velocity = \alpha' x_0 + \sigma' \epsilon.

Each view is one map ``p x_t + q F`` with p and q in float64, never computed from another view: eps from a rounded x0
loses all its digits where sigma is small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Coefficients, Process, Transition, expand_like

ReverseLogVariance = Callable[[Transition, Tensor], Tensor]
"""A function of the forward steps and the times ``[B]`` of their ends that returns the log-variance of the reverse
steps, in nats and float64, broadcasting against ``x_t`` ``[B, ...]``."""


@dataclass(frozen=True)
class InterpolatedVariance:
    r"""A reverse variance interpolated in the logarithm between those of the forward step and of its posterior.

    .. math::  \log v = w \log\beta + (1 - w) \log\tilde\beta

    (Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15).

    Attributes:
        share: w, ``[B, ...]`` like ``x_t``.
    """

    share: Tensor

    def __call__(self, step: Transition, s: Tensor) -> Tensor:
        """``log v`` of the steps to times s: float64 ``[B, ...]``."""
        shape = (-1, *[1] * (self.share.ndim - 1))
        share = self.share.to(torch.float64)
        return share * step.beta.log().view(shape) + (1.0 - share) * step.beta_tilde.log().view(shape)


@dataclass(frozen=True)
class Prediction:
    r"""One evaluation of a denoiser and its views, each ``[B, ...]`` like ``x_t`` and in its type.

    .. math::
        F = u\, x_0 + v\, \epsilon, \qquad
        x_0 = \frac{v x_t - \sigma F}{\alpha v - \sigma u}, \qquad
        \epsilon = \frac{\alpha F - u x_t}{\alpha v - \sigma u}, \qquad s = -\frac{\epsilon}{\sigma}

    A network's prediction holds its output and its row of :data:`~lit_diffusion.denoisers.PARAMETRIZATIONS`; other
    sources build one by :meth:`from_eps`, :meth:`from_x0`, :meth:`from_score` or :meth:`from_x0_and_eps`.

    Attributes:
        x_t: the noisy input.
        raw: F, a network's output.
        coefficients: the coefficients of the process at each row's time.
        u: weight of x_0 in F, float64 ``[B]``.
        v: weight of eps in F, float64 ``[B]``.
        energy: ``E(x_t)`` with ``score = -grad E``, up to a constant: ``[B]``; None where the model has none.
        reverse_log_variance: the model's own variance of the reverse steps, see :data:`ReverseLogVariance`; None where
            it has none.
    """

    x_t: Tensor
    raw: Tensor
    coefficients: Coefficients
    u: Tensor
    v: Tensor
    energy: Tensor | None = None
    reverse_log_variance: ReverseLogVariance | None = None

    @classmethod
    def from_eps(cls, x_t: Tensor, coefficients: Coefficients, eps: Tensor, energy: Tensor | None = None) -> Self:
        """The prediction given the noise ``[B, ...]``; it has no x0 where alpha is 0."""
        return cls(x_t, eps, coefficients, torch.zeros_like(coefficients.t), torch.ones_like(coefficients.t), energy)

    @classmethod
    def from_x0(cls, x_t: Tensor, coefficients: Coefficients, x0: Tensor, energy: Tensor | None = None) -> Self:
        """The prediction given the clean datum ``[B, ...]``; its eps loses digits where sigma is small."""
        return cls(x_t, x0, coefficients, torch.ones_like(coefficients.t), torch.zeros_like(coefficients.t), energy)

    @classmethod
    def from_score(cls, x_t: Tensor, coefficients: Coefficients, score: Tensor, energy: Tensor | None = None) -> Self:
        """The prediction given the score ``[B, ...]``; it has no x0 where alpha is 0."""
        return cls(x_t, score, coefficients, torch.zeros_like(coefficients.t), -1.0 / coefficients.sigma, energy)

    @classmethod
    def from_x0_and_eps(
        cls, x_t: Tensor, coefficients: Coefficients, x0: Tensor, eps: Tensor, energy: Tensor | None = None
    ) -> Self:
        """The prediction given both the clean datum and the noise, with ``x_t = alpha x0 + sigma eps``.

        It keeps ``v = alpha eps - sigma x0``, from which every view has all its digits, also at small sigma and where
        alpha is 0: the right constructor for combinations of predictions, such as guidance.
        """
        raw = expand_like(coefficients.alpha, eps) * eps - expand_like(coefficients.sigma, x0) * x0
        return cls(x_t, raw, coefficients, -coefficients.sigma, coefficients.alpha, energy)

    @property
    def _determinant(self) -> Tensor:
        return self.coefficients.alpha * self.v - self.coefficients.sigma * self.u

    @property
    def c_skip(self) -> Tensor:
        """The weight of x_t in ``x_0 = c_skip x_t + c_out F``: float64 ``[B]``."""
        return self.v / self._determinant

    @property
    def c_out(self) -> Tensor:
        """The weight of F in ``x_0 = c_skip x_t + c_out F``: float64 ``[B]``."""
        return -self.coefficients.sigma / self._determinant

    def _view(self, p: Tensor, q: Tensor) -> Tensor:
        determinant = self._determinant
        raw = self.raw.to(self.x_t.dtype)
        return expand_like(p / determinant, self.x_t) * self.x_t + expand_like(q / determinant, self.x_t) * raw

    @property
    def x0(self) -> Tensor:
        """The posterior mean ``E[x_0 | x_t]`` (Tweedie)."""
        return self._view(self.v, -self.coefficients.sigma)

    @property
    def eps(self) -> Tensor:
        """The expected noise ``E[eps | x_t]``."""
        return self._view(-self.u, self.coefficients.alpha)

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x_t) = -eps / sigma``."""
        return self._view(self.u / self.coefficients.sigma, -self.coefficients.alpha / self.coefficients.sigma)

    @property
    def velocity(self) -> Tensor:
        """``E[alpha' x_0 + sigma' eps | x_t]``: the drift of the probability-flow ODE."""
        at = self.coefficients
        return self._view(at.dalpha * self.v - at.dsigma * self.u, at.dsigma * at.alpha - at.dalpha * at.sigma)


@dataclass(frozen=True)
class EndPoint(Prediction):
    """A prediction of a trajectory's end, as a consistency model makes it, instead of a posterior mean.

    It has x0 only, and is made by :meth:`Prediction.from_x0`; every other view raises UserError (consistency models:
    Song et al. 2023, https://arxiv.org/abs/2303.01469).
    """

    def _refuse(self, view: str) -> NoReturn:
        raise UserError(
            f"this model predicts where a trajectory ends, not a posterior mean, and has no {view}: choose a sampler "
            f"that needs x0 alone"
        )

    @property
    def eps(self) -> Tensor:
        """Raise UserError: an end point has no eps."""
        self._refuse("eps")

    @property
    def score(self) -> Tensor:
        """Raise UserError: an end point has no score."""
        self._refuse("score")

    @property
    def velocity(self) -> Tensor:
        """Raise UserError: an end point has no velocity."""
        self._refuse("velocity")


class Denoiser(nn.Module, ABC):
    """Anything that predicts the clean datum from a noisy one, on a process. Samplers see only this."""

    process: Process
    predicts: Literal["mean", "velocity", "end_point"] = "mean"
    """``mean``: posterior means given independent noise, from which a score follows; ``velocity``: posterior means
    given noise that was coupled with the data, whose velocity transports one to the other, and whose score is not that
    of the noised data; ``end_point``: :class:`EndPoint`."""

    has_energy: bool = False
    """True where predictions have an energy."""

    learned_variance: bool = False
    """True where predictions have a reverse variance."""

    on_grid_only: bool = False
    """True where only the grid's timesteps are valid times, and none between them."""

    data_range: tuple[float, float] | None = None
    """The smallest and the largest value of clean data, None where they have none: points, exact densities."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """Predict from ``x_t`` ``[B, ...]`` at times ``t`` ``[B]`` in (0, 1].

        Args:
            x_t: noisy data.
            t: the times of the rows.
            cond: the condition, ``[B]`` rows.
            began: times ``[B]`` at which the current sampler step began, so that guidance in an interval of noise
                levels is on or off for whole steps; None: t itself.
        """


def _handed_on(name: str) -> Any:
    """A property that reads an attribute of the wrapped denoiser on every access."""
    return property(lambda wrapped: getattr(wrapped.denoiser, name))


class WrappedDenoiser(Denoiser):
    """A denoiser around another, with the process and properties of the wrapped one.

    A subclass implements :meth:`forward`; a class attribute replaces a property that differs.

    Args:
        denoiser: the wrapped denoiser.
    """

    process = _handed_on("process")
    predicts = _handed_on("predicts")
    has_energy = _handed_on("has_energy")
    learned_variance = _handed_on("learned_variance")
    on_grid_only = _handed_on("on_grid_only")
    data_range = _handed_on("data_range")

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
