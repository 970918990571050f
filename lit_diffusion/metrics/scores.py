"""All figures of a set of samples at once: one forward a batch, one name and one protocol for each figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.distributed import summed
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.failures import Attempt, Failure
from lit_diffusion.metrics.bootstrap import bootstrap_interval, unanimous_interval
from lit_diffusion.metrics.clip_score import CLIPScore
from lit_diffusion.metrics.extractors import CLIP, Extractor
from lit_diffusion.metrics.families import HIGHER_IS_BETTER
from lit_diffusion.metrics.frechet import FrechetDistance, frechet_distance, gaussian_of, require_enough_for_infinity
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.metrics.inception_score import InceptionScore, scores_of_parts
from lit_diffusion.metrics.kernel import KernelDistance
from lit_diffusion.metrics.manifolds import ManifoldMetrics
from lit_diffusion.metrics.memorisation import FLAGGED_ABOVE, Memorisation, Pair
from lit_diffusion.metrics.neighbours import BLOCK_MB, Neighbourhood
from lit_diffusion.metrics.reference import Reference
from lit_diffusion.randomness import keyed_permutation

MetricName = Literal[
    "fid", "fid_infinity", "is", "kid", "precision", "recall", "density", "coverage", "memorisation", "clip_score"
]
DEFAULT_METRICS: tuple[MetricName, ...] = (
    "fid",
    "is",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "memorisation",
)
_MANIFOLDS = ("precision", "recall", "density", "coverage")
_SHARES = frozenset({"precision", "recall", "coverage", "near_copies", "memorised", "authenticity"})
_MEMORISATION = ("near_copies", "nn_ratio", "memorised", "authenticity")


def count_label(count: int) -> str:
    """A number of samples in a figure's name: 500, 2k, 50k."""
    return f"{count // 1000}k" if count % 1000 == 0 and count > 0 else str(count)


def metric_key(metric: str, extractor: str, count: int) -> str:
    """The name that a figure is logged under: ``fid-2k``, ``fd/digits-500``, ``precision/inception-10k``.

    Only what is of Inception's features is called FID, KID or Inception Score without more; other features are named.
    """
    own = {"fid": "fd", "fid_infinity": "fd_infinity", "kid": "kd"}
    if extractor == "inception" and metric in ("fid", "fid_infinity", "kid", "is"):
        return f"{metric}-{count_label(count)}"
    if metric == "clip_score":
        return f"{metric}-{count_label(count)}"
    return f"{own.get(metric, metric)}/{extractor}-{count_label(count)}"


@dataclass(frozen=True)
class ScoreOptions:
    """How figures are computed; the defaults are the literature's, and torch-fidelity's where that has any.

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
class Result:
    """Figures and what they mean.

    Attributes:
        values: by their names.
        errors: standard deviation over the parts or subsets, or standard error, of those that have one.
        intervals: 95 % bootstrap intervals, where asked for; of shares of 0 and 1 the exact binomial ones.
        protocol: how all of them were made.
        pairs: samples closest to training data, each with the datum's position in the reference.
        flagged: whether the samples look like copies of training data.
        left_out: metrics, errors and intervals that are not there, each with the reason.
        failed: metrics that failed, where that was to be survived, and how.
    """

    values: dict[str, float]
    errors: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: dict[str, Any]
    pairs: list[Pair] = field(default_factory=list)
    flagged: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, list[Failure]] = field(default_factory=dict)


def choose_metrics(
    wanted: Sequence[MetricName] | None,
    extractor: Extractor,
    count: int,
    real_count: int,
    options: ScoreOptions,
    has_features: bool = True,
    has_captions: bool = False,
    training_count: int | None = None,
) -> list[MetricName]:
    """Those asked for, each checked before any work; of the default ones, those that can be had.

    Args:
        wanted: None for the default ones.
        extractor: of the features.
        count: of samples.
        real_count: of real data with features.
        options: of the metrics.
        has_features: whether the real features are known, not their moments alone.
        has_captions: whether the samples have captions.
        training_count: of training data, where these are not the real data; None: they are.

    Raises:
        UserError: for one that cannot be computed of these.
    """
    given = (extractor, count, real_count, options, has_features, has_captions, training_count)
    refused = metrics_left_out(wanted, *given)
    if wanted is not None and refused:
        metric, reason = next(iter(refused.items()))
        raise UserError(f"{metric} cannot be had: {reason}")
    chosen = [metric for metric in (DEFAULT_METRICS if wanted is None else wanted) if metric not in refused]
    if not chosen:
        raise UserError(f"no metric can be had of {count} samples and {real_count} real data; give more of both")
    return list(dict.fromkeys(chosen))


def metrics_left_out(
    wanted: Sequence[MetricName] | None,
    extractor: Extractor,
    count: int,
    real_count: int,
    options: ScoreOptions,
    has_features: bool = True,
    has_captions: bool = False,
    training_count: int | None = None,
) -> dict[str, str]:
    """Why each of those metrics that cannot be had cannot; the arguments are those of :func:`choose_metrics`.

    Raises:
        UserError: for a metric that there is not.
    """
    for metric in wanted or ():
        require_choice("", "metrics", metric, get_args(MetricName))
    training = real_count if training_count is None else training_count
    left_out: dict[str, str] = {}
    for metric in DEFAULT_METRICS if wanted is None else wanted:
        reason = _refused(metric, extractor, count, real_count, options, has_features, has_captions, training)
        if reason is not None:
            left_out[metric] = reason
    return left_out


def _refused(
    metric: MetricName,
    extractor: Extractor,
    count: int,
    real_count: int,
    options: ScoreOptions,
    has_features: bool,
    has_captions: bool,
    training_count: int,
) -> str | None:
    if metric == "is":
        if not extractor.has_logits:
            return f"the Inception Score needs a classifier, extractor {extractor.name} is none"
        if count < options.is_splits:
            return f"{options.is_splits} parts need at least as many samples, there are {count}"
    if metric in ("fid", "fid_infinity", "kid") and count < 2:
        return f"it needs at least 2 samples, there are {count}"
    if metric == "fid_infinity":
        try:
            require_enough_for_infinity(count, extractor.dimension)
        except UserError as error:
            return str(error)
    if metric == "kid" and has_features and real_count < 2:
        return f"it needs at least 2 real data, there are {real_count}"
    if metric in ("kid", "memorisation", *_MANIFOLDS) and not has_features:
        return "the reference holds mean and covariance only; give the images"
    if metric in _MANIFOLDS:
        k = max(options.precision_neighbours, options.density_neighbours)
        if min(count, real_count, options.manifold_samples) <= k:
            return f"neighbourhoods of {k} need more than {k} samples and data"
    if metric == "memorisation" and training_count < 2:
        return "it needs at least 2 training data"
    if metric == "clip_score" and not has_captions:
        return "the samples have no captions"
    return None


def left_out_line(left_out: Mapping[str, str]) -> str:
    """What was left out and why, each reason once; empty where nothing was."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(them)} ({reason})" for reason, them in names.items())


class Scores:
    """Takes in samples batch by batch and gives all figures at the end.

    All processes make one, take in their share of the samples, and call :meth:`compute` together.

    Args:
        metrics: as :func:`choose_metrics` gives them.
        extractor: of the features.
        reference: of the real data.
        shape: of a sample, ``(C, H, W)`` or ``(D,)``.
        options: of the metrics.
        pairs: so many of the samples closest to real data are kept to be looked at.
        clip: embeds images and captions for the CLIP score; None: the extractor itself.
        training: what the samples may be copies of; None: the reference.
        mirrored: the same data mirrored left to right, where the training saw those too.
        left_out: metrics that cannot be had, with the reasons, for the results.
    """

    def __init__(
        self,
        metrics: Sequence[MetricName],
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
        self.metrics = tuple(metrics)
        self.extractor = extractor
        self.reference = reference
        self.training = training if training is not None else reference
        self.mirrored = mirrored
        self.left_out = dict(left_out or {})
        self.shape = shape
        self.options = options = options or ScoreOptions()
        self.survives = False
        """Whether the other metrics are to be had where the computation of one fails."""
        self.count = 0
        self._batch = 0
        self._captioner = clip if clip is not None else extractor if isinstance(extractor, CLIP) else None
        device = extractor.device
        infinity = "fid_infinity" in metrics
        self._frechet = FrechetDistance(reference.gaussian, infinity) if infinity or "fid" in metrics else None
        self._inception = InceptionScore(options.is_splits, options.seed) if "is" in metrics else None
        self._kernel = (
            KernelDistance(reference.features, options.kid_subsets, options.kid_subset_size, options.seed)
            if "kid" in metrics
            else None
        )
        self._manifolds = None
        if any(metric in metrics for metric in _MANIFOLDS):
            some = _at_most(reference.features, options.manifold_samples)
            real = Neighbourhood(some, device, options.block_mb)
            self._manifolds = ManifoldMetrics(
                real, options.precision_neighbours, options.density_neighbours, options.manifold_samples
            )
        self._memorisation = (
            Memorisation(
                Neighbourhood(self.training.features, device, options.block_mb),
                pairs,
                None if mirrored is None else mirrored.features,
            )
            if "memorisation" in metrics
            else None
        )
        self._clip = CLIPScore() if "clip_score" in metrics else None
        self._rows = _Rows() if options.bootstrap and "fid" in metrics else None

    def to(self, device: torch.device) -> None:
        """Compute on a device."""
        self.extractor.to(device)
        for metric in (self._manifolds, self._memorisation):
            if metric is not None:
                metric.real.device = device
        if self._frechet is not None:
            self._frechet.to(device if device.type == "cuda" else "cpu")  # float64, which MPS has not

    def release(self) -> None:
        """Forget the samples and give the device's memory back."""
        self.reset()
        self.to(torch.device("cpu"))

    def reset(self) -> None:
        """Forget the samples; what was found out about the real data stays."""
        self.count = 0
        parts = (
            self._frechet,
            self._inception,
            self._kernel,
            self._manifolds,
            self._memorisation,
            self._clip,
            self._rows,
        )
        for part in parts:
            if part is not None:
                part.reset()

    def update(self, data: np.ndarray, index: Tensor, captions: list[str] | None = None) -> None:
        """Take in samples number ``index`` ``[B]``.

        Args:
            data: uint8 images ``[B, H, W, C]`` or float32 points ``[B, D]``.
            index: int64 ``[B]``.
            captions: of each, where there are any.
        """
        kept = len(index)
        if kept == 0:
            return
        self.count += kept
        # One batch shape throughout: a network's last digits depend on it.
        self._batch = max(self._batch, kept)
        filled = np.concatenate((data, np.repeat(data[-1:], self._batch - kept, axis=0)))
        found = self.extractor(filled)
        features = found.features[:kept]
        if self._frechet is not None:
            self._frechet.update(features.to(self._frechet.sums.device), index)
        if self._inception is not None:
            assert found.logits is not None
            self._inception.update(found.logits[:kept], index)
        if self._kernel is not None:
            self._kernel.update(features, index)
        if self._manifolds is not None:
            self._manifolds.update(features, index)
        if self._memorisation is not None:
            self._memorisation.update(features, index, data if len(self.shape) == 3 else None)
        if self._rows is not None:
            self._rows.update(features, index)
        if self._clip is not None:
            assert self._captioner is not None
            assert captions is not None
            embedded = features if self._captioner is self.extractor else self._captioner(filled).features[:kept]
            self._clip.update(embedded, self._captioner.captions(captions))

    def key(self, metric: str, count: int) -> str:
        """The name of one of its figures of ``count`` samples."""
        if metric in _MANIFOLDS:
            count = min(count, self.options.manifold_samples)
        return metric_key(metric, self.extractor.name, count)

    def compute(self, total: int) -> Result:
        """The figures of the samples of all processes.

        Args:
            total: samples over all processes, for the names.

        Raises:
            UserError: where the figures cannot be had of so many.
            ValueError: if so many were not taken in.
        """
        taken = int(summed(torch.tensor(float(self.count))))
        if taken != total:
            raise ValueError(f"{taken} samples were taken in, the figures' names would say {total}")
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        left_out = dict(self.left_out)
        pairs: list[Pair] = []
        flagged = False
        failed: dict[str, list[Failure]] = {}

        @contextmanager
        def attempted(metric: str) -> Iterator[None]:
            if not self.survives:
                yield
                return
            with Attempt() as attempt:
                yield
            if attempt.failures:
                failed[metric] = attempt.failures

        def note(metric: str, value: float, error: float | None = None) -> str:
            key = self.key(metric, total)
            values[key] = value
            if error is not None:
                errors[key] = error
            return key

        def note_mean(metric: str, parts: Tensor) -> None:
            key = note(metric, float(parts.mean()))
            if not self.options.bootstrap:
                return
            if bool((parts != parts[0]).any()):
                intervals[key] = self._interval(lambda chosen: float(parts[chosen].mean()), len(parts))
            elif metric in _SHARES:
                intervals[key] = unanimous_interval(values[key], len(parts))
            else:
                left_out[f"{metric} interval"] = "all resamples give the same value"

        if self._frechet is not None and "fid" in self.metrics:
            with attempted("fid"):
                key = note("fid", self._frechet.compute())
                if self._rows is not None:
                    rows = self._rows.compute()
                    intervals[key] = self._interval(
                        lambda chosen: frechet_distance(self.reference.gaussian, gaussian_of(rows[chosen])), len(rows)
                    )
        if self._frechet is not None and "fid_infinity" in self.metrics:
            with attempted("fid_infinity"):
                note("fid_infinity", *self._frechet.infinity())
        if self._inception is not None:
            with attempted("is"):
                score, deviation = self._inception.compute()
                key = note("is", score)
                if self.options.is_splits > 1 and total >= 2 * self.options.is_splits:
                    errors[key] = deviation
                else:
                    left_out["is error"] = f"{self.options.is_splits} parts of {total} samples have no spread"
                if self.options.bootstrap:
                    logits = self._inception.shuffled()
                    parts = self.options.is_splits
                    intervals[key] = self._interval(
                        lambda chosen: float(np.mean(scores_of_parts(logits[chosen], parts))), len(logits)
                    )
        if self._kernel is not None:
            with attempted("kid"):
                distance, deviation = self._kernel.compute()
                key = note("kid", distance)
                if self._kernel.has_error(total):
                    errors[key] = deviation
                else:
                    _, size = self._kernel.drawn(total)
                    left_out["kid error"] = (
                        f"subsets of {size} share most of {total} samples and {len(self._kernel.reference)} data"
                    )
        if self._manifolds is not None:
            with attempted("manifolds"):
                manifolds = self._manifolds.compute()
                for metric in _MANIFOLDS:
                    if metric in self.metrics:
                        note_mean(metric, manifolds[metric])
        if self._memorisation is not None:
            with attempted("memorisation"):
                scores = self._memorisation.compute()
                for metric in _MEMORISATION:
                    note_mean(metric, scores[metric])
                pairs = self._memorisation.closest()
                flagged = float(scores["near_copies"].mean()) > FLAGGED_ABOVE
        if self._clip is not None:
            with attempted("clip_score"):
                score, error = self._clip.compute()
                key = note("clip_score", score)
                if total > 1:
                    errors[key] = error
                else:
                    left_out["clip_score error"] = "one image has no spread"
        if self.options.bootstrap:
            for metric in ("fid_infinity", "kid", "clip_score"):
                if metric in self.metrics and metric not in failed:
                    left_out[f"{metric} interval"] = "it is not resampled; its error is given where there is one"
        protocol = {**self.protocol(total), **self._of_fewer_or_others()}
        return Result(values, errors, intervals, protocol, pairs, flagged, left_out, failed)

    def _interval(self, statistic: Callable[[Tensor], float], count: int) -> tuple[float, float]:
        return bootstrap_interval(statistic, count, self.options.bootstrap, self.options.seed)

    def protocol(self, total: int) -> dict[str, Any]:
        """How the figures of ``total`` samples are made, as far as metrics know."""
        options, record = self.options, self.reference.record
        protocol: dict[str, Any] = {
            **self.extractor.protocol(self.shape),
            "reference": self.reference.key,
            "reference_source": record.get("reference_source"),
            "split": record.get("split"),
            "n_real": self.reference.gaussian.count or None,
            "n_fake": total,
        }
        if self._inception is not None:
            protocol["is_splits"] = options.is_splits
        if self._kernel is not None:
            subsets, size = self._kernel.drawn(total)
            protocol |= {"kid_subsets": subsets, "kid_subset_size": size}
        if self._manifolds is not None:
            protocol |= {
                "precision_neighbours": options.precision_neighbours,
                "density_neighbours": options.density_neighbours,
                "manifold_n_real": len(self._manifolds.real.features),
            }
        if self._inception is not None or self._kernel is not None:
            protocol["metric_seed"] = options.seed
        if self._clip is not None:
            assert self._captioner is not None
            protocol |= {"clip": self._captioner.model, "clip_sha256": self._captioner.sha256}
        if options.bootstrap:
            protocol["bootstrap"] = options.bootstrap
            if self._manifolds is not None:
                protocol["bootstrap_of"] = "samples; of recall and coverage the real data"
        return protocol

    def _of_fewer_or_others(self) -> dict[str, Any]:
        """Where a metric is not of all the reference's data, or is of others: how many, and which."""
        found: dict[str, Any] = {}
        reference, training = self.reference, self.training
        if self._kernel is not None and len(reference.features) != reference.gaussian.count:
            found["kid_n_real"] = len(reference.features)
        if self._memorisation is None:
            return found
        if training is not reference:
            found |= {
                "memorisation_reference": training.key,
                "memorisation_source": training.record.get("reference_source"),
                "memorisation_split": training.record.get("split"),
                "memorisation_n_real": len(training.features),
            }
        elif len(training.features) != training.gaussian.count:
            found["memorisation_n_real"] = len(training.features)
        if self.mirrored is not None:
            found["memorisation_mirrored"] = True
        return found


class _Rows(RowsMetric):
    """The features themselves, to be resampled."""

    def compute(self) -> Tensor:
        return self.all_rows()


def _at_most(features: Tensor, most: int) -> Tensor:
    """All of them, or a fixed random choice of so many."""
    if len(features) <= most:
        return features
    return features[keyed_permutation(0, "manifold", len(features))[:most].sort().values]


def bias_caveat(extractor: Extractor, count: int) -> str | None:
    """What to say of a Frechet distance of so few samples; None where there are enough."""
    if count >= extractor.dimension:
        return None
    return (
        f"{count} samples are fewer than the {extractor.dimension} dimensions of {extractor.name}'s features: the "
        f"Frechet distance is biased upward and compares only with others of {count}; its name says the number"
    )


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether a value of a metric beats another; NaN beats nothing."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value > than if metric in HIGHER_IS_BETTER else value < than
