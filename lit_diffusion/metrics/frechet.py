r"""The Frechet distance between the Gaussians with the moments of two sets of features.

.. math::  d^2 = |m_1 - m_2|^2 + \mathrm{tr}\big(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\big)

(Frechet 1957; Heusel et al. 2017, eq. 6). What the features are is said in a figure's name: ``fd/pixels`` is of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.errors import UserError


class Moments:
    """Mean and covariance of features, from sums in float64 that can be added over batches and processes.

    Args:
        dimension: D of the features.
    """

    def __init__(self, dimension: int) -> None:
        self.sums = torch.zeros(1 + dimension + dimension**2, dtype=torch.float64)
        """Their number, their sum and the sum of their outer products, in one tensor."""
        self.dimension = dimension

    def add(self, features: Tensor) -> None:
        """Take in ``[N, D]``."""
        features = features.detach().to("cpu", torch.float64)
        outer = (features.T @ features).flatten()
        count = torch.tensor([float(len(features))], dtype=torch.float64)
        self.sums += torch.cat((count, features.sum(0), outer))

    @property
    def count(self) -> int:
        """How many there were."""
        return int(self.sums[0])

    @property
    def mean(self) -> Tensor:
        """``[D]``."""
        return self.sums[1 : 1 + self.dimension] / self.sums[0]

    @property
    def covariance(self) -> Tensor:
        """``[D, D]``, with the divisor N - 1.

        Raises:
            UserError: for fewer than two.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, there are {self.count}")
        outer = self.sums[1 + self.dimension :].view(self.dimension, self.dimension)
        return (outer - self.sums[0] * torch.outer(self.mean, self.mean)) / (self.sums[0] - 1.0)


def frechet_distance(first: Moments, second: Moments) -> float:
    """``d^2`` above, by eigenvalues of symmetric matrices: no root of a product that rounding makes complex."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0.0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces - 2.0 * cross)
