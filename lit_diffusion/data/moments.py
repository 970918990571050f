"""The standard deviation of data sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_diffusion.randomness import keyed_permutation

MEASURED = 10_000
"""So many data are measured; of more, a subset of this size."""
_BLOCK = 1_000


def standard_deviation(values: Callable[[Tensor], Tensor], count: int) -> tuple[float, int]:
    """The standard deviation of all numbers in a data set around their one mean, and of how many data it is.

    Args:
        values: from positions ``[b]`` to data ``[b, ...]``, float.
        count: how many there are.
    """
    subset = torch.arange(count) if count <= MEASURED else keyed_permutation(0, "deviation", count)[:MEASURED]
    number, total, squares = 0, 0.0, 0.0
    for part in subset.split(_BLOCK):
        block = values(part).double()
        number += block.numel()
        total += float(block.sum())
        squares += float(block.square().sum())
    mean = total / number
    return max(squares / number - mean**2, 0.0) ** 0.5, len(subset)
