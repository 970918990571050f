r"""The Inception Score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498).

.. math::  \mathrm{IS} = \exp \mathbb{E}_x \mathrm{KL}\big(p(y|x) \,\|\, p(y)\big), \qquad p(y) = \mathbb{E}_x p(y|x)

the mean over ten parts of the samples, with p(y) of each part. From 1 to the number of classes; higher is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.base import Context, SampleMetric, ScoreOptions, Seen, Subject, Value, resampled
from lit_diffusion.metrics.gathering import RowsMetric


def inception_score(logits: Tensor) -> float:
    """The Inception Score of one part, from logits ``[N, K]``, in float64."""
    log_p = logits.double().log_softmax(dim=1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # Finite where the probabilities themselves are 0.
    return float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())


def scores_of_parts(logits: Tensor, parts: int) -> list[float]:
    """The Inception Scores of consecutive parts whose sizes differ by at most one."""
    ends = [k * len(logits) // parts for k in range(parts + 1)]
    return [inception_score(logits[start:end]) for start, end in itertools.pairwise(ends)]


class InceptionScore(RowsMetric, SampleMetric):
    r"""The Inception Score, mean and standard deviation over parts of the samples, from logits ``[B, K]`` a batch.

    .. math::  \mathrm{IS} = \exp \mathbb{E}_x \mathrm{KL}\big(p(y|x) \,\|\, p(y)\big)

    (Salimans et al. 2016, https://arxiv.org/abs/1606.03498; from 1 to the number of classes.) The deviation has
    torch-fidelity's divisor, the number of parts. The samples are shuffled before they are split, since a folder sorted
    by class would score 1; the order is torch-fidelity's for the same seed.

    Args:
        splits: the number of parts.
        seed: seed of the shuffle.
        options: the metrics' options, for intervals; None: no intervals.
    """

    def __init__(self, splits: int = 10, seed: int = 2020, options: ScoreOptions | None = None) -> None:
        super().__init__()
        self.splits = splits
        self.seed = seed
        self.options = options or ScoreOptions()

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric for the extractor's logits."""
        options = subject.options
        return cls(options.is_splits, options.seed, options)

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are fewer samples than parts."""
        parts = context.options.is_splits
        if context.count < parts:
            return f"{parts} parts need at least as many samples, there are {context.count}"
        return None

    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""
        assert seen.logits is not None
        self.update(seen.logits, seen.index)

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts.

        Raises:
            UserError: for fewer samples than parts.
        """
        shuffled = self.shuffled()
        if len(shuffled) < self.splits:
            raise UserError(
                f"an Inception Score in {self.splits} parts needs as many samples, there are {len(shuffled)}"
            )
        parts = scores_of_parts(shuffled, self.splits)
        return float(np.mean(parts)), float(np.std(parts))

    def shuffled(self) -> Tensor:
        """The logits of the samples of all processes in shuffled order: ``[N, K]``."""
        logits = self.all_rows()
        # A generator of numpy, as torch-fidelity's; torch's global one, used in training, is untouched.
        return logits[torch.from_numpy(np.random.RandomState(self.seed).permutation(len(logits)))]

    def values(self, total: int) -> dict[str, Value]:
        """The score, whose error is the standard deviation over the parts."""
        score, deviation = self.compute()
        interval = None
        if self.options.bootstrap:
            logits = self.shuffled()
            interval = resampled(
                lambda chosen: float(np.mean(scores_of_parts(logits[chosen], self.splits))), len(logits), self.options
            )
        if self.splits > 1 and total >= 2 * self.splits:
            return {"is": Value(score, deviation, interval)}
        lacking = {"error": f"{self.splits} parts of {total} samples have no spread"}
        return {"is": Value(score, interval=interval, lacking=lacking)}

    def protocol(self, total: int) -> dict[str, Any]:
        """The number of parts and the seed of the shuffle."""
        return {"is_splits": self.splits, "metric_seed": self.seed}
