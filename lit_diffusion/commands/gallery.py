"""``gallery``: one HTML page to compare images side by side, and to judge them blind, two by two."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_diffusion.commands.outputs import RULE, output_path
from lit_diffusion.config.parser import Parser
from lit_diffusion.data.as_given import images_as_given
from lit_diffusion.errors import UserError, require_positive
from lit_diffusion.files import atomic_write
from lit_diffusion.images import about_shown, as_shown, png_bytes
from lit_diffusion.metrics.protocol import differing_keys
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.events import read_config, read_run
from lit_diffusion.runs.formats import FORMAT_VERSION

REAL = "real data"
_PLACE_OF_DATA = "GALLERY_DATA"
_PATCH = 9
_JUDGED_ALONE_FROM = 32
"""Shorter side in pixels from which single images are judged; of smaller images a patch of `_PATCH` is."""
_HEAVY_BYTES = 50_000_000
_COUNTED = re.compile(r"-\d+(\.\d+)?[kM]?$")
"""End of a metric's name that counts its images, ``fid-2k``; times and counters have none."""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lit_diffusion gallery",
        description="One HTML file for human judgement, with everything in it: images side by side with their metrics "
        "and protocols, and a blind comparison two by two.",
    )
    parser.add_argument(
        "entries",
        type=str,
        nargs="*",
        help="Runs' directories (their last evaluation's samples), .npz files, folders or zip files of images; "
        "NAME=PATH gives an entry a name. Metrics in SAMPLES.json beside SAMPLES.npz are shown.",
    )
    parser.add_argument("--out", type=str, default="gallery.html", help=f"NAME.html for the page. {RULE}")
    parser.add_argument("--count", type=int, default=64, help="Number of images per entry, the first ones.")
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help=f"Real images (.npz, folder or zip), as an entry named {REAL!r}; the first --count of them, which should "
        "not be sorted by class.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the blind comparison's order.")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``gallery``."""
    options = _parser().parse_args(arguments)
    require_positive(options, "count")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}; give a number from 0 to {2**32 - 1}")
    out = output_path(options.out, (".html",))
    if not options.entries:
        raise UserError("gallery has nothing to show: give runs' directories or samples, e.g. gallery runs/ncsn/RUN_ID")
    entries = [_entry(given, options.count) for given in options.entries]
    if options.reference is not None:
        real = _images(Path(options.reference).expanduser(), options.count)
        entries.append(Entry(REAL, options.reference, **real, real=True))
    _make_names_unique(entries)
    page = _page(entries, options.seed)
    with atomic_write(out) as file:
        file.write(page)
    sys.stdout.write(f"wrote {options.count} images each of {', '.join(entry.name for entry in entries)} to {out}\n")
    if difference := _difference(entries):
        sys.stdout.write(f"note: {difference}: the metrics are no ranking\n")
    if len(page) > _HEAVY_BYTES:
        sys.stdout.write(f"note: {out} is {len(page) / 1e6:.0f} MB, slow in a browser: give a smaller --count\n")


@dataclass
class Entry:
    """One run or one set of images on the page.

    Attributes:
        name: name, unique on the page.
        source: origin of the images, as typed.
        images: PNG files in base64.
        available: number of images in the source.
        width: width of an image in pixels.
        height: height of an image in pixels.
        channels: number of channels.
        values: metrics by name.
        protocol: protocol of the metrics, None where it is not known.
        note: progress of the training.
        real: true for real images.
    """

    name: str
    source: str
    images: list[str]
    available: int
    width: int
    height: int
    channels: int
    values: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] | None = None
    note: str = ""
    real: bool = False


def _entry(given: str, count: int) -> Entry:
    """The entry of ``PATH`` or ``NAME=PATH``; a path that exists is a path, even with a ``=`` in its name."""
    name, equals, rest = given.partition("=")
    named = bool(equals) and not Path(given).expanduser().exists()
    if named and not (name.strip() and rest):
        raise UserError(f"{given!r} is neither a path nor NAME=PATH: give both, e.g. small=runs/ncsn/RUN_ID")
    path = Path(rest if named else given).expanduser()
    entry = _run(path, count) if (path / "metrics.jsonl").is_file() else _samples(path, count)
    if named:
        entry.name = name.strip()
    return entry


def _run(directory: Path, count: int) -> Entry:
    """The samples and metrics of a run's last evaluation."""
    checkpoint = directory / "checkpoints" / "last.ckpt"
    fix = f"make one with `test --ckpt_path {checkpoint}`, or give samples as an .npz file"
    evaluations = read_run(directory).of("evaluation")
    if not evaluations:
        raise UserError(f"the run {directory} has no evaluation: {fix}")
    event = evaluations[-1]
    samples = directory / str(event.get("samples_file"))
    if not samples.is_file():
        raise UserError(f"the samples of the last evaluation of {directory} are gone or were not kept: {fix}")
    protocol = event.get("protocol")
    return Entry(
        _run_name(directory),
        str(samples),
        **_images(samples, count),
        values={key: value for key, value in event.items() if _COUNTED.search(key) and _is_value(value)},
        protocol=protocol if isinstance(protocol, dict) and protocol else None,
        note=f"after {event.get('images', 0):,} images of training",
    )


def _run_name(directory: Path) -> str:
    """``<experiment>/<run id>`` from the run's files, else the names of its folders."""
    directory = directory.resolve()
    experiment, run_id = directory.parent.name, directory.name
    try:
        run_id = (directory / "run_id").read_text().strip() or run_id
        experiment = read_config(directory)["experiment"] or experiment
    except (OSError, ValueError, TypeError, KeyError, UserError):
        pass  # The folders' names will do.
    return f"{experiment}/{run_id}"


def _samples(path: Path, count: int) -> Entry:
    """Images given by a path, with the metrics that ``evaluate --out`` wrote beside them."""
    images = _images(path, count)
    stem = path.resolve().name if path.is_dir() else path.stem
    values, protocol = _metrics_beside(path.resolve().with_name(f"{stem}.json"))
    return Entry(stem, str(path), **images, values=values, protocol=protocol)


def _metrics_beside(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if not path.is_file():
        return {}, None
    try:
        content = _from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the metrics {path} beside the samples: {error}; write or move it away") from error
    values, protocol = (content.get(key, {}) if isinstance(content, dict) else None for key in ("values", "protocol"))
    if not (isinstance(values, dict) and isinstance(protocol, dict)):
        raise UserError(f"{path} beside the samples has no values and protocol of `evaluate --out`: move it away")
    return {key: value for key, value in values.items() if _is_value(value)}, protocol or None


def _from_json(text: str) -> Any:
    """Parse JSON, with Python's NaN and infinity, which no browser reads, as strings."""
    return json.loads(text, parse_constant=lambda word: str(float(word)))


def _is_value(value: object) -> bool:
    """True for a number; NaN and infinity are strings, see `_from_json`."""
    return value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool))


def _images(path: Path, count: int) -> dict[str, Any]:
    """The first ``count`` images as PNG, their shape, and the number of images."""
    source = images_as_given(path)
    if len(source.shape) != 3:
        raise UserError(f"{path} holds points; the gallery shows images")
    if len(source) < count:
        raise UserError(f"{path} has {len(source)} images, {count} are to be shown; give --count {len(source)} or less")
    channels, height, width = source.shape
    for line in [*source.notes(), *([f"{path}: {shown}"] if (shown := about_shown(channels)) else [])]:
        print_note(line)
    return {
        "images": [_png(source.value(index)) for index in range(count)],
        "available": len(source),
        "width": width,
        "height": height,
        "channels": channels,
    }


def _png(image: np.ndarray) -> str:
    """Encode uint8 ``[C, H, W]`` as a PNG file in base64."""
    return base64.b64encode(png_bytes(as_shown(image.transpose(1, 2, 0)))).decode()


def _make_names_unique(entries: Iterable[Entry]) -> None:
    taken: set[str] = set()
    for entry in entries:
        plain, number = entry.name, 1
        while entry.name in taken:
            number += 1
            entry.name = f"{plain} ({number})"
        taken.add(entry.name)


def _comparability(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """Protocol keys that differ between the entries with metrics, and names of those without a protocol."""
    measured = [entry for entry in entries if entry.values]
    unknown = [entry.name for entry in measured if entry.protocol is None] if len(measured) > 1 else []
    return differing_keys([entry.protocol for entry in measured if entry.protocol is not None]), unknown


def _difference(entries: Sequence[Entry]) -> str:
    differing, unknown = _comparability(entries)
    said = [f"the protocols differ in {', '.join(differing)}"] if differing else []
    said += [f"the protocol of {', '.join(unknown)} is not known"] if unknown else []
    return "; ".join(said)


def _page(entries: Sequence[Entry], seed: int) -> bytes:
    """Make the whole file.

    Raises:
        UserError: if there are too few images for a side of the blind comparison.
    """
    small = any(min(entry.width, entry.height) < _JUDGED_ALONE_FROM for entry in entries)
    images_per_side = _PATCH if small else 1
    if len(entries) > 1 and len(entries[0].images) < images_per_side:
        raise UserError(
            f"--count is {len(entries[0].images)}; the blind comparison shows {_PATCH} images a side where images are "
            f"under {_JUDGED_ALONE_FROM} pixels: give --count {_PATCH} or more"
        )
    differing, unknown = _comparability(entries)
    content = {
        "format_version": FORMAT_VERSION,
        "images_per_side": images_per_side,
        "differing": differing,
        "unknown": unknown,
        "entries": [asdict(entry) for entry in entries],
    }
    # The page keeps its votes under a hash of its content, so another page, or other samples, never inherits them.
    page_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    created = time.strftime("%Y-%m-%d %H:%M")
    data = json.dumps({**content, "page": page_id, "created": created, "seed": seed}, allow_nan=False)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # Within a script element only "<" can end the data; in JSON it may be written as its number.
    return template.replace(_PLACE_OF_DATA, data.replace("<", "\\u003c"), 1).encode()
