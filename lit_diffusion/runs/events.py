"""The events of a run, metrics.jsonl: read back, and cut back where a run is continued."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_diffusion.errors import UserError
from lit_diffusion.failures import is_first_process
from lit_diffusion.files import atomic_write
from lit_diffusion.runs.formats import require_known_format

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """The events of a run's directory.

    Args:
        folder: the run's directory.
        events: its whole events, in their order.
        torn: number of lines of metrics.jsonl that are no whole event, as a kill leaves them.
    """

    folder: Path
    events: list[Event]
    torn: int

    def of(self, *kinds: str) -> list[Event]:
        """Events of the given kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def images(self) -> int:
        """Number of images seen."""
        # A test's `images` are the measured ones.
        return max((event["images"] for event in self.events if event["event"] != "test"), default=0)


def read_run(folder: Path) -> RecordedRun:
    """Read a run's events.

    Raises:
        UserError: if the directory is no run's, or of an unknown format.
    """
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{folder} is no run's directory: {path.name} cannot be read ({error.strerror}); "
            f"give one such as runs/<experiment>/<run id>"
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    read = (_event(line) for line in lines)
    events = [event for event in read if event is not None]
    start = next((event for event in events if event["event"] == "start"), None)
    if start is None:
        raise UserError(f"{path} has no start event: it is no run's; give a directory such as runs/<experiment>/<id>")
    require_known_format(start.get("format_version"), str(path))
    return RecordedRun(folder, events, len(lines) - len(events))


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's config.yaml.

    Raises:
        UserError: if it is missing or no configuration.
    """
    from lit_diffusion.config.yaml_files import read_yaml  # Which brings the parser along.

    path = folder / "config.yaml"
    try:
        config = read_yaml(path)
    except (OSError, UserError) as error:
        reason = f"{path} cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise UserError(f"{reason}: bring it back, or write experiment: NAME into it") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no configuration: bring it back, or write experiment: NAME")
    return config


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    images, time = event.get("images"), number(event.get("time"))
    whole = type(images) is int and 0 <= images < 2**53 and time is not None and 0.0 <= time < 1e11
    return event if whole else None


def recorded_png(folder: Path, name: object) -> bytes | None:
    """A picture in the run's samples folder as PNG bytes; None if it is missing, no PNG, or outside of that folder."""
    from PIL import Image

    try:
        path = (folder / str(name)).resolve()
        if not path.is_relative_to((folder / "samples").resolve()):
            return None
        png = path.read_bytes()
        with Image.open(path, formats=("PNG",)) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError):  # Pillow raises the last for a broken PNG.
        return None
    return png


def number(value: object) -> float | None:
    """A recorded number, NaN and infinity among them; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else None


def failed_before(path: Path) -> list[str]:
    """Names of what failed, one for each time, from the events of a run that is continued."""
    if not path.exists():
        return []
    names = []
    for line in path.read_text().splitlines():
        if '"event": "failed"' in line:
            with suppress(ValueError):  # A line torn by a kill.
                names.append(str(json.loads(line).get("name")))
    return names


def require_known_events(run_dir: Path) -> None:
    """Refuse to continue a run whose events are missing or of another format.

    Raises:
        UserError: naming the file.
    """
    path = run_dir / "metrics.jsonl"
    try:
        with path.open() as file:
            first = json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot continue the run in {run_dir}: {path.name} is missing or not its own ({error}); "
            f"choose another --run_dir"
        ) from error
    require_known_format(first.get("format_version") if isinstance(first, dict) else None, str(path))


def drop_lost_events(run_dir: Path, images_seen: int, again: Collection[str] = ()) -> int:
    """Move the events after a checkpoint, which a continued run makes again, to metrics.lost.jsonl.

    Of several processes, which are not connected yet, only the first does it.

    Args:
        run_dir: directory of the run that is continued.
        images_seen: images seen at the checkpoint; -1 where there is none, so that all events are made again.
        again: names of events and pictures of the checkpoint's own moment that may have been written after it, and
            are made again too.

    Returns:
        The number of events moved.

    Raises:
        UserError: if the events are missing or of an unknown format; then nothing is touched.
    """
    if not is_first_process():
        return 0
    path = run_dir / "metrics.jsonl"
    if images_seen < 0 and (not path.exists() or b"\n" not in path.read_bytes()):
        path.unlink(missing_ok=True)  # A kill came before its first line was whole.
        return 0
    require_known_events(run_dir)
    kept: list[str] = []
    lost: list[str] = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
            after = event["images"] > images_seen
            if event["images"] == images_seen:
                after = event["event"] in again or str(event.get("name")).partition("/")[0] in again
        except (json.JSONDecodeError, KeyError, TypeError):
            after = True  # a line torn by a kill
        (lost if after else kept).append(line + "\n")
    if lost:
        with (run_dir / "metrics.lost.jsonl").open("a") as file:
            file.writelines(lost)
        with atomic_write(path) as out:
            out.write("".join(kept).encode())
    return len(lost)
