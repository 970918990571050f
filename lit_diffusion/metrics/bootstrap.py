"""Percentile bootstrap intervals (Efron 1979) of a metric over further samples of the same model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_diffusion.randomness import keyed_uniform


def bootstrap_interval(
    statistic: Callable[[Tensor], float], count: int, replicates: int, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """The central interval of a statistic over resampled data, shifted to its value on the data.

    A resample has fewer different data. A statistic whose bias depends on their number, such as a Frechet distance, is
    larger on every resample than on the data, so the interval is shifted back by the mean difference.

    Args:
        statistic: a function of positions int64 ``[count]``, some of them repeated, that returns the value.
        count: number of data.
        replicates: number of resamples.
        seed: seed of the resamples.
        confidence: probability of the interval.
    """
    values = torch.empty(replicates, dtype=torch.float64)
    for k in range(replicates):
        uniform = keyed_uniform(seed, "bootstrap", torch.arange(count), draw=k, dtype=torch.float64)
        values[k] = statistic((uniform * count).long().clamp(max=count - 1))
    shift = statistic(torch.arange(count)) - values.mean()
    tail = 0.5 * (1.0 - confidence)
    low, high = torch.quantile(values + shift, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high


def unanimous_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (Clopper and Pearson 1934) of a share of 0 or 1, where no resample differs.

    Args:
        share: 0 or 1.
        count: number of data.
        confidence: probability of the interval.
    """
    bound = (0.5 * (1.0 - confidence)) ** (1.0 / count)
    return (bound, 1.0) if share == 1.0 else (0.0, 1.0 - bound)
