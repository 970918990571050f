"""``report``: a run's dashboard without an account, from its own files: a web page of one file, and its pictures."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from lit_diffusion import __version__
from lit_diffusion.commands.outputs import output_path, require_reports_folder
from lit_diffusion.config.parser import Parser
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write
from lit_diffusion.metrics.catalogue import better
from lit_diffusion.metrics.protocol import differing_keys
from lit_diffusion.plots.panels import (
    Panel,
    Protocol,
    curves_by_key,
    metric_panels,
    noise_level_panels,
    other_panels,
    protocols_of,
    speed_panels,
    training_panels,
)
from lit_diffusion.runs.dashboard import SETTINGS
from lit_diffusion.runs.events import Event, RecordedRun, number, read_config, read_run, recorded_png

SAMPLES = {
    "samples": "Samples",
    "film": "From noise to samples",
    "neighbours": "Samples and their nearest training images",
}
"""Titles of the pictures at the top of the page."""

FIGURES = {
    "noise-levels": "Loss and gradient norm by noise level",
    "bound-by-noise-level": "The variational bound by noise level",
    "smallest-time": "Against the smallest time",
}
"""Titles of the pictures further down; any others follow under their own names."""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion report",
        description="A run's curves, pictures and results as one self-contained web page, report.html.",
    )
    parser.add_argument("run", type=str | None, nargs="?", default=None, help="The run's directory.")
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="Folder of report.html and its pictures; default: RUN/report. An existing report is replaced; a folder "
        "with other files and no report is refused.",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``report``."""
    options = _parser().parse_args(list(arguments))
    if options.run is None:
        raise UserError("report takes a run's directory: python -m lit_diffusion report runs/<experiment>/<run id>")
    run = read_run(Path(options.run))
    out = run.folder / "report" if options.out is None else output_path(options.out, (), folder=True)
    if options.out is not None:
        require_reports_folder(out)
    page = write_report(run, out)
    torn = f"; {_torn(run.torn)}" if run.torn else ""
    sys.stdout.write(f"wrote {page}{torn}\n")


def write_report(run: RecordedRun, out: Path) -> Path:
    """Write ``report.html`` and a PNG of each panel into a folder.

    Returns:
        The page's path.

    Raises:
        UserError: if the folder cannot be written.
    """
    drawn = _Drawn(out)
    pictures, missing = _latest_pictures(run)
    protocols = protocols_of(run.of("evaluation"))
    differing = differing_keys([protocol.values for protocol in protocols], but=frozenset())
    notes = _notes(run, missing)
    sections = [
        ("Samples", _pictures(pictures, lambda name: name in SAMPLES)),
        ("Evaluation", _evaluation(run, protocols, differing, drawn)),
        ("Test", _test_table(run) + _smallest_time_table(run)),
        ("Training", drawn.panels(training_panels(run))),
        ("By noise level", drawn.panels(noise_level_panels(run))),
        ("Figures of the run", _pictures(pictures, lambda name: name not in SAMPLES)),
        ("Speed", drawn.panels(speed_panels(run))),
        ("Also recorded", drawn.panels(other_panels(run)) + _other_events_table(run)),
        ("How it was evaluated", _protocol_table(protocols, differing)),
        ("Configuration", _configuration(run)),
    ]
    main = [*(f'<p class="note">{escape(note)}</p>' for note in notes)]
    main += [f"<section><h2>{title}</h2>\n{body}</section>" for title, body in sections if body]
    config = _config(run)
    here = Path(__file__)
    style = here.with_suffix(".css").read_text()
    page = Template(here.with_suffix(".html").read_text()).substitute(
        # The page may load nothing, run nothing and use this style only, whatever a run's texts hold.
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        style=style,
        title=escape(_title(run, config)),
        lead=escape(_lead(config)),
        about=_about_run(run),
        main="\n".join(main),
        footer=escape(f"lit_diffusion {__version__}, from {run.folder.name}/metrics.jsonl, {_date(time.time())}"),
    )
    path = out / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", errors="replace"))
    return path


class _Drawn:
    """Writer of panels, as files beside the page and inside it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.names: set[str] = set()

    def panels(self, panels: Sequence[Panel]) -> str:
        """HTML of the panels."""
        return _grid("panels", (self._card(panel) for panel in panels))

    def _card(self, panel: Panel) -> str:
        light, dark = panel.png("light"), panel.png("dark")
        with atomic_write(self.out / f"{self._free_name(panel.name)}.png") as file:
            file.write(light)
        shown = ", ".join(f"{name} {_short(curve.finite[-1][1])}" for name, curve in panel.curves.items())
        return (
            f'<figure class="card"><h3>{escape(panel.title)}</h3>'
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img alt="{escape(f"{panel.title}; last: {shown}")}" src="{_data(light)}"></picture>'
            f"<figcaption>{escape(panel.hint)}</figcaption></figure>"
        )

    def _free_name(self, wanted: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:80] or "panel"
        name, count = stem, 1
        while name in self.names:
            count += 1
            name = f"{stem}-{count}"
        self.names.add(name)
        return name


# ---- pieces of the page ------------------------------------------------------------------------------------------


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _grid(kind: str, cards: Iterable[str]) -> str:
    inside = "\n".join(cards)
    return f'<div class="{kind}">\n{inside}\n</div>\n' if inside else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    """HTML of a table of texts, with marked rows highlighted."""
    if not rows:
        return ""
    marks = [*marked, *[False] * (len(rows) - len(marked))]
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "\n".join(
        ('<tr class="differs">' if mark else "<tr>") + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'


def _short(value: float) -> str:
    return f"{value:.4g}"


def _text(value: object) -> str:
    """Format a value of an event or a protocol for a reader."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return str(value)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _torn(count: int) -> str:
    lines = "1 line of metrics.jsonl is" if count == 1 else f"{count} lines of metrics.jsonl are"
    return f"{lines} torn, as a kill leaves them, and left out"


# ---- the head of the page ----------------------------------------------------------------------------------------


def _config(run: RecordedRun) -> dict[str, Any]:
    try:
        return read_config(run.folder)
    except UserError:
        return {}


def _class_name(section: object) -> str | None:
    path = section.get("class_path") if isinstance(section, dict) else None
    return path.rpartition(".")[2] if isinstance(path, str) else None


def _title(run: RecordedRun, config: dict[str, Any]) -> str:
    experiment = config.get("experiment")
    return experiment if isinstance(experiment, str) and experiment else run.folder.resolve().name


def _lead(config: dict[str, Any]) -> str:
    """Names of method, backbone and data source, as far as the configuration has them."""
    model, data = config.get("model"), config.get("data")
    inside = model.get("init_args") if isinstance(model, dict) else None
    parts = [
        _class_name(model),
        _class_name(inside.get("backbone")) if isinstance(inside, dict) else None,
        _class_name(data.get("source")) if isinstance(data, dict) else None,
    ]
    return " · ".join(part for part in parts if part)


def _about_run(run: RecordedRun) -> str:
    starts, last = run.of("start"), run.events[-1]
    ended = [event for event in run.events if event["event"] in ("start", "end")][-1]
    status = str(ended.get("status")) if ended["event"] == "end" else "not ended: it runs, or was killed"
    resumed = [f"{event['images']:,}" for event in starts if event.get("resumed") is True]
    about = {
        "Run": str(starts[0].get("run_id", "unknown")),
        "Status": status,
        "Images seen": f"{run.images:,}",
        "Steps": _text(max((number(event.get("step")) or 0.0 for event in run.events), default=0.0)),
        "Started": _date(starts[0]["time"]),
        "Last event": _date(last["time"]),
        # Without the time between a run and its continuation.
        "Time": _duration(sum(end - begin for begin, end in _segments(run))),
        "Resumed": f"at {', '.join(resumed)} images" if resumed else "no",
    }
    if skipped := curves_by_key(run.of("train"), lambda key: key == "skipped_steps"):
        about["Skipped steps"] = _short(skipped["skipped_steps"].y[-1])
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in about.items())
    return f'<dl class="about">{items}</dl>'


def _segments(run: RecordedRun) -> list[tuple[float, float]]:
    """Times at which each process that wrote to the run began and last wrote."""
    segments: list[tuple[float, float]] = []
    for event in run.events:
        if event["event"] == "start" or not segments:
            segments.append((event["time"], event["time"]))
        segments[-1] = (segments[-1][0], event["time"])
    return segments


def _notes(run: RecordedRun, missing: Sequence[str]) -> list[str]:
    """Warnings to read before the curves."""
    notes = []
    if run.torn:
        notes.append(f"{_torn(run.torn)}.")
    if missing:
        notes.append(f"Recorded pictures that are not there any more, or no PNG: {', '.join(missing)}.")
    curves = curves_by_key(run.of("train", "metrics", "evaluation"), lambda key: True)
    for key, curve in curves.items():
        if gaps := sum(not math.isfinite(y) for y in curve.y):
            notes.append(f"{key}: {gaps} of {len(curve.y)} values are NaN or infinite, and gaps in the curve.")
    return notes


# ---- pictures ----------------------------------------------------------------------------------------------------


def _latest_pictures(run: RecordedRun) -> tuple[list[tuple[Event, bytes]], list[str]]:
    """The last picture of each name, in the order of the page, and names of missing files."""
    latest = {event["name"]: event for event in run.of("picture") if isinstance(event.get("name"), str)}
    order = dict.fromkeys([*SAMPLES, *FIGURES, *sorted(latest)])
    found, missing = [], []
    for event in (latest[name] for name in order if name in latest):
        png = recorded_png(run.folder, event.get("file"))
        if png is None:
            missing.append(str(event.get("file")))
        else:
            found.append((event, png))
    return found, missing


def _pictures(pictures: Sequence[tuple[Event, bytes]], wanted: Callable[[str], bool]) -> str:
    cards = []
    for event, png in pictures:
        name, caption = event["name"], str(event.get("caption", ""))
        if not wanted(name):
            continue
        settings = {key: value for key, value in event.items() if key == "network_evaluations"}
        about = "; ".join([caption, *(f"{key.replace('_', ' ')} {_text(value)}" for key, value in settings.items())])
        title = str({**SAMPLES, **FIGURES}.get(name, name))
        cards.append(
            f'<figure class="card"><h3>{escape(title)}</h3><img alt="{escape(f"{title}: {caption}")}" '
            f'src="{_data(png)}"><figcaption>{escape(about)}</figcaption></figure>'
        )
    return _grid("pictures", cards)


# ---- numbers -----------------------------------------------------------------------------------------------------


def _evaluation(run: RecordedRun, protocols: Sequence[Protocol], differing: Sequence[str], drawn: _Drawn) -> str:
    if not protocols:
        return ""
    said = ""
    if len(protocols) > 1:
        said = (
            f'<p class="note">The evaluations of this run were made in {len(protocols)} ways, which differ in '
            f"{escape(', '.join(differing))}: they are drawn as separate lines; compare within one protocol only.</p>"
        )
    rows = []
    for protocol in protocols:
        curves = curves_by_key(protocol.events, lambda key: key not in ("seconds", "protocol"))
        for key, curve in curves.items():
            row = [key, protocol.name, _short(curve.y[-1]), _uncertainty(protocol.events, key), f"{curve.x[-1]:,.0f}"]
            direction, points = better(key), curve.finite
            if direction is not None and points:
                x, y = (min if direction == "min" else max)(points, key=lambda point: point[1])
                row += [_short(y), f"{x:,.0f}"]
            rows.append([*row, "", ""][:7])
    head = ["metric", "protocol", "last", "uncertainty", "at images", "best", "at images"]
    # Empty columns are left out.
    kept = [place for place in range(7) if (place != 1 or len(protocols) > 1) and any(row[place] for row in rows)]
    head, rows = [head[place] for place in kept], [[row[place] for place in kept] for row in rows]
    return said + drawn.panels(metric_panels(run)) + "<h2>Last and best</h2>\n" + _table(head, rows)


def _uncertainty(events: Sequence[Event], key: str) -> str:
    """Text of the standard error and interval of a key's last value, where its event has them."""
    event = next(event for event in reversed(events) if number(event.get(key)) is not None)
    errors, intervals = event.get("errors"), event.get("intervals")
    error = number(errors.get(key)) if isinstance(errors, dict) else None
    interval = intervals.get(key) if isinstance(intervals, dict) else None
    ends = [number(end) for end in interval] if isinstance(interval, list) else []
    parts = [] if error is None else [f"± {_short(error)}"]
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        parts.append(f"95 %: {_short(ends[0])} to {_short(ends[1])}")
    return ", ".join(parts)


def _test_table(run: RecordedRun) -> str:
    """Table of the ``test`` events' values with their standard errors and settings."""
    rows = []
    for event in run.of("test"):
        found = {key: value for key, raw in event.items() if (value := number(raw)) is not None}
        measured = [key for key in found if f"{key}_error" in found]
        how = {
            key: value
            for key, value in event.items()
            if key not in ("event", "step", "images", "time") and not isinstance(value, list | dict)
            if key in SETTINGS or key not in found
        }
        if isinstance(protocol := event.get("protocol"), dict):
            how |= {key: protocol[key] for key in ("weights", "sampler", "n_fake", "seeds") if key in protocol}
        said = ", ".join(f"{key} {_text(value)}" for key, value in how.items() if value is not None)
        for key in found:
            if key in ("step", "images", "time") or key in SETTINGS or key.endswith("_error"):
                continue
            error = f"± {found[f'{key}_error']:.4f}" if key in measured else ""
            count = "" if "protocol" in event else f"{event['images']:,}"
            rows.append([key, f"{found[key]:.4f}", error, count, said if key in measured or not measured else ""])
    for event in run.of("metrics"):
        for key, raw in event.items():
            if key.startswith("test/") and (value := number(raw)) is not None:
                rows.append([key, f"{value:.4f}", "", "", f"weights {_text(event.get('weights'))}"])
    return _table(["quantity", "value", "standard error", "images measured", "how"], rows)


def _smallest_time_table(run: RecordedRun) -> str:
    made = ""
    for event in run.of("smallest_time"):
        times = event.get("smallest_times")
        if not isinstance(times, list):
            continue
        columns = {"smallest time": times}
        columns |= {
            key: v for key, v in event.items() if isinstance(v, list) and len(v) == len(times) and v is not times
        }
        rows = [[_text(column[place]) for column in columns.values()] for place in range(len(times))]
        made += "<h2>Against the smallest time</h2>\n" + _table([*columns], rows)
    return made


KNOWN_EVENTS = ("start", "end", "train", "metrics", "picture", "test", "smallest_time", "evaluation", "noise_levels")
"""Events with a section of their own on the page, ``noise_levels`` as its picture."""


def _other_events_table(run: RecordedRun) -> str:
    """Table of the last event of each other kind."""
    last = {event["event"]: event for event in run.events if event["event"] not in KNOWN_EVENTS}
    rows = []
    for kind, event in last.items():
        values = {key: value for key, value in event.items() if key not in ("event", "step", "images", "time")}
        rows.append([kind, f"{event['images']:,}", ", ".join(f"{key} {_text(v)}" for key, v in values.items())])
    return _table(["event", "images seen", "values"], rows)


def _protocol_table(protocols: Sequence[Protocol], differing: Sequence[str]) -> str:
    if not protocols:
        return ""
    keys = [*differing, *dict.fromkeys(k for p in protocols for k in p.values if k not in differing)]
    moments = [", ".join(f"{event['images']:,}" for event in protocol.events) for protocol in protocols]
    rows = [["evaluated at images", *moments]]
    rows += [[key, *(_text(p.values[key]) if key in p.values else "" for p in protocols)] for key in keys]
    head = ["", *(protocol.name for protocol in protocols)]
    return _table(head, rows, [False, *(key in differing for key in keys)])


def _configuration(run: RecordedRun) -> str:
    try:
        text = (run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return '<p class="hint">There is no config.yaml.</p>'
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"
