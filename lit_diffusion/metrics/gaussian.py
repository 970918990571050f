"""Mean and covariance of features, from sums in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_diffusion.errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mean: float64 ``[D]``.
        covariance: float64 ``[D, D]``.
        count: number of the features.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T


class Moments:
    """Mean and covariance of features, from sums in float64 that can be added over batches and processes.

    Args:
        dimension: D, the dimension of the features.
        sums: initial sums, float64 ``[1 + D + D^2]``; None: zeros.
    """

    def __init__(self, dimension: int, sums: Tensor | None = None) -> None:
        self.sums = torch.zeros(1 + dimension + dimension**2, dtype=torch.float64) if sums is None else sums
        """The number of features, their sum and the sum of their outer products, in one tensor."""
        self.dimension = dimension

    def add(self, features: Tensor) -> None:
        """Add features ``[N, D]``."""
        features = features.detach().to(self.sums.device, torch.float64)
        self.sums[0] += len(features)
        self.sums[1 : 1 + self.dimension] += features.sum(0)
        outer = self.sums[1 + self.dimension :].view(self.dimension, self.dimension)
        outer.addmm_(features.T, features)

    @property
    def count(self) -> int:
        """The number of features."""
        return int(self.sums[0])

    def gaussian(self) -> Gaussian:
        """Mean and covariance, the latter with the divisor N - 1.

        Raises:
            UserError: for fewer than two features.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, there are {self.count}")
        mean = self.sums[1 : 1 + self.dimension] / self.sums[0]
        outer = self.sums[1 + self.dimension :].view(self.dimension, self.dimension)
        covariance = (outer - self.sums[0] * torch.outer(mean, mean)) / (self.sums[0] - 1.0)
        return Gaussian(mean, covariance, self.count)


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features ``[N, D]``.

    Raises:
        UserError: for fewer than two features.
    """
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()
