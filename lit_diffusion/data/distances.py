"""The largest distance between data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_diffusion.randomness import keyed_permutation

EXACT_UP_TO = 10_000
"""The largest number of data of which all pairs are compared; of more data, a subset of this size."""
_BLOCK = 1_000


@dataclass(frozen=True)
class Diameter:
    """The largest distance between two data.

    Attributes:
        found: the largest distance found, a lower bound.
        upper: an upper bound; equal to ``found`` when every pair was compared.
        count: number of data.
        compared: number of data of which every pair was compared.
    """

    found: float
    upper: float
    count: int
    compared: int

    @property
    def statement(self) -> str:
        """A line about the value and its bound."""
        if self.compared == self.count:
            return f"the largest distance between two of the {self.count} training data, all pairs compared"
        return (
            f"the largest distance found between two of the {self.count} training data "
            f"(all pairs of {self.compared}, then the farthest of all from those two); it is at most {self.upper:.4g}"
        )


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # The direct form: |a|^2 + |b|^2 - 2ab would lose half the digits where a and b are close.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def largest_distance(values: Callable[[Tensor], Tensor], count: int, exact_up_to: int = EXACT_UP_TO) -> Diameter:
    """The diameter of a data set in the Euclidean norm.

    Up to ``exact_up_to`` data every pair is compared. For more data, every pair of a subset; then one pass over all
    data finds the farthest from either end of that pair, and from their midpoint: twice that radius bounds every
    distance.

    Args:
        values: a function from positions ``[b]`` to data ``[b, ...]``, float.
        count: number of data.
        exact_up_to: size of the subset.
    """
    everything = count <= exact_up_to
    subset = torch.arange(count) if everything else keyed_permutation(0, "diameter", count)[:exact_up_to]
    flat = torch.cat([values(part).flatten(1) for part in subset.split(_BLOCK)]).double()
    best, pair = 0.0, (0, 0)
    for start in range(0, len(flat), _BLOCK):
        distance = _distances(flat[start : start + _BLOCK], flat[start:])
        value, position = distance.flatten().max(0)
        if float(value) > best:
            row, column = divmod(int(position), distance.shape[1])
            best, pair = float(value), (start + row, start + column)
    if everything:
        return Diameter(best, best, count, count)
    ends = flat[list(pair)]
    anchors = torch.cat((ends, ends.mean(0, keepdim=True)))
    radius = torch.zeros(3, dtype=torch.float64)
    for part in torch.arange(count).split(_BLOCK):
        radius = torch.maximum(radius, _distances(values(part).flatten(1).double(), anchors).amax(0))
    return Diameter(max(best, float(radius[:2].max())), 2.0 * float(radius[2]), count, exact_up_to)
