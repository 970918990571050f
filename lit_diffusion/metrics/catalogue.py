"""The catalogue of metrics: their values' names, directions, needs and panels.

A metric is a class in a file of its own (:class:`lit_diffusion.metrics.base.SampleMetric`) and a row of this table.
Evaluations, ``evaluate``, ``doctor``, the best checkpoints, ``report``, the dashboard and docs/metrics.md read it. The
classes are named here, and loaded where something is measured.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

Direction = Literal["min", "max"]
Need = Literal["logits", "features", "captions"]
"""The logits of a classifier; the features of the real data, not their moments alone; captions of the samples."""


@dataclass(frozen=True)
class Panel:
    """A plot of curves, shared by metrics of one kind.

    Attributes:
        title: the title.
        hint: advice for reading it.
        axis: the line plot's y axis on the dashboard; empty for the default.
    """

    title: str
    hint: str
    axis: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the catalogue, a metric.

    Attributes:
        name: name in configurations, e.g. ``eval.metrics``.
        measured_by: class path of the :class:`~lit_diffusion.metrics.base.SampleMetric`; metrics that share their work
            share a class.
        better: ``min`` where lower values are better, ``max`` where higher; None: neither.
        panel: the panel of its plot.
        needs: its requirements.
        default: true where it is measured by default.
        values: names of its values; empty: one value with the metric's name.
        elsewhere: the name of its value in features other than Inception's; empty: the same.
        features_named: when the names of its values contain the extractor.
    """

    name: str
    measured_by: str
    better: Direction | None
    panel: Panel
    needs: tuple[Need, ...] = ()
    default: bool = True
    values: tuple[str, ...] = ()
    elsewhere: str = ""
    features_named: Literal["always", "unless inception", "never"] = "always"

    @property
    def value_names(self) -> tuple[str, ...]:
        """All names of its values, without extractor and number."""
        return tuple(dict.fromkeys((*(self.values or (self.name,)), *([self.elsewhere] if self.elsewhere else []))))


_FIDELITY = Panel(
    "Precision and recall",
    "Precision falls where samples are poor, recall where kinds of images are missing.",
    "y from 0 to 1",
)
_DENSITY = Panel("Density and coverage", "As precision and recall, less moved by odd images.")
_MANIFOLDS = "lit_diffusion.metrics.manifolds.ManifoldMetrics"

CATALOGUE: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "fid",
            "lit_diffusion.metrics.frechet.FrechetDistance",
            "min",
            Panel(
                "Frechet distance",
                "Lower is better; it depends on the number of samples. Compare within one key and one protocol only.",
                "logarithmic y",
            ),
            elsewhere="fd",
            features_named="unless inception",
        ),
        Row(
            "fid_infinity",
            "lit_diffusion.metrics.frechet.FrechetInfinity",
            "min",
            Panel("Frechet distance, extrapolated", "Lower is better; to infinitely many samples.", "logarithmic y"),
            default=False,
            elsewhere="fd_infinity",
            features_named="unless inception",
        ),
        Row(
            "is",
            "lit_diffusion.metrics.inception_score.InceptionScore",
            "max",
            Panel("Inception score", "Higher is better; it ignores the data."),
            needs=("logits",),
            features_named="unless inception",
        ),
        Row(
            "kid",
            "lit_diffusion.metrics.kernel.KernelDistance",
            "min",
            Panel("Kernel distance", "Lower is better; unbiased, so it may be below zero."),
            needs=("features",),
            elsewhere="kd",
            features_named="unless inception",
        ),
        Row("precision", _MANIFOLDS, "max", _FIDELITY, needs=("features",)),
        Row("recall", _MANIFOLDS, "max", _FIDELITY, needs=("features",)),
        Row("density", _MANIFOLDS, "max", _DENSITY, needs=("features",)),
        Row("coverage", _MANIFOLDS, "max", _DENSITY, needs=("features",)),
        Row(
            "memorisation",
            "lit_diffusion.metrics.memorisation.Memorisation",
            None,
            Panel(
                "Memorisation",
                "Near copies or memorised rising, ratio or authenticity falling: it memorizes its images.",
            ),
            needs=("features",),
            values=("near_copies", "nn_ratio", "memorised", "authenticity"),
        ),
        Row(
            "clip_score",
            "lit_diffusion.metrics.clip_score.CLIPScore",
            "max",
            Panel("CLIP score", "Higher is better: samples fit their captions."),
            needs=("captions",),
            default=False,
            features_named="never",
        ),
    )
}

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(CATALOGUE)]  # So that --help and the parser's refusals list the rows.


def default_metrics() -> list[str]:
    """Names of the metrics that are measured by default, where possible."""
    return [row.name for row in CATALOGUE.values() if row.default]


# ---- names of values ---------------------------------------------------------------------------------------------


def count_label(count: int) -> str:
    """The number of samples as in a value's name: 500, 2k, 50k."""
    return f"{count // 1000}k" if count % 1000 == 0 and count > 0 else str(count)


def metric_key(value: str, extractor: str, count: int) -> str:
    """The name under which a value is logged: ``fid-2k``, ``fd/digits-500``, ``precision/inception-10k``.

    FID, KID and Inception Score alone stand for Inception's features; other features are named.

    Args:
        value: one of :attr:`Row.value_names`.
        extractor: name of the extractor.
        count: number of samples.
    """
    row = _row_of_value(value)
    named = "always" if row is None else row.features_named
    if named == "never" or (named == "unless inception" and extractor == "inception"):
        return f"{value}-{count_label(count)}"
    return f"{(row.elsewhere if row is not None else '') or value}/{extractor}-{count_label(count)}"


def metric_of(key: str) -> tuple[str, str]:
    """The parts of an evaluation's key, the value's name and the rest: ``fd/digits-500``: ``fd``, ``digits-500``."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)[-/](.+)", key, flags=re.DOTALL)
    return (match[1], match[2]) if match else (key, "")


def row_of(key: str) -> Row | None:
    """The row of an evaluation's key; None for a key of no metric."""
    return _row_of_value(metric_of(key)[0])


def _row_of_value(value: str) -> Row | None:
    return next((row for row in CATALOGUE.values() if value in row.value_names), None)


# ---- which is better ---------------------------------------------------------------------------------------------


def is_better(metric: str, value: float, than: float | None) -> bool:
    """True where a value of a metric is better than another; NaN is never better."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value > than if CATALOGUE[metric].better == "max" else value < than


# ---- the documentation's tables ----------------------------------------------------------------------------------

_NEEDS = {"logits": "a classifier's logits", "features": "the real data themselves", "captions": "captions"}


def metrics_table() -> str:
    """The table of docs/metrics.md, a line for each row."""
    lines = ["| metric | values | better | needs | by default | where |", "|---|---|---|---|---|---|"]
    for row in CATALOGUE.values():
        cells = (
            f"`{row.name}`",
            ", ".join(f"`{name}`" for name in row.value_names),
            {"min": "lower", "max": "higher", None: ""}[row.better],
            ", ".join(_NEEDS[need] for need in row.needs),
            "yes" if row.default else "no",
            f"`{row.measured_by}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def dashboard_rows() -> str:
    """The lines of docs/dashboard.md about the values of evaluations, one for each panel."""
    panels: dict[Panel, list[str]] = {}
    for row in CATALOGUE.values():
        if "captions" not in row.needs:  # Samples of a run have none.
            panels.setdefault(row.panel, []).extend(row.value_names)
    lines = []
    for panel, names in panels.items():
        choices = names[0] if len(names) == 1 else f"({'|'.join(names)})"
        pattern = f"^evaluation/{choices}[-/]".replace("|", "\\|")
        plot = f"line plot, {panel.axis}" if panel.axis else "line plot"
        lines.append(f"| evaluation | `{pattern}` | images | {plot} | {panel.title}. {panel.hint} |")
    return "\n".join(lines) + "\n"


_LOSSES = ("val/loss", "test/loss", "test/bpd_ode", "test/bpd_bound")


def better(key: str) -> Direction | None:
    """The direction of a logged value, ``min`` where lower is better or ``max``; None where neither or unknown."""
    if key in _LOSSES:
        return "min"
    row = row_of(key)
    return None if row is None else row.better


if __name__ == "__main__":  # To bring the two pages up to date: python -m lit_diffusion.metrics.catalogue
    sys.stdout.write(f"{metrics_table()}\n{dashboard_rows()}")
