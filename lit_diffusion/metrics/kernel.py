r"""The kernel distance of features; in Inception's features the KID.

The unbiased estimate of the squared maximum mean discrepancy under :math:`k(a, b) = (a^\top b / D + 1)^3`:

.. math::  \frac{1}{m(m-1)} \sum_{i \ne j} \big(k(x_i, x_j) + k(y_i, y_j)\big) - \frac{2}{m^2} \sum_{i,j} k(x_i, y_j)

averaged over random subsets of m features of each set (Binkowski et al. 2018, https://arxiv.org/abs/1801.01401).
Unbiased at any m, so it may be slightly negative.

The standard deviation over the subsets is an error only where these differ: for subsets of m among n features it
understates that of fresh ones by a factor of about :math:`\sqrt{1 - m / n}`, and it is 0 where every subset is the
whole set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.base import Context, SampleMetric, Seen, Subject, Value
from lit_diffusion.metrics.gathering import RowsMetric


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two sets ``[m, D]``, in their precision.

    Raises:
        UserError: for fewer than two features in a set.
    """
    m = len(x)
    if m < 2 or len(y) != m:
        raise UserError(f"a kernel distance needs at least 2 of each set, there are {m} and {len(y)}")
    within = sum(float((k := _kernel(z, z)).sum() - k.diagonal().sum()) for z in (x, y))
    return within / (m * (m - 1)) - 2.0 * float(_kernel(x, y).sum()) / m**2


class KernelDistance(RowsMetric, SampleMetric):
    r"""The kernel distance (KID), mean and standard deviation over random subsets, of features ``[B, D]`` a batch.

    .. math::  \frac{1}{m(m-1)} \sum_{i \ne j} \big(k(x_i, x_j) + k(y_i, y_j)\big)
               - \frac{2}{m^2} \sum_{i,j} k(x_i, y_j), \qquad k(a, b) = (a^\top b / D + 1)^3

    (Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.) The subsets are torch-fidelity's for the same seed and
    counts.

    Args:
        reference: features of the real data ``[M, D]``.
        subsets: number of subsets.
        subset_size: m; reduced where there are fewer features.
        seed: seed of the subsets.
        n_real: number of all real data, where only some of their features are kept; None: the reference's.
    """

    def __init__(
        self,
        reference: Tensor,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 2020,
        n_real: int | None = None,
    ) -> None:
        super().__init__()
        self.reference = reference
        self.subsets = subsets
        self.subset_size = subset_size
        self.seed = seed
        self.n_real = len(reference) if n_real is None else n_real

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the reference's features."""
        options, reference = subject.options, subject.reference
        return cls(
            reference.features, options.kid_subsets, options.kid_subset_size, options.seed, reference.gaussian.count
        )

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are too few samples or data."""
        if context.count < 2:
            return f"it needs at least 2 samples, there are {context.count}"
        if context.real_count < 2:
            return f"it needs at least 2 real data, there are {context.real_count}"
        return None

    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""
        self.update(seen.features, seen.index)

    def drawn(self, count: int) -> tuple[int, int]:
        """Number and size of the subsets for ``count`` samples; one where it is the whole of both sets."""
        size = min(self.subset_size, count, len(self.reference))
        return 1 if size == count == len(self.reference) else self.subsets, size

    def has_error(self, count: int) -> bool:
        """True where the standard deviation is an error: subsets have at most three quarters of either set."""
        subsets, size = self.drawn(count)
        return subsets > 1 and size <= 0.75 * min(count, len(self.reference))

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the subsets; :meth:`has_error` tells where the latter is an error.

        Raises:
            UserError: for fewer than two samples.
        """
        features = self.all_rows()
        subsets, size = self.drawn(len(features))
        generator = np.random.RandomState(self.seed)
        values = []
        for _ in range(subsets):
            chosen = [
                torch.from_numpy(generator.choice(len(z), size, replace=False)) for z in (features, self.reference)
            ]
            # float64: the sum of a million cubes cancels to a ten-thousandth of itself.
            values.append(squared_mmd(features[chosen[0]].double(), self.reference[chosen[1]].double()))
        return float(np.mean(values)), float(np.std(values))

    def values(self, total: int) -> dict[str, Value]:
        """The distance, whose error is the standard deviation over the subsets where :meth:`has_error`."""
        distance, deviation = self.compute()
        if self.has_error(total):
            return {"kid": Value(distance, deviation)}
        _, size = self.drawn(total)
        reason = f"subsets of {size} share most of {total} samples and {len(self.reference)} data"
        return {"kid": Value(distance, lacking={"error": reason})}

    def protocol(self, total: int) -> dict[str, Any]:
        """The subsets, and the number of real data where not all."""
        subsets, size = self.drawn(total)
        fewer = {} if len(self.reference) == self.n_real else {"kid_n_real": len(self.reference)}
        return {"kid_subsets": subsets, "kid_subset_size": size, "metric_seed": self.seed, **fewer}
