r"""Precision, recall, density and coverage of samples' features.

With :math:`B_k(y)` the ball around y that reaches its k-th nearest neighbor in its own set, N samples x and M real y:

- precision: the share of x in some :math:`B_3(y)`; recall: the share of y in some :math:`B_3(x)` (Kynkaanniemi et al.
  2019, https://arxiv.org/abs/1904.06991);
- density: the mean over x of the number of :math:`B_5(y)` that contain it, over 5; coverage: the share of y with an x
  in :math:`B_5(y)` (Naeem et al. 2020, https://arxiv.org/abs/2002.09797).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.base import Context, SampleMetric, ScoreOptions, Seen, Subject, Value, mean_value
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.metrics.neighbours import Neighbourhood, distance_blocks
from lit_diffusion.randomness import keyed_permutation

METRICS = ("precision", "recall", "density", "coverage")


def compare_manifolds(
    samples: Tensor, real: Neighbourhood, precision_neighbours: int = 3, density_neighbours: int = 5
) -> dict[str, Tensor]:
    """The contributions of each of the samples ``[N, D]`` and each datum; the metrics are their means.

    Returns:
        float64: ``precision`` ``[N]`` (0 or 1), ``recall`` ``[M]`` (0 or 1), ``density`` ``[N]``, ``coverage`` ``[M]``
        (0 or 1).

    Raises:
        UserError: if either set has no k-th neighbor.
    """
    fewest, k = min(len(samples), len(real.features)), max(precision_neighbours, density_neighbours)
    if fewest <= k:
        raise UserError(f"{k} nearest neighbors need more than {k} samples and data, there are {fewest}")
    device = real.device
    real_ball = real.squared_radius(precision_neighbours).to(device)
    dense_ball = real.squared_radius(density_neighbours).to(device)
    own = Neighbourhood(samples, device, real.block_mb)
    sample_ball = own.squared_radius(precision_neighbours).to(device)
    precision, density = [], []
    recall = torch.zeros(len(real.features), dtype=torch.bool, device=device)
    coverage = torch.zeros_like(recall)
    for start, squares in distance_blocks(samples, real.features, device, real.block_mb):
        precision.append((squares <= real_ball).any(1))
        recall |= (squares <= sample_ball[start : start + len(squares), None]).any(0)
        inside = squares <= dense_ball
        density.append(inside.sum(1))
        coverage |= inside.any(0)
    found = {"precision": torch.cat(precision), "recall": recall, "density": torch.cat(density), "coverage": coverage}
    shares = {name: parts.cpu().double() for name, parts in found.items()}
    return {**shares, "density": shares["density"] / density_neighbours}


class ManifoldMetrics(RowsMetric, SampleMetric):
    r"""Precision, recall, density and coverage of samples' features x, ``[B, D]`` a batch, against real features y.

    With :math:`B_k(y)` the ball to the k-th nearest neighbor: precision and recall are the shares of x in some
    :math:`B_3(y)` and of y in some :math:`B_3(x)` (Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991); density
    is the mean number of :math:`B_5(y)` that contain x, over 5, and coverage the share of y with an x in
    :math:`B_5(y)` (Naeem et al. 2020, https://arxiv.org/abs/2002.09797). All are in [0, 1] but density, which is at
    least 0.

    Args:
        real: features of the real data.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        most: number of samples used, those with the lowest numbers; both sets should have about equally many.
        names: the metrics to measure, of these four.
        options: the metrics' options, for intervals; None: no intervals.
    """

    def __init__(
        self,
        real: Neighbourhood,
        precision_neighbours: int = 3,
        density_neighbours: int = 5,
        most: int = 10_000,
        names: Sequence[str] = METRICS,
        options: ScoreOptions | None = None,
    ) -> None:
        super().__init__()
        self.real = real
        self.precision_neighbours = precision_neighbours
        self.density_neighbours = density_neighbours
        self.most = most
        self.names = tuple(names)
        self.options = options or ScoreOptions()

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the reference's features, at most ``manifold_samples`` of them."""
        options = subject.options
        real = Neighbourhood(
            _at_most(subject.reference.features, options.manifold_samples), subject.extractor.device, options.block_mb
        )
        k = options.precision_neighbours, options.density_neighbours
        return cls(real, *k, options.manifold_samples, names, options)

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are too few samples or data for k nearest neighbors."""
        options = context.options
        k = max(options.precision_neighbours, options.density_neighbours)
        if min(context.count, context.real_count, options.manifold_samples) <= k:
            return f"{k} nearest neighbors need more than {k} samples and data"
        return None

    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""
        self.update(seen.features, seen.index)

    def place(self, device: torch.device) -> None:
        """Move the computation of distances to a device."""
        self.real.device = device

    def compute(self) -> dict[str, Tensor]:
        """The contributions of the samples of all processes, see :func:`compare_manifolds`.

        Raises:
            UserError: if either set has no k-th neighbor.
        """
        samples = self.all_rows()[: self.most]
        return compare_manifolds(samples, self.real, self.precision_neighbours, self.density_neighbours)

    def values(self, total: int) -> dict[str, Value]:
        """The metrics, means of the contributions."""
        found, count = self.compute(), min(total, self.most)
        return {
            name: mean_value(found[name], self.options, is_share=name != "density", count=count)
            for name in METRICS
            if name in self.names
        }

    def protocol(self, total: int) -> dict[str, Any]:
        """The numbers of neighbors and of real data."""
        protocol: dict[str, Any] = {
            "precision_neighbours": self.precision_neighbours,
            "density_neighbours": self.density_neighbours,
            "manifold_n_real": len(self.real.features),
        }
        if self.options.bootstrap:
            protocol["bootstrap_of"] = "samples; of recall and coverage the real data"
        return protocol


def _at_most(features: Tensor, most: int) -> Tensor:
    """All features, or a fixed random choice of ``most``."""
    if len(features) <= most:
        return features
    return features[keyed_permutation(0, "manifold", len(features))[:most].sort().values]
