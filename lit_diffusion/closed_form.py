r"""Distributions whose smoothed densities and scores are known exactly: the yardstick of everything else.

If ``x_0 ~ sum_k w_k N(m_k, C_k)`` then ``x_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)``, so the score, the
posterior mean and the density of every noise level are closed expressions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.backbones.base import Condition
from lit_diffusion.denoisers import PARAMETRIZATIONS, Denoiser, Prediction
from lit_diffusion.processes import Process


class GaussianMixture:
    """A mixture of Gaussians in D dimensions.

    Args:
        weights: ``[K]``, positive; normalised here.
        means: ``[K, D]``.
        covariances: ``[K, D, D]``, symmetric positive (semi)definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.weights = (weights / weights.sum()).to(torch.float64)
        self.means = means.to(torch.float64)
        self.covariances = covariances.to(torch.float64)
        # The smoothed covariances share their eigenvectors: one decomposition serves every noise level.
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.covariances)

    @property
    def dimension(self) -> int:
        """D."""
        return self.means.shape[1]

    def mean(self) -> Tensor:
        """``[D]``."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """``[D, D]``."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None, :])

    def sample(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """Samples ``[B, D]`` from standard normal ``[B, D]`` and uniform ``[B]`` numbers."""
        edges = self.weights.cumsum(0)[:-1].to(uniform.device)
        component = torch.bucketize(uniform.to(torch.float64), edges, right=True)
        scaled = self.eigenvalues[component].clamp(min=0).sqrt() * normal.to(torch.float64)
        return self.means[component] + torch.einsum("bij,bj->bi", self.eigenvectors[component], scaled)

    def log_prob_and_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density ``[B]`` and score ``[B, D]`` of ``alpha x_0 + sigma eps`` at x ``[B, D]``; alpha, sigma ``[B]``."""
        x = x.to(torch.float64)
        offset = x[:, None] - alpha[:, None, None] * self.means
        rotated = torch.einsum("kji,bkj->bki", self.eigenvectors, offset)
        variance = alpha[:, None, None] ** 2 * self.eigenvalues + sigma[:, None, None] ** 2
        log_component = -0.5 * (rotated**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        log_joint = log_component + self.weights.log()
        log_prob = torch.logsumexp(log_joint, dim=1)
        responsibility = torch.softmax(log_joint, dim=1)
        pull = torch.einsum("kij,bkj->bki", self.eigenvectors, -rotated / variance)
        return log_prob, (responsibility[..., None] * pull).sum(1)

    def component_of(self, x: Tensor) -> Tensor:
        """The likeliest component of each row of x: int64 ``[B]``."""
        x = x.to(torch.float64)
        rotated = torch.einsum("kji,bkj->bki", self.eigenvectors, x[:, None] - self.means)
        log_component = -0.5 * (rotated**2 / self.eigenvalues + self.eigenvalues.log()).sum(-1)
        return (log_component + self.weights.log()).argmax(1)


class ExactDenoiser(Denoiser):
    """The best denoiser there is for data from a Gaussian mixture, by closed form; it also knows its energy."""

    def __init__(self, distribution: GaussianMixture, process: Process) -> None:
        super().__init__()
        self.distribution = distribution
        self.process = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        """See :meth:`Denoiser.forward`; x_t is ``[B, D]`` (or any shape that flattens to it)."""
        level = self.process.level(t)
        log_prob, score = self.distribution.log_prob_and_score(x_t.flatten(1), level.alpha, level.sigma)
        eps = (-level.sigma[:, None] * score).view_as(x_t).to(x_t.dtype)
        u, v = PARAMETRIZATIONS["eps"](level, self.process, 1.0)
        return Prediction(x_t, eps, level, u, v, energy=-log_prob)
