"""All metrics of a set of samples at once: one forward pass a batch, one name and one protocol for each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.distributed import sum_over_ranks
from lit_diffusion.failures import Attempt, Failure
from lit_diffusion.metrics.base import Pair, SampleMetric, ScoreOptions, Seen, Subject, Value
from lit_diffusion.metrics.catalogue import CATALOGUE, metric_key
from lit_diffusion.metrics.choice import class_of
from lit_diffusion.metrics.extractors import CLIP, Extractor
from lit_diffusion.metrics.reference import Reference


@dataclass(frozen=True)
class Result:
    """Metric values with their errors, intervals and protocol.

    Attributes:
        values: values by name.
        errors: standard deviation over the parts or subsets, or standard error, of those that have one.
        intervals: 95 % bootstrap intervals, if requested; for shares of 0 and 1 exact binomial ones.
        protocol: the settings behind all values.
        pairs: samples closest to training data, each with the datum's position in the reference.
        flagged: true where the samples look like copies of training data.
        left_out: reasons by name for missing metrics, errors and intervals.
        failed: failures by metric, where failures are survived.
    """

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    flagged: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, list[Failure]] = field(default_factory=dict)


class Scores:
    """The metrics of a set of samples, taken batch by batch.

    All processes build one, take their share of the samples, and call :meth:`compute` together.

    Args:
        metrics: names of the metrics, as :func:`~lit_diffusion.metrics.choice.choose_metrics` returns them.
        extractor: the feature extractor.
        reference: statistics of the real data.
        shape: shape of a sample, ``(C, H, W)`` or ``(D,)``.
        options: the metrics' options.
        pairs: number of the samples closest to training data to keep for inspection.
        clip: embeds images and captions; None: the extractor, where it is CLIP.
        training: statistics of the training data; None: the reference.
        mirrored: those of the training data mirrored left to right, where the model was trained on these, too.
        left_out: reasons by name for metrics that cannot be measured, for the results.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        extractor: Extractor,
        reference: Reference,
        shape: tuple[int, ...],
        options: ScoreOptions | None = None,
        pairs: int = 0,
        clip: CLIP | None = None,
        training: Reference | None = None,
        mirrored: Reference | None = None,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        captioner = clip if clip is not None else extractor if isinstance(extractor, CLIP) else None
        options = options or ScoreOptions()
        self.subject = Subject(
            extractor, reference, training or reference, mirrored, tuple(shape), options, pairs, captioner
        )
        self.left_out = dict(left_out or {})
        self.survives = False
        """True where a failure of one metric does not end the others."""
        self.count = 0
        self._batch = 0
        names: dict[type[SampleMetric], list[str]] = {}
        for row in CATALOGUE.values():
            if row.name in metrics:
                names.setdefault(class_of(row), []).append(row.name)
        self._metrics = {tuple(those): kind.of(those, self.subject) for kind, those in names.items()}

    def metric(self, name: str) -> SampleMetric:
        """The object that measures a metric of the catalogue."""
        return next(metric for names, metric in self._metrics.items() if name in names)

    def to(self, device: torch.device) -> None:
        """Move the computation to a device."""
        self.subject.extractor.to(device)
        for metric in self._metrics.values():
            metric.place(device)

    def release(self) -> None:
        """Forget the samples and free the device's memory."""
        self.reset()
        self.to(torch.device("cpu"))

    def reset(self) -> None:
        """Forget the samples, and keep results about the real data."""
        self.count = 0
        for metric in self._metrics.values():
            metric.reset()

    def update(self, data: np.ndarray, index: Tensor, captions: list[str] | None = None) -> None:
        """Take samples number ``index`` ``[B]``.

        Args:
            data: uint8 images ``[B, H, W, C]`` or float32 points ``[B, D]``.
            index: int64 ``[B]``.
            captions: caption of each sample, None without captions.
        """
        kept = len(index)
        if kept == 0:
            return
        self.count += kept
        # One batch shape throughout, since a network's last digits depend on it.
        self._batch = max(self._batch, kept)
        filled = np.concatenate((data, np.repeat(data[-1:], self._batch - kept, axis=0)))
        found = self.subject.extractor(filled)
        logits = None if found.logits is None else found.logits[:kept]
        seen = Seen(index, data, found.features[:kept], logits, captions, filled)
        for metric in self._metrics.values():
            metric.take(seen)

    def key(self, value: str, count: int) -> str:
        """The full name of a value of ``count`` samples."""
        return metric_key(value, self.subject.extractor.name, count)

    def compute(self, total: int) -> Result:
        """The values over the samples of all processes.

        Args:
            total: number of samples over all processes, for the names.

        Raises:
            UserError: where there are too few samples for a value.
            ValueError: if another number of samples was taken.
        """
        taken = int(sum_over_ranks(torch.tensor(float(self.count))))
        if taken != total:
            raise ValueError(f"{taken} samples were taken, the values' names would say {total}")
        result = Result(protocol=self.protocol(total), left_out=dict(self.left_out))
        flagged = False
        for names, metric in self._metrics.items():
            with self._attempted("+".join(names), result.failed):
                for name, value in metric.values(total).items():
                    self._note(result, name, value, total)
                    flagged |= value.flagged
                result.pairs.extend(metric.closest())
        return replace(result, flagged=flagged)

    def _note(self, result: Result, name: str, value: Value, total: int) -> None:
        key = self.key(name, total if value.count is None else value.count)
        result.values[key] = value.value
        if value.error is not None:
            result.errors[key] = value.error
        if value.interval is not None:
            result.intervals[key] = value.interval
        lacking = dict(value.lacking)
        if self.subject.options.bootstrap and value.interval is None:
            lacking.setdefault("interval", "it is not resampled; its error is given where there is one")
        result.left_out.update({f"{name} {what}": reason for what, reason in lacking.items()})

    @contextmanager
    def _attempted(self, name: str, failed: dict[str, list[Failure]]) -> Iterator[None]:
        if not self.survives:
            yield
            return
        with Attempt() as attempt:
            yield
        if attempt.failures:
            failed[name] = attempt.failures

    def protocol(self, total: int) -> dict[str, Any]:
        """The settings behind the values of ``total`` samples, as far as metrics know them."""
        reference, options = self.subject.reference, self.subject.options
        protocol: dict[str, Any] = {
            **self.subject.extractor.protocol(self.subject.shape),
            "reference": reference.key,
            "reference_source": reference.record.get("reference_source"),
            "split": reference.record.get("split"),
            "n_real": reference.gaussian.count or None,
            "n_fake": total,
        }
        for metric in self._metrics.values():
            protocol |= metric.protocol(total)
        return {**protocol, "bootstrap": options.bootstrap} if options.bootstrap else protocol
