r"""Memorization: metrics of samples that are copies of training data.

With :math:`d_1, d_2` a sample's distances to its two nearest training data, and r the nearest of them:

- ``nn_ratio``: the mean of :math:`d_1 / d_2`, near 1 for new samples, 0 for copies; ``memorised``: the share of samples
  where it is below 1/3 (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize");
- ``near_copies``: the share of samples nearer to a training datum than all but the closest 1 % of those are to each
  other;
- ``authenticity``: the share of samples farther from r than r's own nearest neighbor among the training data is (Alaa
  et al. 2022, https://arxiv.org/abs/2102.08921, section 3): about a half for fresh data (0.38 in the plane), 0 for
  copies.

Where training mirrors its images, an image and its mirror image are one datum, at the smaller of the two distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.distributed import all_gather_objects
from lit_diffusion.metrics.base import Context, Pair, SampleMetric, ScoreOptions, Seen, Subject, Value, mean_value
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.metrics.neighbours import Neighbourhood, nearest_exactly

MEMORISED_BELOW = 1.0 / 3.0
FLAGGED_ABOVE = 0.05
"""The share of near copies above which samples are flagged: five times the share of unseen data of the same law."""


class Memorisation(RowsMetric, SampleMetric):
    """Memorization metrics from the distances ``d_1 <= d_2`` of samples to their two nearest training data.

    ``nn_ratio`` is the mean of ``d_1 / d_2``; ``memorised`` the share of samples where it is below 1/3; ``near_copies``
    the share with ``d_1`` below the 1 % quantile of the distances between training data; ``authenticity`` the share
    with ``d_1`` above the distance of the nearest datum to its own nearest neighbor (Alaa et al. 2022,
    https://arxiv.org/abs/2102.08921). All lie in [0, 1].

    Args:
        real: features of the training data.
        pairs: number of the samples closest to a training datum to keep for inspection.
        mirrored: features of the same data mirrored left to right, float32 ``[M, D]``, where the model was trained on
            them, too.
        options: the metrics' options, for intervals; None: no intervals.
        record: entries of the protocol about the training data.
    """

    def __init__(
        self,
        real: Neighbourhood,
        pairs: int = 0,
        mirrored: Tensor | None = None,
        options: ScoreOptions | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(torch.float64)
        self.real = real
        self.pairs = pairs
        self.mirrored = mirrored
        self.options = options or ScoreOptions()
        self.record = record or {}
        self._closest: list[Pair] = []
        self._between: Tensor | None = None

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the subject's training data."""
        training, options = subject.training, subject.options
        return cls(
            Neighbourhood(training.features, subject.extractor.device, options.block_mb),
            subject.pairs,
            None if subject.mirrored is None else subject.mirrored.features,
            options,
            _record(subject),
        )

    @classmethod
    def unfit(cls, name: str, context: Context) -> str | None:
        """The reason where there are fewer than two training data."""
        training = context.real_count if context.training_count is None else context.training_count
        return "it needs at least 2 training data" if training < 2 else None

    def reset(self) -> None:
        """Forget the samples."""
        super().reset()
        self._closest = []

    def place(self, device: torch.device) -> None:
        """Move the computation of distances to a device."""
        self.real.device = device

    def take(self, seen: Seen) -> None:
        """Take a batch of samples, and keep images that are among the closest."""
        self.update(seen.features, seen.index, seen.data if seen.data.ndim == 4 else None)

    def update(self, features: Tensor, index: Tensor, images: np.ndarray | None = None) -> None:
        """Take samples, with the images so that the closest can be kept.

        Args:
            features: ``[B, D]``.
            index: int64 ``[B]``.
            images: uint8 ``[B, H, W, C]``.
        """
        distances, positions = self._nearest(features, self.real.features)
        mirrored = torch.zeros(len(features), dtype=torch.bool)
        if self.mirrored is not None:
            found = self._nearest(features, self.mirrored)
            mirrored = found[0][:, 0] < distances[:, 0]
            distances, order = torch.cat((distances, found[0]), dim=1).sort(dim=1, stable=True)
            positions = torch.cat((positions, found[1]), dim=1).gather(1, order)
        nearest = positions[:, :1]
        second = distances.masked_fill(positions == nearest, float("inf")).amin(1)  # Of another datum.
        super().update(torch.stack((distances[:, 0], second, nearest[:, 0].double()), dim=1), index)
        if images is not None and self.pairs:
            pairs = [
                Pair(float(distances[k, 0]), int(index[k]), int(nearest[k, 0]), images[k], bool(mirrored[k]))
                for k in distances[:, 0].argsort(stable=True)[: self.pairs].tolist()
            ]
            self._closest = _smallest([*self._closest, *pairs], self.pairs)

    def _nearest(self, queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return nearest_exactly(queries, points, 2, self.real.device, self.real.block_mb)

    def _between_data(self) -> Tensor:
        """Distances of the training data to their nearest neighbors: float64 ``[M]``."""
        if self._between is None:
            self._between = self.real.nearest_other()
            if self.mirrored is not None:
                distances, positions = self._nearest(self.real.features, self.mirrored)
                itself = positions == torch.arange(len(positions))[:, None]
                across = distances.masked_fill(itself, float("inf")).amin(1)
                self._between = torch.minimum(self._between, across)
        return self._between

    def compute(self) -> dict[str, Tensor]:
        """Contributions of the samples of all processes, float64 ``[N]`` each; the metrics are their means."""
        first, second, position = self.all_rows().unbind(1)
        between = self._between_data()
        # Where the data contain a datum twice, a copy of it has 0 / 0, which must not count as a new sample.
        ratio = torch.where(second > 0.0, first / second, 0.0)
        return {
            "nn_ratio": ratio,
            "memorised": (ratio < MEMORISED_BELOW).double(),
            "near_copies": ((first < torch.quantile(between, 0.01)) | (first == 0.0)).double(),
            "authenticity": (first > between[position.long()]).double(),
        }

    def values(self, total: int) -> dict[str, Value]:
        """The metrics, means of the contributions; ``near_copies`` is flagged above :data:`FLAGGED_ABOVE`."""
        found = {
            name: mean_value(parts, self.options, is_share=name != "nn_ratio") for name, parts in self.compute().items()
        }
        near_copies = found["near_copies"]
        copies = replace(near_copies, flagged=near_copies.value > FLAGGED_ABOVE)
        order = ("near_copies", "nn_ratio", "memorised", "authenticity")
        return {name: copies if name == "near_copies" else found[name] for name in order}

    def protocol(self, total: int) -> dict[str, Any]:
        """Entries about the training data, where they are not the reference."""
        return self.record

    def closest(self) -> list[Pair]:
        """The pairs of all processes with the smallest distances; all processes call it."""
        shares = all_gather_objects(self._closest)
        return _smallest([pair for share in shares for pair in share], self.pairs)


def _record(subject: Subject) -> dict[str, Any]:
    """The protocol's entries about the training data, where they are not the reference or not all of it."""
    reference, training = subject.reference, subject.training
    found: dict[str, Any] = {}
    if training is not reference:
        found = {
            "memorisation_reference": training.key,
            "memorisation_source": training.record.get("reference_source"),
            "memorisation_split": training.record.get("split"),
            "memorisation_n_real": len(training.features),
        }
    elif len(training.features) != training.gaussian.count:
        found = {"memorisation_n_real": len(training.features)}
    return {**found, "memorisation_mirrored": True} if subject.mirrored is not None else found


def _smallest(pairs: list[Pair], count: int) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (pair.distance, pair.index))[:count]
