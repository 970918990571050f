r"""The Frechet distance between the Gaussians with the moments of two sets of features.

.. math::  d^2 = |m_1 - m_2|^2 + \mathrm{tr}\big(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\big)

(Frechet 1957; Heusel et al. 2017, eq. 6). What the features are is said in a figure's name: of Inception's it is the
FID, ``fd/pixels`` is of pixels.

Its bias by the number N of samples is :math:`c / N + O(N^{-2})` (Binkowski et al. 2018; Chong and Forsyth 2020), so
that a line in 1/N through the distances of ever smaller parts of the samples gives FD-infinity where it meets 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_diffusion.distributed import summed
from lit_diffusion.errors import UserError
from lit_diffusion.metrics.gathering import SumsMetric, outside_inference_mode

INFINITY_GROUPS = 10
"""Of samples, whose sums are kept apart for FD-infinity; each is left out once for its error."""
_INFINITY_PARTS = (1, 2, 5)
"""FD-infinity's line goes through the distances of all samples, of their halves and of their fifths."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mean: float64 ``[D]``.
        covariance: float64 ``[D, D]``.
        count: of the features that they were taken of.
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
        dimension: D of the features.
        sums: to start from, float64 ``[1 + D + D^2]``; None: nothing.
    """

    def __init__(self, dimension: int, sums: Tensor | None = None) -> None:
        self.sums = torch.zeros(1 + dimension + dimension**2, dtype=torch.float64) if sums is None else sums
        """Their number, their sum and the sum of their outer products, in one tensor."""
        self.dimension = dimension

    def add(self, features: Tensor) -> None:
        """Take in ``[N, D]``."""
        features = features.detach().to(self.sums.device, torch.float64)
        self.sums[0] += len(features)
        self.sums[1 : 1 + self.dimension] += features.sum(0)
        outer = self.sums[1 + self.dimension :].view(self.dimension, self.dimension)
        outer.addmm_(features.T, features)

    @property
    def count(self) -> int:
        """How many there were."""
        return int(self.sums[0])

    def gaussian(self) -> Gaussian:
        """Mean and covariance, the latter with the divisor N - 1.

        Raises:
            UserError: for fewer than two.
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
        UserError: for fewer than two.
    """
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(reference: Gaussian, other: Gaussian) -> float:
    """``d^2`` above, by eigenvalues of symmetric matrices: no root of a product that rounding makes complex."""
    cross = reference.root @ other.covariance @ reference.root
    shared = torch.linalg.eigvalsh(cross).clamp(min=0.0).sqrt().sum()
    traces = reference.covariance.trace() + other.covariance.trace()
    return float((reference.mean - other.mean).square().sum() + traces - 2.0 * shared)


def _intercept(reference: Gaussian, groups: list[Tensor], dimension: int) -> float:
    """Where the weighted line of the distance in 1/N meets 0; a part of N samples has a weight of N."""
    rows, distances, weights = [], [], []
    for parts in _INFINITY_PARTS:
        for part in torch.arange(len(groups)).tensor_split(parts):
            sums = torch.stack([groups[k] for k in part]).sum(0)
            gaussian = Moments(dimension, sums).gaussian()
            rows.append((1.0, 1.0 / gaussian.count))
            distances.append(frechet_distance(reference, gaussian))
            weights.append(float(gaussian.count))
    scale = torch.tensor(weights, dtype=torch.float64).sqrt()
    design = torch.tensor(rows, dtype=torch.float64) * scale[:, None]
    solution = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64) * scale).solution
    return float(solution[0])


def require_enough_for_infinity(count: int, dimension: int) -> None:
    """Refuse FD-infinity where its smallest part has too few samples for the law 1/N: fewer than two a dimension.

    Raises:
        UserError: with the number that is needed.
    """
    needed = 2 * dimension * max(_INFINITY_PARTS)
    if count < needed:
        raise UserError(f"FD-infinity in {dimension} dimensions needs at least {needed} samples, there are {count}")


def frechet_infinity(reference: Gaussian, groups: list[Tensor]) -> tuple[float, float]:
    """The Frechet distance that infinitely many samples would have, and its standard error.

    The error is the delete-a-group jackknife's: the estimate is made again without each group in turn.

    Args:
        reference: of the real features; their number is as it is, only the samples' is extrapolated.
        groups: the sums (:attr:`Moments.sums`) of equally large groups of samples, at least ten.

    Raises:
        UserError: for too few samples, see :func:`require_enough_for_infinity`.
    """
    dimension = len(reference.mean)
    require_enough_for_infinity(int(sum(float(group[0]) for group in groups)), dimension)
    value = _intercept(reference, groups, dimension)
    without = torch.tensor([_intercept(reference, groups[:k] + groups[k + 1 :], dimension) for k in range(len(groups))])
    error = float(((len(groups) - 1) * without.double().var(correction=0)).sqrt())
    return value, error


class FrechetDistance(SumsMetric):
    """The Frechet distance of streamed features to a reference.

    Args:
        reference: of the real features.
        infinity: also keep what :meth:`infinity` needs: ten times the memory, 335 MB in 2048 dimensions.
    """

    def __init__(self, reference: Gaussian, infinity: bool = False) -> None:
        dimension, groups = len(reference.mean), INFINITY_GROUPS if infinity else 1
        super().__init__(groups, 1 + dimension + dimension**2)
        self.reference = reference
        self.dimension = dimension
        self.groups = groups

    def update(self, features: Tensor, index: Tensor) -> None:
        """Take in the features ``[B, D]`` of samples number ``index`` ``[B]``."""
        with outside_inference_mode():
            group = index.to(features.device) % self.groups
            for k in range(self.groups):
                Moments(self.dimension, self.sums[k]).add(features[group == k])

    def compute(self) -> float:
        """Of the samples of all processes.

        Raises:
            UserError: for fewer than two samples.
        """
        sums = summed(self.sums.sum(0)).cpu()
        return frechet_distance(self.reference, Moments(self.dimension, sums).gaussian())

    def infinity(self) -> tuple[float, float]:
        """:func:`frechet_infinity` of the samples of all processes; all of them call it.

        Raises:
            UserError: for too few samples.
        """
        return frechet_infinity(self.reference, list(summed(self.sums).cpu()))
