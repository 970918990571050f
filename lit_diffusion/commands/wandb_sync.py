"""``wandb-sync``: replay a recorded run from its files as one Weights & Biases run."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lit_diffusion.config.parser import Parser
from lit_diffusion.errors import UserError
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.dashboard import Dashboard, logged_in
from lit_diffusion.runs.events import Event, RecordedRun, read_config, read_run, recorded_png
from lit_diffusion.runs.lock import RunLock

DESCRIPTION = """Replays a run's metrics.jsonl and its pictures into one Weights & Biases run, in order, each step once.
For runs that were trained offline and interrupted, or recorded with --wandb.mode disabled: each start left an offline
folder of its own, and `wandb sync` of several folders under one id loses or doubles what they share. An id that the
server has already is refused, because its history would double: give a new one by --id."""


def _parser() -> Parser:
    parser = Parser(prog="python -m lit_diffusion wandb-sync", description=DESCRIPTION)
    parser.add_argument("run", type=str | None, nargs="?", default=None, help="The run's directory.")
    parser.add_argument("--project", type=str | None, default=None, help="Project; default: the run's own.")
    parser.add_argument("--entity", type=str | None, default=None, help="User or team; default: the run's own.")
    parser.add_argument(
        "--mode",
        type=Literal["online", "offline"],
        default="online",
        help="online, or offline: into a folder below RUN/wandb-sync, for `wandb sync` from a machine with a network.",
    )
    parser.add_argument("--id", type=str | None, default=None, help="Id on Weights & Biases; default: the run's.")
    return parser


class Replay(Dashboard):
    """Dashboard of a run that is over: trouble is an error, and an existing Weights & Biases run is never added to."""

    resume: Literal["allow", "never"] = "never"

    def __init__(self, mode: Literal["online", "offline"], project: str, entity: str | None, tags: Any) -> None:
        super().__init__(mode, project, entity, tags)
        self.time = 0.0
        """Time of the event that is shown; without it, all events would have today's."""

    @contextmanager
    def _trouble_is_a_note(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            begun, self._run = self._run, None
            if begun is not None:
                with suppress(Exception):  # The first error is the one to report.
                    begun.finish(exit_code=1)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Weights & Biases refused the replay ({reason}); if it has this run already, its history would "
                f"double: delete it there, or give a new id by --id"
            ) from error

    def _send(self, values: Mapping[str, Any], clock: Clock) -> None:
        super()._send({**values, "_timestamp": self.time} if values else values, clock)

    @property
    def place(self) -> str:
        """Address of the Weights & Biases run, or its folder."""
        return str(self._run.url) if self.mode == "online" else str(Path(self._run.dir).parent)


def main(arguments: Sequence[str]) -> None:
    """Run ``wandb-sync``.

    Raises:
        UserError: if the run cannot be read, or Weights & Biases refuses it.
    """
    options = _parser().parse_args(list(arguments))
    if options.run is None:
        raise UserError("wandb-sync takes a run's directory: python -m lit_diffusion wandb-sync runs/ncsn/<run id>")
    RunLock(Path(options.run), print_note).require_free()  # A run being written would be shown in part.
    run = read_run(Path(options.run))
    config = read_config(run.folder)
    own = config.get("wandb") if isinstance(config.get("wandb"), dict) else {}
    assert isinstance(own, dict)
    replay = Replay(
        options.mode,
        options.project or own.get("project") or "lit_diffusion",
        options.entity or own.get("entity"),
        own.get("tags"),
    )
    require_login(replay)
    said = replayed(run, replay, options.id or str(run.of("start")[0].get("run_id")), config)
    sys.stdout.write(f"{said}\n")


def require_login(replay: Dashboard) -> None:
    """Refuse to start where wandb would ask for a key.

    Raises:
        UserError: if wandb cannot be used, or no user is logged in for an online replay.
    """
    try:
        known = logged_in()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"wandb cannot be used ({reason}): pip install --force-reinstall wandb") from error
    if replay.mode == "online" and not known:
        raise UserError("you are not logged in to Weights & Biases: wandb login, or replay with --mode offline")


def replayed(run: RecordedRun, replay: Replay, run_id: str, config: dict[str, Any]) -> str:
    """Replay all events in their order.

    Returns:
        Text on what was replayed, and where it is.

    Raises:
        UserError: if Weights & Biases refuses it.
    """
    folder = run.folder / "wandb-sync"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; copy the run to where you may write") from error
    replay.open(run_id, folder.resolve(), str(config.get("experiment", "run")), config)
    place = replay.place
    clock, missing, pictures = Clock(), 0, 0
    for event in run.events:
        values = {key: value for key, value in event.items() if key not in ("event", "step", "images", "time")}
        clock.steps = int(event.get("step") or 0)
        if event["event"] == "test" and "protocol" not in event:
            values["images"] = event["images"]  # Images measured, not images seen.
        else:
            clock.images = event["images"]
        replay.time = float(event["time"])
        replay.log(event["event"], values, clock)
        if event["event"] == "picture":
            picture = _picture(run.folder, event)
            if picture is None:
                missing += 1
            else:
                pictures += 1
                replay.picture(str(event.get("name")), picture, str(event.get("caption", "")), clock)
    ends = [event for event in run.events if event["event"] in ("start", "end")]
    replay.close(failed=ends[-1].get("status") != "success")
    said = [f"replayed {len(run.events)} events and {pictures} pictures of {run.folder} as {place}"]
    if missing:
        said.append(f"  {missing} recorded pictures are not there any more")
    if run.torn:
        said.append(f"  {run.torn} torn lines were left out")
    if replay.mode == "offline":
        said.append(f"  upload: wandb sync {place}")
        said.append("  if Weights & Biases has this id already, delete it there before, or replay with a new --id")
    return "\n".join(said)


def _picture(folder: Path, event: Event) -> np.ndarray | None:
    """Read a recorded picture, uint8 ``[H, W, C]``; None where the file is missing or no PNG."""
    png = recorded_png(folder, event.get("file"))
    if png is None:
        return None
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels
