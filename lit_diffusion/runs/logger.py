"""The logger of a run, which owns its directory: metrics.jsonl is the record, dashboards are views of it."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.failures import Attempt, Failure
from lit_diffusion.files import atomic_write
from lit_diffusion.images import save_png
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.dashboard import Dashboard
from lit_diffusion.runs.events import failed_before, require_known_events
from lit_diffusion.runs.formats import FORMAT_VERSION
from lit_diffusion.runs.lock import RunLock

RUN_DIR_FILES = ("config.yaml", "metrics.jsonl", "run_id")


def new_run_id() -> str:
    """Time and eight random hexadecimal digits, not from the run's seed: ``20260131-142501-9f3a01c7``."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def _plain(value: Any) -> Any:
    """Convert a value for JSON; NaN and infinity, which JSON lacks, become strings."""
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
    """Logger that owns a run's directory and writes its events.

    Process 0 chooses the id and the directory and sends them to the others when the Trainer has connected them, which
    is before anything is logged.

    Args:
        experiment: the run's family, the folder below ``root``.
        config_text: the complete resolved configuration, for config.yaml.
        config: the configuration as plain types, for the dashboard.
        run_dir: the run's directory; None for ``<root>/<experiment>/<run id>``.
        root: folder of all runs.
        dashboard: Weights & Biases or None.
        continues: if true, an existing run in ``run_dir`` is continued from a checkpoint of its own.
        changed: values configured differently than in the checkpoint, by dotted key: the checkpoint's and the new one.
        lock: lock of ``run_dir``, if it was taken before; else it is taken when the directory is opened.
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
        """True where the run ends because it was asked to stop; it can be continued."""
        self.failed: Counter[str] = Counter()
        """Number of failures of each picture, metric and the like, in the whole run."""
        self._reported: set[tuple[str, str, str]] = set()
        self._has_begun = False
        """True once anything besides the start was recorded."""
        self._folders_made: list[Path] = []
        if dashboard is not None:
            dashboard.on_trouble = lambda: self.failed.update(["dashboard"])
        self.weights = "raw"
        """Name of the weights that the model has at the moment, set by code that gives it an average for a while."""
        self.wanted = run_dir
        """The directory asked for, None for a new one below the root."""
        self._run_dir: Path | None = None
        self._run_id: str | None = None

    # ---- Lightning's interface ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the experiment."""
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
        """The logger itself; the Trainer reads it once all processes are connected, which opens the directory."""
        self.open()
        return self

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has all hyperparameters."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record what modules log through Lightning, with the name of the weights it was measured with."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self.record("metrics", {**values, "weights": self.weights})

    def finalize(self, status: str) -> None:
        """Close the dashboard, and record the end of a fit, validate, test or predict with its count of failures."""
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
            if self.lock is not None:  # A later record takes it again.
                self.lock.release()

    def withdraw(self) -> None:
        """Remove a new run that was refused before anything happened in it, so that its name is free again."""
        if self._run_dir is None or self._has_begun or self.continues:
            return
        directory, self._run_dir = self._run_dir, None
        if self.dashboard is not None:
            self.dashboard.close(failed=True)
        if not self._is_writer or self.lock is None or not self.lock.held or self.lock.lost() is not None:
            return  # The files may be another process's by now.
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
        """Choose id and directory on process 0, send them to the others, write config.yaml and the first event."""
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
        """Reason why this process, which writes for all, may no longer write; None where it may."""
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
            UserError: naming that process.
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
        if self.continues and path.exists() and path.stat().st_size > 0:  # Empty where a run had no checkpoint yet.
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
        if not (directory / "config.yaml").exists():  # A kill at the beginning may have left it out.
            with atomic_write(directory / "config.yaml") as config_file:
                config_file.write(self.config_text.encode())
        return run_id, str(directory.resolve()), failed_before(path) if self.continues else []

    def write_resolved(self, key: str, value: Any) -> None:
        """Write the value found for an ``auto`` of config.yaml, by its dotted key."""
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
        """Print, record and count a failure that does not end the training: event ``failed``; a collective call.

        The first time in full, in short where the same fails at the same place again.

        Args:
            name: name of what failed.
            failures: the processes' failures; the first is recorded.
            said: if true, it was printed already.
        """
        first = failures[0]
        key = (name, first.kind, first.place)
        again = key in self._reported
        self._reported.add(key)
        self.failed[name] += 1
        if not said:
            print_note(_failed_line(name, first, self.clock, again))
        values: dict[str, Any] = {"name": name, "error": f"{first.kind}: {first.message}", "place": first.place}
        if len(failures) > 1 or first.process:
            values["processes"] = [failure.process for failure in failures]
        self.record("failed", values if again else {**values, "traceback": first.traceback})

    def picture(self, name: str, picture: np.ndarray, caption: str, values: Mapping[str, Any] | None = None) -> Path:
        """Save a picture, uint8 ``[H, W, C]``, as ``samples/<name>-<images>.png``, record it, and show it.

        Raises:
            TypeError: for another type.
        """
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
    """The RunLogger among a Trainer's loggers, None where it has none."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


@contextmanager
def survived(trainer: Any, name: str) -> Iterator[None]:
    """Context whose failure is printed, recorded and counted, and does not end the training.

    Collective: a failure of one process is one of all, see :mod:`lit_diffusion.failures`.

    Args:
        trainer: the run's Trainer.
        name: name of what is done, which the event ``failed`` records.
    """
    with Attempt() as attempt:
        yield
    if attempt.failures:
        tell_of(trainer, name, attempt.failures)


def tell_of(trainer: Any, name: str, failures: list[Failure], said: bool = False) -> None:
    """Print, record and count a failure, see :meth:`RunLogger.fail`; only print it where there is no run."""
    run = run_logger_of(trainer)
    if run is not None:
        run.fail(name, failures, said)
    elif not said:
        print_note(_failed_line(name, failures[0], getattr(trainer.lightning_module, "clock", Clock())))


def _failed_line(name: str, failure: Failure, clock: Clock, again: bool = False) -> str:
    if again:
        return f"{name} failed again at {clock.images} images: {failure.kind} at {failure.place}"
    return f"{name} failed at {clock.images} images, and the run goes on without: {failure}"
