"""What a metric of samples is.

A metric is a class that takes samples in batch by batch and says its values at the end, over all processes. It has a
row in :mod:`lit_diffusion.metrics.catalogue`, which says its name, direction and needs. The two ways to add up over
processes, sums and rows, are in :mod:`lit_diffusion.metrics.gathering`; most metrics inherit from one of them, too:

.. code-block:: python

    class MeanNorm(RowsMetric, SampleMetric):
        @classmethod
        def of(cls, names, subject):
            return cls()

        def take(self, seen):
            self.update(seen.features.norm(dim=1, keepdim=True), seen.index)

        def values(self, total):
            return {"mean_norm": Value(float(self.all_rows().mean()))}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.bootstrap import bootstrap_interval, unanimous_interval
from lit_diffusion.metrics.extractors import CLIP, Extractor
from lit_diffusion.metrics.neighbours import BLOCK_MB
from lit_diffusion.metrics.reference import Reference


@dataclass(frozen=True)
class ScoreOptions:
    """How metrics are computed; the defaults are the literature's, and torch-fidelity's where that has any.

    Attributes:
        is_splits: parts of the Inception Score.
        kid_subsets: random subsets of the kernel distance.
        kid_subset_size: features in each.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        manifold_samples: the most samples, and the most data, of those four.
        block_mb: megabytes of distances held at once.
        bootstrap: resamples of each interval; 0: no intervals.
        seed: of the subsets and parts.
    """

    is_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    precision_neighbours: int = 3
    density_neighbours: int = 5
    manifold_samples: int = 10_000
    block_mb: int = BLOCK_MB
    bootstrap: int = 0
    seed: int = 2020

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = {"bootstrap": 0, "seed": 0, "kid_subset_size": 2}.get(name, 1)
            if value < least:
                raise UserError(f"{name} is {value}; give at least {least}")
        if self.bootstrap == 1:
            raise UserError("bootstrap is 1, and one resample has no spread; give some hundreds, or 0 for no intervals")


@dataclass(frozen=True)
class Context:
    """What there is to measure with, known before any work.

    Attributes:
        extractor: of the features.
        count: of samples.
        real_count: of real data with features.
        options: of the metrics.
        has_features: whether the real features are known, not their moments alone.
        has_captions: whether the samples have captions.
        training_count: of training data, where these are not the real data; None: they are.
    """

    extractor: Extractor
    count: int
    real_count: int
    options: ScoreOptions = field(default_factory=ScoreOptions)
    has_features: bool = True
    has_captions: bool = False
    training_count: int | None = None


@dataclass(frozen=True)
class Subject:
    """What samples are measured against, and how.

    Attributes:
        extractor: of the features.
        reference: of the real data.
        training: of what the samples may be copies of.
        mirrored: the same data mirrored left to right, where the training saw those too.
        shape: of a sample, ``(C, H, W)`` or ``(D,)``.
        options: of the metrics.
        pairs: so many of the samples closest to training data are kept to be looked at.
        captioner: embeds images and captions; None where there is none.
    """

    extractor: Extractor
    reference: Reference
    training: Reference
    mirrored: Reference | None
    shape: tuple[int, ...]
    options: ScoreOptions
    pairs: int = 0
    captioner: CLIP | None = None


@dataclass(frozen=True)
class Seen:
    """A batch of samples and what the extractor says of it.

    Attributes:
        index: numbers of the samples, int64 ``[B]``.
        data: uint8 images ``[B, H, W, C]`` or float32 points ``[B, D]``.
        features: float32 ``[B, D]``.
        logits: of a classifier, float32 ``[B, K]``; None where the extractor is none.
        captions: of each sample, where there are any.
        filled: ``data`` filled up to the shape of the largest batch so far, for networks of a metric's own.
    """

    index: Tensor
    data: np.ndarray
    features: Tensor
    logits: Tensor | None
    captions: list[str] | None
    filled: np.ndarray


@dataclass(frozen=True)
class Value:
    """A value of a metric and how sure it is.

    Attributes:
        value: itself.
        error: standard deviation over parts or subsets, or standard error.
        interval: of 95 %, by resampling.
        count: of samples that it is of, where not of all.
        lacking: what cannot be had, ``error`` or ``interval``, with the reason.
        flagged: whether it says that the samples look like copies of training data.
    """

    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None
    count: int | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)
    flagged: bool = False


@dataclass(frozen=True)
class Pair:
    """A sample and the training datum nearest to it.

    Attributes:
        distance: between their features.
        index: of the sample.
        neighbour: position of the datum among the real features.
        image: the sample, uint8 ``[H, W, C]``.
        mirrored: whether it is the datum's mirror image that is nearest.
    """

    distance: float
    index: int
    neighbour: int
    image: np.ndarray
    mirrored: bool = False


class SampleMetric(ABC):
    """A metric of samples: takes them in batch by batch, each process its share, and says its values together."""

    @classmethod
    @abstractmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Ready to take samples in.

        Args:
            names: the metrics of the catalogue that are wanted of it.
            subject: what they are measured against.
        """

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """Why a metric cannot be had although its needs are met, too few samples for instance; None: it can."""
        return None

    @classmethod
    def caveat(cls, context: Context) -> str | None:
        """What a reader of its values must know; None for nothing."""
        return None

    @abstractmethod
    def take(self, seen: Seen) -> None:
        """Take in a batch."""

    @abstractmethod
    def values(self, total: int) -> dict[str, Value]:
        """The values of the samples of all processes, which all call it; there are ``total``."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the samples; what was found out about the real data stays."""

    def protocol(self, total: int) -> dict[str, Any]:
        """What the values of ``total`` samples depend on besides features, reference and number."""
        return {}

    def closest(self) -> list[Pair]:
        """Samples to be looked at beside the training data nearest to them; all processes call it."""
        return []

    def place(self, device: torch.device) -> None:  # noqa: B027 (rows are kept on the CPU, and need no device)
        """Compute on a device."""


def resampled(statistic: Callable[[Tensor], float], count: int, options: ScoreOptions) -> tuple[float, float] | None:
    """The bootstrap interval of a statistic of ``count`` data, where the options ask for intervals."""
    if not options.bootstrap:
        return None
    return bootstrap_interval(statistic, count, options.bootstrap, options.seed)


def mean_value(parts: Tensor, options: ScoreOptions, is_share: bool, count: int | None = None) -> Value:
    """The mean of what each datum contributes, with its interval.

    Args:
        parts: float64 ``[N]``.
        options: of the metrics.
        is_share: whether the parts are 0 or 1, so that a unanimous share has an interval, too.
        count: of samples, where not of all.
    """
    value = float(parts.mean())
    if not options.bootstrap:
        return Value(value, count=count)
    if bool((parts != parts[0]).any()):
        interval = resampled(lambda chosen: float(parts[chosen].mean()), len(parts), options)
        return Value(value, interval=interval, count=count)
    if is_share:
        return Value(value, interval=unanimous_interval(value, len(parts)), count=count)
    return Value(value, count=count, lacking={"interval": "all resamples give the same value"})
