"""The interface of a metric of samples.

A metric is a class that takes samples batch by batch and returns its values at the end, over all processes. It has a
row in :mod:`lit_diffusion.metrics.catalogue` with its name, direction and needs. The two ways to combine processes,
sums and rows, are in :mod:`lit_diffusion.metrics.gathering`; most metrics inherit from one of them, too:

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
    """Options of the metrics; the defaults are torch-fidelity's or else the literature's.

    Attributes:
        is_splits: number of parts of the Inception Score.
        kid_subsets: number of random subsets of the kernel distance.
        kid_subset_size: number of features in each subset.
        precision_neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        manifold_samples: the largest number of samples, and of data, for these four.
        block_mb: megabytes of distances held at once.
        bootstrap: number of resamples of each interval; 0: no intervals.
        seed: seed of the subsets and parts.

    Raises:
        UserError: for a value below its minimum.
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
    """The properties of an evaluation that decide which metrics are possible, known before any work.

    Attributes:
        extractor: the feature extractor.
        count: number of samples.
        real_count: number of real data with features.
        options: the metrics' options.
        has_features: true where the real features are available, not only their moments.
        has_captions: true where the samples have captions.
        training_count: number of training data, where they are not the real data; None: they are.
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
    """The references and options that samples are measured with.

    Attributes:
        extractor: the feature extractor.
        reference: statistics of the real data.
        training: statistics of the training data, of which samples may be copies.
        mirrored: those of the training data mirrored left to right, where the model was trained on these, too.
        shape: shape of a sample, ``(C, H, W)`` or ``(D,)``.
        options: the metrics' options.
        pairs: number of the samples closest to training data to keep for inspection.
        captioner: embeds images and captions; None: none.
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
    """A batch of samples and the extractor's output.

    Attributes:
        index: numbers of the samples, int64 ``[B]``.
        data: uint8 images ``[B, H, W, C]`` or float32 points ``[B, D]``.
        features: float32 ``[B, D]``.
        logits: a classifier's logits, float32 ``[B, K]``; None where the extractor is not a classifier.
        captions: caption of each sample, None without captions.
        filled: ``data`` padded to the size of the largest batch so far, for a metric's own networks.
    """

    index: Tensor
    data: np.ndarray
    features: Tensor
    logits: Tensor | None
    captions: list[str] | None
    filled: np.ndarray


@dataclass(frozen=True)
class Value:
    """A value of a metric with its uncertainty.

    Attributes:
        value: the value.
        error: standard deviation over parts or subsets, or standard error.
        interval: 95 % interval by resampling.
        count: number of samples behind the value, where not all.
        lacking: reasons by name for a missing ``error`` or ``interval``.
        flagged: true where the samples look like copies of training data.
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
        distance: distance between their features.
        index: number of the sample.
        neighbour: position of the datum among the real features.
        image: the sample, uint8 ``[H, W, C]``.
        mirrored: true where the datum's mirror image is nearest.
    """

    distance: float
    index: int
    neighbour: int
    image: np.ndarray
    mirrored: bool = False


class SampleMetric(ABC):
    """A metric of samples, which takes each process's share batch by batch and returns its values over all."""

    @classmethod
    @abstractmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric, ready to take samples.

        Args:
            names: the metrics of the catalogue to measure.
            subject: the references and options.
        """

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason why a metric is impossible though its needs are met, such as too few samples; None: possible."""
        return None

    @classmethod
    def caveat(cls, context: Context) -> str | None:
        """A caveat for the readers of its values; None for none."""
        return None

    @abstractmethod
    def take(self, seen: Seen) -> None:
        """Take a batch of samples."""

    @abstractmethod
    def values(self, total: int) -> dict[str, Value]:
        """The values over the ``total`` samples of all processes, which all call it."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the samples, and keep results about the real data."""

    def protocol(self, total: int) -> dict[str, Any]:
        """The settings behind the values of ``total`` samples, besides features, reference and number."""
        return {}

    def closest(self) -> list[Pair]:
        """Samples for inspection beside the training data nearest to them; all processes call it."""
        return []

    def place(self, device: torch.device) -> None:  # noqa: B027 (rows are kept on the CPU, and need no device)
        """Move the computation to a device."""


def resampled(statistic: Callable[[Tensor], float], count: int, options: ScoreOptions) -> tuple[float, float] | None:
    """The bootstrap interval of a statistic of ``count`` data; None where the options have no intervals."""
    if not options.bootstrap:
        return None
    return bootstrap_interval(statistic, count, options.bootstrap, options.seed)


def mean_value(parts: Tensor, options: ScoreOptions, is_share: bool, count: int | None = None) -> Value:
    """The mean of what each datum contributes, with its interval.

    Args:
        parts: float64 ``[N]``.
        options: the metrics' options.
        is_share: true where the parts are 0 or 1, so that a unanimous share has an interval, too.
        count: number of samples behind the value, where not all.
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
