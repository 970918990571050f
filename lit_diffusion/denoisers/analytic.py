r"""Distributions whose smoothed densities and scores are known exactly, the reference for networks and samplers.

If ``x_0 ~ sum_k w_k N(m_k, C_k)`` then ``x_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)``, so the score, the
posterior mean and the density of every noise level are closed expressions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers.base import Denoiser, Prediction
from lit_diffusion.processes import Process


class GaussianMixture:
    """A mixture of Gaussians ``sum_k w_k N(m_k, C_k)`` in D dimensions, computed in float64 on its input's device.

    Args:
        weights: ``[K]``, positive; normalized here.
        means: ``[K, D]``.
        covariances: ``[K, D, D]``, symmetric positive (semi)definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.weights = (weights / weights.sum()).to(torch.float64)
        self.means = means.to(torch.float64)
        self.covariances = covariances.to(torch.float64)
        # The smoothed covariances share their eigenvectors: one decomposition serves every noise level.
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.covariances)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, means, eigenvalues and eigenvectors on x's device."""
        parts = (self.weights, self.means, self.eigenvalues, self.eigenvectors)
        return tuple(part.to(x.device) for part in parts)  # type: ignore[return-value]

    @property
    def dimension(self) -> int:
        """The dimension D."""
        return self.means.shape[1]

    def mean(self) -> Tensor:
        """The mean of the mixture: ``[D]``."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """The covariance of the mixture: ``[D, D]``."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def sample(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """Samples ``[B, D]`` from standard normal ``[B, D]`` and uniform ``[B]`` numbers."""
        weights, means, eigenvalues, eigenvectors = self._parts(uniform)
        component = torch.bucketize(uniform.to(torch.float64), weights.cumsum(0)[:-1], right=True)
        scaled = eigenvalues[component].clamp(min=0).sqrt() * normal.to(torch.float64)
        return means[component] + torch.einsum("bij,bj->bi", eigenvectors[component], scaled)

    def log_prob_and_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density ``[B]`` and score ``[B, D]`` of ``alpha x_0 + sigma eps`` at ``[B, D]``; alpha, sigma ``[B]``."""
        log_prob, score, _ = self.posterior(x, alpha, sigma)
        return log_prob, score

    def posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The density, score and posterior mean of ``x_0`` given ``x = alpha x_0 + sigma eps``.

        Args:
            x: ``[B, D]``.
            alpha: ``[B]``.
            sigma: ``[B]``.

        Returns:
            Log-density ``[B]``, score ``[B, D]``, and the posterior mean ``E[x_0 | x]`` ``[B, D]``, each by its own
            closed form, accurate where sigma is small and where alpha is 0.
        """
        weights, means, eigenvalues, eigenvectors = self._parts(x)
        x = x.to(torch.float64)
        offset = x[:, None] - alpha[:, None, None] * means
        rotated = torch.einsum("kji,bkj->bki", eigenvectors, offset)
        variance = alpha[:, None, None] ** 2 * eigenvalues + sigma[:, None, None] ** 2
        log_component = -0.5 * (rotated**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        log_joint = log_component + weights.log()
        log_prob = torch.logsumexp(log_joint, dim=1)
        responsibility = torch.softmax(log_joint, dim=1)[..., None]
        pull = torch.einsum("kij,bkj->bki", eigenvectors, -rotated / variance)
        gain = alpha[:, None, None] * eigenvalues / variance
        mean = means + torch.einsum("kij,bkj->bki", eigenvectors, gain * rotated)
        return log_prob, (responsibility * pull).sum(1), (responsibility * mean).sum(1)

    def component_of(self, x: Tensor) -> Tensor:
        """The most likely component of each row of x: int64 ``[B]``."""
        weights, means, eigenvalues, eigenvectors = self._parts(x)
        rotated = torch.einsum("kji,bkj->bki", eigenvectors, x.to(torch.float64)[:, None] - means)
        variance = eigenvalues.clamp(min=1e-20)  # A component may be flat in some directions.
        log_component = -0.5 * (rotated**2 / variance + variance.log()).sum(-1)
        return (log_component + weights.log()).argmax(1)


class ExactDenoiser(Denoiser):
    """The optimal denoiser ``E[x_0 | x_t]`` of data from a Gaussian mixture, in closed form, with its energy.

    Args:
        distribution: the law of the data.
        process: the forward process.
    """

    has_energy = True

    def __init__(self, distribution: GaussianMixture, process: Process) -> None:
        super().__init__()
        self.distribution = distribution
        self.process = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """See :meth:`Denoiser.forward`; x_t is ``[B, D]`` (or any shape that flattens to it)."""
        coefficients = self.process.coefficients(t)
        log_prob, score, mean = self.distribution.posterior(x_t.flatten(1), coefficients.alpha, coefficients.sigma)
        eps = -coefficients.sigma[:, None] * score
        return Prediction.from_x0_and_eps(x_t, coefficients, mean.view_as(x_t), eps.view_as(x_t), energy=-log_prob)
