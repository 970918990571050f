"""The choice of an evaluation's metrics, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.metrics.base import Context, SampleMetric
from lit_diffusion.metrics.catalogue import CATALOGUE, Need, Row, default_metrics

_UNMET: dict[Need, Callable[[Context], str | None]] = {
    "logits": lambda context: (
        None if context.extractor.has_logits else f"it needs a classifier, extractor {context.extractor.name} is none"
    ),
    "features": lambda context: (
        None if context.has_features else "the reference holds mean and covariance only; give the images"
    ),
    "captions": lambda context: None if context.has_captions else "the samples have no captions",
}


def class_of(row: Row) -> type[SampleMetric]:
    """The class that measures a metric of the catalogue."""
    module, _, name = row.measured_by.rpartition(".")
    found = getattr(import_module(module), name)
    assert issubclass(found, SampleMetric)
    return found


@dataclass(frozen=True)
class Choice:
    """The metrics of an evaluation.

    Attributes:
        metrics: names of the metrics that can be measured, each once.
        left_out: reasons by name for the requested metrics that cannot be measured.
        caveats: caveats for the readers of the values.
    """

    metrics: tuple[str, ...]
    left_out: dict[str, str]
    caveats: tuple[str, ...] = ()


def choose_metrics(wanted: Sequence[str] | None, context: Context) -> Choice:
    """The requested metrics, each checked before any work; of the default metrics, those that can be measured.

    Args:
        wanted: names of metrics; None for the default ones.
        context: the evaluation, as far as known before any work.

    Raises:
        UserError: for an unknown metric, or a requested one that cannot be measured.
    """
    for name in wanted or ():
        require_choice("", "metrics", name, CATALOGUE)
    names = dict.fromkeys(default_metrics() if wanted is None else wanted)
    left_out = {name: reason for name in names if (reason := _refused(CATALOGUE[name], context)) is not None}
    if wanted is not None and left_out:
        name, reason = next(iter(left_out.items()))
        raise UserError(f"{name} cannot be measured: {reason}")
    chosen = tuple(name for name in names if name not in left_out)
    if not chosen:
        raise UserError(
            f"no metric can be measured with {context.count} samples and {context.real_count} real data; give more of "
            f"both"
        )
    caveats = (class_of(CATALOGUE[name]).caveat(context) for name in chosen)
    return Choice(chosen, left_out, tuple(dict.fromkeys(caveat for caveat in caveats if caveat is not None)))


def _refused(row: Row, context: Context) -> str | None:
    unmet = (_UNMET[need](context) for need in row.needs)
    return next((reason for reason in unmet if reason is not None), None) or class_of(row).unfit(row.name, context)


def left_out_line(left_out: Mapping[str, str]) -> str:
    """One line about the metrics left out, each reason once; empty for none."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(them)} ({reason})" for reason, them in names.items())
