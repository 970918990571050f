r"""The Frechet distance between the Gaussians with the moments of two sets of features.

.. math::  d^2 = |m_1 - m_2|^2 + \mathrm{tr}\big(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\big)

(Frechet 1957; FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500, eq. 6). A value's name contains the features:
FID is the distance in Inception's, ``fd/pixels`` in pixels.

Its bias by the number N of samples is :math:`c / N + O(N^{-2})` (Binkowski et al. 2018,
https://arxiv.org/abs/1801.01401; Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023), so that the intercept of a
line in 1/N through the distances of ever smaller parts of the samples is FD-infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from lit_diffusion.distributed import sum_over_ranks
from lit_diffusion.errors import UserError
from lit_diffusion.metrics.base import Context, SampleMetric, ScoreOptions, Seen, Subject, Value, resampled
from lit_diffusion.metrics.extractors import Extractor
from lit_diffusion.metrics.gathering import RowsMetric, SumsMetric, outside_inference_mode
from lit_diffusion.metrics.gaussian import Gaussian, Moments, gaussian_of

INFINITY_GROUPS = 10
"""The number of groups of samples with separate sums for FD-infinity; each is left out once for its error."""
_INFINITY_PARTS = (1, 2, 5)
"""The parts of FD-infinity's fit: the distances of all samples, of their halves and of their fifths."""


def frechet_distance(reference: Gaussian, other: Gaussian) -> float:
    """The squared distance ``d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})``.

    It is computed by eigenvalues of symmetric matrices, without the root of a product that rounding makes complex.
    """
    cross = reference.root @ other.covariance @ reference.root
    shared = torch.linalg.eigvalsh(cross).clamp(min=0.0).sqrt().sum()
    traces = reference.covariance.trace() + other.covariance.trace()
    return float((reference.mean - other.mean).square().sum() + traces - 2.0 * shared)


def _intercept(reference: Gaussian, groups: list[Tensor], dimension: int) -> float:
    """The intercept of a weighted linear fit of the distance in 1/N; a part of N samples has the weight N."""
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
    """Refuse FD-infinity where its smallest part has fewer than two samples a dimension, too few for the law 1/N.

    Raises:
        UserError: with the number of samples that it needs.
    """
    needed = 2 * dimension * max(_INFINITY_PARTS)
    if count < needed:
        raise UserError(f"FD-infinity in {dimension} dimensions needs at least {needed} samples, there are {count}")


def frechet_infinity(reference: Gaussian, groups: list[Tensor]) -> tuple[float, float]:
    """The Frechet distance extrapolated to infinitely many samples, and its standard error.

    The error is the delete-a-group jackknife's: the estimate is repeated without each group in turn.

    Args:
        reference: Gaussian of the real features; only the samples' number is extrapolated.
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


class _FrechetSums(SumsMetric, SampleMetric):
    """Sums of streamed features, in groups by the samples' numbers.

    Args:
        reference: Gaussian of the real features.
        groups: number of groups; each takes 34 MB in 2048 dimensions.
    """

    def __init__(self, reference: Gaussian, groups: int) -> None:
        dimension = len(reference.mean)
        super().__init__(groups, 1 + dimension + dimension**2)
        self.reference = reference
        self.dimension = dimension
        self.groups = groups

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are too few samples for a covariance."""
        return f"it needs at least 2 samples, there are {context.count}" if context.count < 2 else None

    def update(self, features: Tensor, index: Tensor) -> None:
        """Take the features ``[B, D]`` of samples number ``index`` ``[B]``."""
        with outside_inference_mode():
            group = index.to(features.device) % self.groups
            for k in range(self.groups):
                Moments(self.dimension, self.sums[k]).add(features[group == k])

    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""
        self.update(seen.features.to(self.sums.device), seen.index)

    def place(self, device: torch.device) -> None:
        """Move the computation to a CUDA device, else to the CPU: MPS has no float64."""
        self.to(device if device.type == "cuda" else "cpu")


class FrechetDistance(_FrechetSums):
    r"""The Frechet distance of streamed features to a reference, at least 0; in Inception's features the FID.

    .. math::  d^2 = |m_1 - m_2|^2 + \mathrm{tr}\big(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}\big)

    (Heusel et al. 2017, https://arxiv.org/abs/1706.08500, eq. 6.)

    Args:
        reference: Gaussian of the real features.
        options: the metrics' options; with intervals, the features are kept.
    """

    def __init__(self, reference: Gaussian, options: ScoreOptions | None = None) -> None:
        super().__init__(reference, groups=1)
        self.options = options or ScoreOptions()
        self.kept = RowsMetric() if self.options.bootstrap else None

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the subject's reference."""
        return cls(subject.reference.gaussian, subject.options)

    @classmethod
    def caveat(cls, context: Context) -> str | None:
        """The caveat for fewer samples than dimensions."""
        return bias_caveat(context.extractor, context.count)

    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""
        super().take(seen)
        if self.kept is not None:
            self.kept.update(seen.features, seen.index)

    def reset(self) -> None:
        """Forget the samples."""
        super().reset()
        if self.kept is not None:
            self.kept.reset()

    def compute(self) -> float:
        """The distance over the samples of all processes.

        Raises:
            UserError: for fewer than two samples.
        """
        sums = sum_over_ranks(self.sums.sum(0)).cpu()
        return frechet_distance(self.reference, Moments(self.dimension, sums).gaussian())

    def values(self, total: int) -> dict[str, Value]:
        """The distance, with options for intervals also its bootstrap interval."""
        value, interval = self.compute(), None
        if self.kept is not None:
            rows = self.kept.compute()
            interval = resampled(
                lambda chosen: frechet_distance(self.reference, gaussian_of(rows[chosen])), len(rows), self.options
            )
        return {"fid": Value(value, interval=interval)}


class FrechetInfinity(_FrechetSums):
    """The Frechet distance of streamed features extrapolated to infinitely many samples, ``d^2(N) = FD_inf + c / N``.

    Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023; see :func:`frechet_infinity`.

    Args:
        reference: Gaussian of the real features.
    """

    def __init__(self, reference: Gaussian) -> None:
        super().__init__(reference, INFINITY_GROUPS)

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the subject's reference."""
        return cls(subject.reference.gaussian)

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are too few samples for the smallest part."""
        try:
            require_enough_for_infinity(context.count, context.extractor.dimension)
        except UserError as error:
            return super().unfit(name, context) or str(error)
        return None

    def compute(self) -> tuple[float, float]:
        """The distance and its standard error over the samples of all processes.

        Raises:
            UserError: for too few samples.
        """
        return frechet_infinity(self.reference, list(sum_over_ranks(self.sums).cpu()))

    def values(self, total: int) -> dict[str, Value]:
        """The distance with its standard error."""
        return {"fid_infinity": Value(*self.compute())}


def bias_caveat(extractor: Extractor, count: int) -> str | None:
    """The caveat of a Frechet distance of fewer samples than dimensions; None where there are enough."""
    if count >= extractor.dimension:
        return None
    return (
        f"{count} samples are fewer than the {extractor.dimension} dimensions of {extractor.name}'s features: the "
        f"Frechet distance is biased upward and compares only with others of {count}; its name has the number"
    )
