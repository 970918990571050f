"""A run: the directory it owns and what it writes there. metrics.jsonl is the truth, dashboards are views of it."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write
from lit_diffusion.images import save_png
from lit_diffusion.plots.panels import better
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.formats import FORMAT_VERSION, require_known_format
from lit_diffusion.runs.lock import RunLock
from lit_diffusion.training.failures import Attempt, Failure

RUN_DIR_FILES = ("config.yaml", "metrics.jsonl", "run_id")

SETTINGS = frozenset({"seed", "rtol", "atol", "t_min", "steps", "sampled"})
"""Numbers of an event that say how something was measured, not what was found: no curves."""


class Dashboard:
    """Weights & Biases, as a view of the run: absent or in trouble, it changes nothing else.

    Args:
        mode: ``auto``: online when you are logged in, offline otherwise; ``online``; ``offline``; ``disabled``: wandb
            is not even imported.
        project: of the dashboard.
        entity: user or team that owns the project, null for your default.
        tags: words to find the run by.
    """

    resume: Literal["allow", "never"] = "allow"
    """What wandb does where it has a run of this id already."""

    def __init__(
        self,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        project: str = "lit_diffusion",
        entity: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self.tags = tags
        self.on_trouble: Callable[[], None] = lambda: None
        """Called when the view is lost; a run counts it."""
        self._run: Any = None
        self._defined: set[str] = set()

    def resolved_mode(self) -> str:
        """``online``, ``offline`` or ``disabled``; the variable WANDB_MODE settles ``auto``."""
        if self.mode != "auto":
            return self.mode
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            return chosen
        return "online" if logged_in() else "offline"

    @contextmanager
    def _trouble_is_a_note(self) -> Iterator[None]:
        """Whatever wandb or its service does, or where it is not installed: the run goes on without this view."""
        try:
            yield
        except Exception as error:
            print_note(f"Weights & Biases is off: {(str(error) or type(error).__name__).splitlines()[0]}")
            self._run = None
            if not isinstance(error, ModuleNotFoundError):  # Absent is one of the three ways to have it.
                self.on_trouble()

    def open(self, run_id: str, run_dir: Path, experiment: str, config: dict[str, Any]) -> None:
        """Start the view of a run."""
        with self._trouble_is_a_note():
            mode = self.resolved_mode()
            if mode == "disabled":
                return
            import wandb

            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                id=run_id,
                name=f"{experiment}/{run_id}",
                project=self.project,
                entity=self.entity,
                tags=self.tags,
                dir=str(run_dir),
                config=config,
                resume=self.resume,
                settings=wandb.Settings(silent=True, console="off"),
            )
            # One clock for all panels; wandb's own step is never given, so nothing is ever out of order.
            self._run.define_metric("images")
            self._run.define_metric("*", step_metric="images")
            self._defined.clear()

    def log(self, event: str, values: Mapping[str, Any], clock: Clock) -> None:
        """One event, its numbers in the section of its name."""
        self._send(dashboard_values(event, values), clock)

    def picture(self, name: str, picture: np.ndarray, caption: str, clock: Clock) -> None:
        """One picture, uint8 ``[H, W, C]``."""
        if self._run is not None:
            with self._trouble_is_a_note():
                import wandb

                image = wandb.Image(picture[..., 0] if picture.shape[-1] == 1 else picture, caption=caption)
                self._send({f"pictures/{name}": image}, clock)

    def _send(self, values: Mapping[str, Any], clock: Clock) -> None:
        if self._run is None or not values:
            return
        with self._trouble_is_a_note():
            # By its whole name: which of several patterns that fit a key counts, wandb leaves open.
            for key in values.keys() - self._defined:
                if best := better(key.removeprefix("evaluation/")):
                    self._run.define_metric(key, step_metric="images", summary=f"last,{best}")
                self._defined.add(key)
            self._run.log({**values, "images": clock.images, "trainer/global_step": clock.steps})

    def close(self, failed: bool) -> None:
        """Say whether it ended well."""
        if self._run is not None:
            with self._trouble_is_a_note():
                self._run.finish(exit_code=1 if failed else 0)
            self._run = None


def logged_in() -> bool:
    """Whether this machine has a key of Weights & Biases; asks no server."""
    import wandb

    return bool(wandb.api.api_key)


def dashboard_values(event: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a dashboard shows of an event, as docs/dashboard.md says: numbers, and the protocol as JSON.

    The part of a key before its first slash is the panel's section. What modules log through Lightning, event
    ``metrics``, brings its own (``val/loss``).
    """
    if event in ("start", "end", "picture"):  # pictures are shown themselves
        return {}
    section = "" if event == "metrics" else f"{event}/"
    shown: dict[str, Any] = {
        f"{section}{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and key not in SETTINGS
    }
    if isinstance(protocol := values.get("protocol"), dict):
        shown[f"{section}protocol"] = json.dumps(protocol, sort_keys=True)
    return shown


@rank_zero_only
def print_note(line: str) -> None:
    """One line for the person at the terminal, outside the progress bar; of several processes the first says it."""
    from tqdm import tqdm

    with suppress(OSError, ValueError):  # A terminal that is gone, a full disk that the output goes to.
        tqdm.write(line)


def new_run_id() -> str:
    """The time and eight random hexadecimal digits, not from the run's seed: ``20260131-142501-9f3a01c7``."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def _plain(value: Any) -> Any:
    """A value as JSON takes it; NaN and infinity, which JSON lacks, as strings."""
    if isinstance(value, Tensor | np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class RunLogger(Logger):
    """Owns a run's directory and writes its events.

    Process 0 chooses the id and the directory and tells the others when the Trainer has connected them, which is before
    anything is logged.

    Args:
        experiment: the run's family, the folder below ``root``.
        config_text: the complete resolved configuration, for config.yaml.
        config: the same as plain types, for the dashboard.
        run_dir: the directory; None for ``<root>/<experiment>/<run id>``.
        root: of all runs.
        dashboard: Weights & Biases or None.
        continues: whether an existing run in ``run_dir`` is being continued from a checkpoint of its own.
        changed: what is configured differently than in the checkpoint, by dotted key: there and now.
        lock: of ``run_dir``, where it was taken before; else it is taken when the directory is opened.
    """

    def __init__(
        self,
        experiment: str,
        config_text: str = "",
        config: dict[str, Any] | None = None,
        run_dir: Path | None = None,
        root: Path = Path("runs"),
        dashboard: Dashboard | None = None,
        continues: bool = False,
        changed: dict[str, Any] | None = None,
        lock: RunLock | None = None,
    ) -> None:
        super().__init__()
        self.lock = lock
        self.experiment_name = experiment
        self.config_text = config_text
        self.config = config or {}
        self.root = Path(root)
        self.dashboard = dashboard
        self.clock = Clock()
        self.continues = continues
        self.changed = changed or {}
        self.interrupted = False
        """Whether the run ends because it was asked to stop; it can be continued."""
        self.failed: Counter[str] = Counter()
        """How often each thing beside the training failed, in the whole run."""
        self._told: set[tuple[str, str, str]] = set()
        self._has_begun = False
        """Whether anything was recorded beyond that the run started."""
        self._folders_made: list[Path] = []
        if dashboard is not None:
            dashboard.on_trouble = lambda: self.failed.update(["dashboard"])
        self.weights = "raw"
        """What the model has at the moment; whoever gives it an average for a while says so here."""
        self.wanted = run_dir
        """The directory asked for, None for one of its own below the root."""
        self._run_dir: Path | None = None
        self._run_id: str | None = None

    # ---- what Lightning asks for -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The experiment."""
        return self.experiment_name

    @property
    def version(self) -> str:
        """The run's id."""
        self.open()
        assert self._run_id is not None
        return self._run_id

    @property
    def save_dir(self) -> str:
        """The run's directory."""
        return str(self.run_dir)

    @property
    def experiment(self) -> RunLogger:
        """Itself; the Trainer asks for it once all processes are connected, and that opens the directory."""
        self.open()
        return self

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them all."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """What modules log through Lightning, with the weights that it was measured with."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self.record("metrics", {**values, "weights": self.weights})

    def finalize(self, status: str) -> None:
        """The dashboard's end, and the last event of a fit, validate, test or predict, with the count of failures."""
        if self._run_dir is None:
            return
        try:
            if self.dashboard is not None:
                self.dashboard.close(failed=status != "success" and not self.interrupted)
        finally:
            end: dict[str, Any] = {"status": "interrupted" if self.interrupted else status}
            end["failures"] = self.failed.total()
            if self.failed:
                end["failed"] = dict(self.failed)
            self.record("end", end)
            if self.lock is not None:  # What is recorded later takes it again.
                self.lock.release()

    def withdraw(self) -> None:
        """Leave nothing of a new run that was refused before anything happened in it: its name is free again."""
        if self._run_dir is None or self._has_begun or self.continues:
            return
        directory, self._run_dir = self._run_dir, None
        if self.dashboard is not None:
            self.dashboard.close(failed=True)
        if not self._is_writer or self.lock is None or not self.lock.held or self.lock.lost() is not None:
            return  # What is there may be another's by now.
        for name in RUN_DIR_FILES:
            (directory / name).unlink(missing_ok=True)
        for folder in self._folders_made:
            shutil.rmtree(folder, ignore_errors=True)
        self.lock.release()

    # ---- the directory -----------------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        self.open()
        assert self._run_dir is not None
        return self._run_dir

    def open(self) -> None:
        """Choose id and directory on process 0, tell the others, write config.yaml and the first event."""
        if self._run_dir is not None:
            return
        many = dist.is_available() and dist.is_initialized()
        chosen: list[Any] = [None]
        if not many or dist.get_rank() == 0:
            try:
                chosen = [self._create()]
            except UserError as error:
                if self.lock is not None:
                    self.lock.release()
                chosen = [error]
        if many:
            dist.broadcast_object_list(chosen, src=0)
        if isinstance(chosen[0], UserError):
            raise chosen[0]
        run_id, directory, failed = chosen[0]
        self._run_id, self._run_dir = run_id, Path(directory)
        self.failed.update(failed)
        if self._is_writer:
            start = {"format_version": FORMAT_VERSION, "run_id": run_id, "resumed": self.continues}
            self.record("start", {**start, "changed": self.changed} if self.changed else start)
            if self.dashboard is not None:
                self.dashboard.open(run_id, self._run_dir, self.experiment_name, self.config)

    def lost(self) -> str | None:
        """Why this process, which writes for all, may no longer write; None where it may."""
        self.open()
        assert self.lock is not None
        try:
            self.lock.take()  # Again, after an end that was not the last.
        except UserError as error:
            return str(error)
        return self.lock.lost()

    def _require_own(self) -> None:
        """Refuse to write where another process writes.

        Raises:
            UserError: naming it.
        """
        if (lost := self.lost()) is not None:
            raise UserError(lost, ends_run=True)

    @property
    def _is_writer(self) -> bool:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def _create(self) -> tuple[str, str, list[str]]:
        run_id = new_run_id()
        directory = self.wanted if self.wanted is not None else self.root / self.experiment_name / run_id
        self.lock = self.lock or RunLock(directory, print_note)
        self.lock.take()
        if not self.continues and any((directory / name).exists() for name in RUN_DIR_FILES):
            raise UserError(
                f"run_dir {directory} already holds a run; choose another, or continue that one with --resume auto"
            )
        path = directory / "metrics.jsonl"
        if self.continues and path.exists() and path.stat().st_size > 0:  # Empty if no checkpoint was written before.
            require_known_events(directory)
        try:
            if self.continues:
                run_id = (directory / "run_id").read_text().strip()
            folders = [directory / name for name in ("samples", "checkpoints", "wandb")]
            self._folders_made = [folder for folder in folders if not folder.exists()]
            (directory / "samples").mkdir(parents=True, exist_ok=True)
            (directory / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            what = "continue the run in" if self.continues else "make the run's directory"
            raise UserError(f"cannot {what} {directory}: {error}; choose another with --run_dir") from error
        if not self.continues:
            with atomic_write(directory / "run_id") as id_file:
                id_file.write(f"{run_id}\n".encode())
        if not (directory / "config.yaml").exists():  # Which a kill at the very beginning may have left out.
            with atomic_write(directory / "config.yaml") as config_file:
                config_file.write(self.config_text.encode())
        return run_id, str(directory.resolve()), _failed_before(path) if self.continues else []

    def settle(self, key: str, value: Any) -> None:
        """Write a value that the run has found for itself where config.yaml said ``auto``; a dotted key."""
        if not self._is_writer:
            return
        import yaml

        from lit_diffusion.config.yaml_files import read_yaml

        path = self.run_dir / "config.yaml"
        config = read_yaml(path) or {}
        section, parents = config, key.split(".")
        for name in parents[:-1]:
            section = section.setdefault(name, {})
        if section.get(parents[-1]) == value:
            return
        section[parents[-1]] = value
        with atomic_write(path) as file:
            file.write(yaml.safe_dump(config, sort_keys=False).encode())

    # ---- events ------------------------------------------------------------------------------------------------

    def record(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one event to metrics.jsonl, with step, images seen and time, and show its numbers on the dashboard."""
        self.open()
        self._has_begun = self._has_begun or event != "start"
        if not self._is_writer:
            return
        self._require_own()
        plain = {key: _plain(value) for key, value in values.items()}
        line = {"event": event, "step": self.clock.steps, "images": self.clock.images, "time": round(time.time(), 3)}
        path = self.run_dir / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps({**line, **plain}) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; free some space and continue the run", ends_run=True
            ) from error
        if self.dashboard is not None:
            self.dashboard.log(event, plain, self.clock)

    def fail(self, name: str, failures: list[Failure], said: bool = False) -> None:
        """Say, record and count that something beside the training failed: event ``failed``; all processes come.

        In full the first time; where the same fails at the same place again, in short.

        Args:
            name: of what failed.
            failures: of the processes; the first is recorded.
            said: whether the person at the terminal knows already.
        """
        first = failures[0]
        key = (name, first.kind, first.place)
        again = key in self._told
        self._told.add(key)
        self.failed[name] += 1
        if not said:
            print_note(_failed_line(name, first, self.clock, again))
        values: dict[str, Any] = {"name": name, "error": f"{first.kind}: {first.message}", "place": first.place}
        if len(failures) > 1 or first.process:
            values["processes"] = [failure.process for failure in failures]
        self.record("failed", values if again else {**values, "traceback": first.traceback})

    def picture(self, name: str, picture: np.ndarray, caption: str, values: Mapping[str, Any] | None = None) -> Path:
        """Save a picture as ``samples/<name>-<images>.png``, record it, and show it; uint8 ``[H, W, C]``."""
        if picture.dtype != np.uint8:
            raise TypeError(f"picture {name} is {picture.dtype}, not uint8: wandb shows other types as black")
        path = self.run_dir / "samples" / f"{name}-{self.clock.images:010d}.png"
        if self._is_writer:
            self._require_own()
            save_png(picture, path)
            self.record("picture", {"name": name, "file": f"samples/{path.name}", "caption": caption, **(values or {})})
            if self.dashboard is not None:
                self.dashboard.picture(name, picture, caption, self.clock)
        return path


def run_logger_of(trainer: Any) -> RunLogger | None:
    """The run's own logger among a Trainer's, None in a bare Trainer."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


@contextmanager
def survived(trainer: Any, name: str) -> Iterator[None]:
    """What is done beside the training, and must not end it: a failure is said, recorded and counted, and that is all.

    All processes come, and a failure of one is one of all, see :mod:`lit_diffusion.training.failures`.

    Args:
        trainer: whose run it is.
        name: of what is done; the event ``failed`` has it.
    """
    with Attempt() as attempt:
        yield
    if attempt.failures:
        tell_of(trainer, name, attempt.failures)


def tell_of(trainer: Any, name: str, failures: list[Failure], said: bool = False) -> None:
    """Say, record and count a failure that was survived, see :meth:`RunLogger.fail`; where there is no run, say it."""
    run = run_logger_of(trainer)
    if run is not None:
        run.fail(name, failures, said)
    elif not said:
        print_note(_failed_line(name, failures[0], getattr(trainer.lightning_module, "clock", Clock())))


def _failed_line(name: str, failure: Failure, clock: Clock, again: bool = False) -> str:
    if again:
        return f"{name} failed again at {clock.images} images: {failure.kind} at {failure.place}"
    return f"{name} failed at {clock.images} images, and the run goes on without: {failure}"


def _failed_before(path: Path) -> list[str]:
    """What failed, once for each time, by the events of a run that is continued."""
    if not path.exists():
        return []
    names = []
    for line in path.read_text().splitlines():
        if '"event": "failed"' in line:
            with suppress(ValueError):  # A line torn by a kill.
                names.append(str(json.loads(line).get("name")))
    return names


def require_known_events(run_dir: Path) -> None:
    """Refuse to continue a run whose events are not there or of another format.

    Raises:
        UserError: saying which.
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
        run_dir: of the run that is continued.
        images_seen: by the checkpoint; -1 where there is none, so that all events are made again.
        again: events, and names of pictures, of the checkpoint's own moment that were written after it, if they were:
            they are made again too.

    Returns:
        How many events were moved.

    Raises:
        UserError: if there are none, or of an unknown format; then nothing is touched.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
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
