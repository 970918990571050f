r"""How far generated and real features lie in each other's neighbourhoods.

With :math:`B_k(y)` the ball around y that reaches its k-th nearest neighbour in its own set, N samples x and M real y:

- precision: the share of x in some :math:`B_3(y)`; recall: the share of y in some :math:`B_3(x)` (Kynkaanniemi et al.
  2019);
- density: the mean over x of the number of :math:`B_5(y)` that hold it, over 5; coverage: the share of y with an x in
  :math:`B_5(y)` (Naeem et al. 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.metrics.neighbours import Neighbourhood, distance_blocks


def compare_manifolds(
    samples: Tensor, real: Neighbourhood, precision_neighbours: int = 3, density_neighbours: int = 5
) -> dict[str, Tensor]:
    """What each of the samples ``[N, D]`` and each datum contributes; the metrics are the means.

    Returns:
        float64: ``precision`` ``[N]`` (0 or 1), ``recall`` ``[M]`` (0 or 1), ``density`` ``[N]``, ``coverage`` ``[M]``
        (0 or 1).

    Raises:
        UserError: if either set has no k-th neighbour.
    """
    fewest, k = min(len(samples), len(real.features)), max(precision_neighbours, density_neighbours)
    if fewest <= k:
        raise UserError(f"neighbourhoods of {k} need more than {k} samples and data, there are {fewest}")
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


class ManifoldMetrics(RowsMetric):
    """Precision, recall, density and coverage of samples' features, ``[B, D]`` a batch, against real ones.

    Args:
        real: features of the real data.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        most: only the samples with the ``most`` lowest numbers count; both sets should have about equally many.
    """

    def __init__(
        self, real: Neighbourhood, precision_neighbours: int = 3, density_neighbours: int = 5, most: int = 10_000
    ) -> None:
        super().__init__()
        self.real = real
        self.precision_neighbours = precision_neighbours
        self.density_neighbours = density_neighbours
        self.most = most

    def compute(self) -> dict[str, Tensor]:
        """The contributions of the samples of all processes, see :func:`compare_manifolds`.

        Raises:
            UserError: if either set has no k-th neighbour.
        """
        samples = self.all_rows()[: self.most]
        return compare_manifolds(samples, self.real, self.precision_neighbours, self.density_neighbours)
