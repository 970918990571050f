"""Families of metrics: what shares a panel, and which way is better."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Direction = Literal["min", "max"]


class Family(NamedTuple):
    """Metrics that share a panel."""

    title: str
    metrics: tuple[str, ...]
    better: Direction | None
    hint: str


FAMILIES = (
    Family("Frechet distance", ("fid", "fd"), "min", "Lower is better; it depends on the number of samples."),
    Family(
        "Frechet distance, extrapolated",
        ("fid_infinity", "fd_infinity"),
        "min",
        "Lower is better; to infinitely many samples.",
    ),
    Family("Inception score", ("is",), "max", "Higher is better; it knows nothing of the data."),
    Family("Kernel distance", ("kid", "kd"), "min", "Lower is better; unbiased, so it may be below zero."),
    Family(
        "Precision and recall",
        ("precision", "recall"),
        "max",
        "Precision falls where samples are poor, recall where kinds of images are missing.",
    ),
    Family(
        "Density and coverage", ("density", "coverage"), "max", "As precision and recall, less moved by odd images."
    ),
    Family(
        "Memorisation",
        ("near_copies", "memorised", "nn_ratio", "authenticity"),
        None,
        "Near copies or memorised rising, ratio or authenticity falling: it learns its images by heart.",
    ),
    Family("CLIP score", ("clip_score",), "max", "Higher is better: samples fit their captions."),
)
"""The one place that says which way a metric is better."""

HIGHER_IS_BETTER = frozenset(metric for family in FAMILIES if family.better == "max" for metric in family.metrics)


def metric_of(key: str) -> tuple[str, str]:
    """A key of an evaluation as the metric and what it was measured with: ``fd/digits-500``: ``fd``, ``digits-500``."""
    match = re.fullmatch(r"([a-z_]+)[-/](.+)", key, flags=re.DOTALL)
    return (match[1], match[2]) if match else (key, "")


def family_of(key: str) -> Family | None:
    """The family of an evaluation's key, None for one of no family."""
    metric = metric_of(key)[0]
    return next((family for family in FAMILIES if metric in family.metrics), None)
