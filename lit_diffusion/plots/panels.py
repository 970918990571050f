"""Panels of a run: curves of the events in metrics.jsonl, drawn as PNG."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from lit_diffusion.images import png_bytes
from lit_diffusion.metrics.catalogue import CATALOGUE, metric_of, row_of
from lit_diffusion.plots.figures import counts_axis, curves_panel, new_figure, render, theme
from lit_diffusion.runs.events import Event, RecordedRun, number

# ---- curves ------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Values of one key, y, by images seen, x."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, event: Event, value: float) -> None:
        """Append a point."""
        self.x.append(float(event["images"]))
        self.y.append(value)

    @property
    def finite(self) -> list[tuple[float, float]]:
        """Points with a finite value."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(y)]


Curves = dict[str, Curve]


def curves_by_key(events: Sequence[Event], wanted: Callable[[str], bool]) -> Curves:
    """Curves of the keys that are wanted, in order of their first appearance."""
    curves: Curves = {}
    for event in events:
        for key, value in event.items():
            if key not in ("event", "step", "images", "time") and wanted(key) and (y := number(value)) is not None:
                curves.setdefault(key, Curve()).add(event, y)
    return curves


def smoothed(curve: Curve) -> tuple[Curve, int]:
    """Bias-corrected exponential moving average of the finite values, and its half-life in events."""
    half_life = max(2, len(curve.x) // 40)
    keep = 0.5 ** (1.0 / half_life)
    out, total, weight = Curve(), 0.0, 0.0
    for x, y in curve.finite:
        total, weight = keep * total + (1.0 - keep) * y, keep * weight + (1.0 - keep)
        out.x.append(x)
        out.y.append(total / weight)
    return out, half_life


@dataclass
class Protocol:
    """Evaluations with one protocol, the only ones that may be compared."""

    name: str
    values: dict[str, Any]
    events: list[Event]


def protocols_of(evaluations: Sequence[Event]) -> list[Protocol]:
    """Group a run's evaluations by their protocol, in order of first appearance."""
    found: dict[str, Protocol] = {}
    for event in evaluations:
        values = event.get("protocol")
        values = values if isinstance(values, dict) else {}
        key = json.dumps(values, sort_keys=True)
        found.setdefault(key, Protocol(f"protocol {len(found) + 1}", values, [])).events.append(event)
    return list(found.values())


# ---- panels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One picture of curves.

    Args:
        name: stem of its file.
        title: title above it.
        hint: text below it on what to look for.
        curves: curves by their label.
        draw: function that draws them on axes.
    """

    name: str
    title: str
    hint: str
    curves: Curves
    draw: Callable[[Any], None]

    def png(self, colors: Literal["light", "dark"]) -> bytes:
        """Draw it as PNG bytes, for a light or a dark page."""
        with theme(colors):
            figure, axes = new_figure(1, 1)
            figure.set_size_inches(4.5, 2.9)
            self.draw(axes[0, 0])
            return png_bytes(render(figure, dpi=170))


def panel(
    name: str,
    title: str,
    hint: str,
    curves: Curves,
    y_label: str = "",
    x_label: str = "images seen",
    colors: str | None = None,
    faint: str | None = None,
) -> list[Panel]:
    """Make a list of one panel; empty where there is nothing to draw."""
    drawn = {label: curve for label, curve in curves.items() if curve.finite}
    if not drawn:
        return []
    return [Panel(name, title, hint, drawn, partial(_draw, drawn, x_label, y_label, colors, faint))]


def _draw(curves: Curves, x_label: str, y_label: str, colors: str | None, faint: str | None, axes: Any) -> None:
    points = {
        label: (curve.x, [y if math.isfinite(y) else math.nan for y in curve.y]) for label, curve in curves.items()
    }
    curves_panel(axes, points, x_label, y_label, colors, faint)
    if x_label == "images seen":
        counts_axis(axes)


def metric_panels(run: RecordedRun) -> list[Panel]:
    """Panels of evaluations: one for each extractor and panel of the catalogue, a curve for each value and protocol."""
    protocols = protocols_of(run.of("evaluation"))
    groups: dict[tuple[str, str], Curves] = {}
    for protocol in protocols:
        found = curves_by_key(protocol.events, lambda key: key not in ("seconds", "protocol"))
        for key, curve in found.items():
            row, value = row_of(key), metric_of(key)[0]
            group = (key, "") if row is None else (row.panel.title, key.removeprefix(value))
            name = key if row is None else value
            label = name if len(protocols) == 1 else f"{name}, {protocol.name}"
            groups.setdefault(group, {})[label] = curve
    hints = {row.panel.title: row.panel.hint for row in CATALOGUE.values()}
    order = {title: place for place, title in enumerate(hints)}
    panels: list[Panel] = []
    for (title, measured_with), curves in sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order))):
        whole = f"{title}: {measured_with[1:]}" if measured_with else title
        panels += panel(f"evaluation-{title}{measured_with}", whole, hints.get(title, ""), curves)
    return panels


def training_panels(run: RecordedRun) -> list[Panel]:
    """Panels of loss, held-out loss, gradient norm, learning rate and skipped steps."""
    train = curves_by_key(run.of("train"), lambda key: "@" not in key)
    panels: list[Panel] = []
    if "loss" in train:
        loss, half_life = smoothed(train["loss"])
        curves = {"each event": train["loss"], f"smoothed, half-life {half_life} events": loss}
        hint = "Falling, then level. It is an average over noise levels: flat does not mean that nothing is learnt."
        panels += panel("training-loss", "Training loss", hint, curves, "loss", faint="each event")
    held_out: Curves = {}
    for event in run.of("metrics"):
        if (value := number(event.get("val/loss"))) is not None:
            held_out.setdefault(f"val/loss, weights {event.get('weights', 'unknown')}", Curve()).add(event, value)
    panels += panel(
        "held-out-loss",
        "Held-out loss",
        "Rising while the training loss falls: the model memorizes its images.",
        held_out,
        "val/loss",
    )
    for key, title, hint in (
        ("gradient_norm", "Gradient norm", "Before clipping. Rare spikes are harmless, a steady rise is not."),
        ("learning_rate", "Learning rate", "The warm-up, then what the schedule says."),
    ):
        panels += panel(key.replace("_", "-"), title, hint, {key: train.get(key, Curve())}, title.lower())
    skipped = train.get("skipped_steps", Curve())
    if any(value > 0 for value in skipped.y):
        hint = "Steps so far whose loss or gradient was not finite; more than a few: lower the learning rate."
        panels += panel("skipped-steps", "Skipped steps", hint, {"skipped_steps": skipped}, "steps, in all")
    return panels


def noise_level_panels(run: RecordedRun) -> list[Panel]:
    """Panels of the training loss by time t: each part of [0, 1] over the run, and whole curves at several moments."""
    pattern = re.compile(r"loss@(\d\.\d+)")
    events = run.of("train")
    by_time = {
        float(match[1]): curve
        for key, curve in curves_by_key(events, lambda key: pattern.fullmatch(key) is not None).items()
        if (match := pattern.fullmatch(key))
    }
    rising = {f"t = {t:.2f}": smoothed(by_time[t])[0] for t in sorted(by_time)}
    panels = panel(
        "loss-by-noise-level",
        "Loss by noise level",
        "Smoothed. t = 0 is data, t = 1 noise: small t makes detail, large t what the picture shows.",
        rising,
        "loss",
        colors="viridis",
    )
    seen = sorted({x for curve in by_time.values() for x in curve.x})
    moments: Curves = {}
    for first, last in _stretches(seen):
        moment = Curve()
        for t in sorted(by_time):
            values = [y for x, y in by_time[t].finite if first <= x <= last]
            if values:
                moment.x.append(t)
                moment.y.append(sum(values) / len(values))
        moments[f"{first:,.0f} to {last:,.0f} images"] = moment
    return panels + panel(
        "loss-against-time",
        "Loss against t",
        "Averages over stretches of the training: where the curves still move, there is something left to learn.",
        moments,
        "loss",
        x_label="t",
        colors="plasma",
    )


def _stretches(seen: Sequence[float]) -> Iterator[tuple[float, float]]:
    """First and last images seen of the stretches of a training that are drawn, each twice as long as the last."""
    begin = 0
    for share in (16, 8, 4, 2, 1):
        end = math.ceil(len(seen) / share)
        if end > begin:
            yield seen[begin], seen[end - 1]
            begin = end


def speed_panels(run: RecordedRun) -> list[Panel]:
    """Panels of throughput, and of the evaluations' time."""
    throughput = curves_by_key(run.of("train"), lambda key: key == "images_per_second")
    seconds = curves_by_key(run.of("evaluation"), lambda key: key == "seconds")
    hint = "A drop is another program on the machine, or data that arrive too slowly."
    return [
        *panel("throughput", "Throughput", hint, throughput, "images / s"),
        *panel("evaluation-seconds", "Time of an evaluation", "", seconds, "seconds"),
    ]


def other_panels(run: RecordedRun) -> list[Panel]:
    """Panels of values that the user's callbacks log through Lightning."""
    mine = curves_by_key(run.of("metrics"), lambda key: key != "val/loss" and not key.startswith("test/"))
    return [each for key, curve in mine.items() for each in panel(f"metrics-{key}", key, "", {key: curve}, key)]
