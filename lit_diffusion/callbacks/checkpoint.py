"""Checkpoints that are whole or absent: at a cadence, when the run is asked to stop, and at the end."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lit_diffusion import interrupts
from lit_diffusion.distributed import sum_over_ranks
from lit_diffusion.errors import UserError
from lit_diffusion.files import sync_folder
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.logger import run_logger_of
from lit_diffusion.training.lightning_internals import checkpoint_of
from lit_diffusion.training.module import TrainedModule
from lit_diffusion.training.sharding import to_local
from lit_diffusion.training.trainer import callbacks_of

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""File names of a run's newest checkpoint, and of the one before it in case the disk loses the newest."""


class Checkpoint(pl.callbacks.Checkpoint):
    """Write ``checkpoints/last.ckpt``: to a temporary name, synced, renamed; the one before is ``previous.ckpt``.

    Args:
        every_n_images: interval in images seen; null: not by images.
        every_n_steps: interval in steps; null: not by steps. With both, when either is due; always at the end, and
            when the run is asked to stop (SIGTERM, SIGUSR1, Ctrl-C).

        Raises:
            UserError: for an interval that is not positive.
    """

    def __init__(self, every_n_images: int | None = 100_000, every_n_steps: int | None = None) -> None:
        self.cadence = Cadence.of("checkpoint", every_n_images, every_n_steps)
        self.last: Path | None = None
        self.saved_at = -1
        """Images seen when last.ckpt was written."""
        self.outdated = False
        """True where something was drawn since last.ckpt was written, at the same number of images."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop the run if any process was asked to: between two steps, when all that follows a step is done."""
        assert isinstance(pl_module, TrainedModule)
        self._stop_if_asked(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint when due."""
        assert isinstance(pl_module, TrainedModule)
        if self.cadence.due(pl_module.clock):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final checkpoint."""
        assert isinstance(pl_module, TrainedModule)
        self._save_if_behind(trainer, pl_module)
        self._stop_if_asked(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the directory of a run that is refused before its first step."""
        run = run_logger_of(trainer)
        refused = isinstance(exception, UserError) and not isinstance(exception, Interrupted)
        if run is not None and refused and self.saved_at < 0:
            run.withdraw()

    def _stop_if_asked(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        if not module.interrupted:
            return
        self._save_if_behind(trainer, module)
        if (run := run_logger_of(trainer)) is not None:
            run.interrupted = True
        by = interrupts.asked() or "another process's signal"
        # Lightning's launcher takes a child's code for a crash, and kills the process that may still be writing.
        child = not trainer.is_global_zero and isinstance(_environment(trainer), LightningEnvironment)
        raise Interrupted(
            f"stopped by {by} after {module.clock.images} images, saved in {self.last}: the same command with "
            f"--run_dir {checkpoint_folder(trainer).parent} --resume auto continues",
            exit_code=0 if child else interrupts.EXIT_CODE,
            quiet=not trainer.is_global_zero,
        )

    def _save_if_behind(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        if self.outdated or self.saved_at != module.clock.images:
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        """Write last.ckpt; a collective call.

        Raises:
            UserError: see :func:`write_checkpoint`.
        """
        folder = checkpoint_folder(trainer)
        module.stopwatch.lap("logging")
        # Continued from previous.ckpt, since last.ckpt is damaged: it stays until there is a new last.ckpt.
        from_previous = self.saved_at < 0 and _same_file(trainer.ckpt_path, folder / PREVIOUS)
        again = self.saved_at == module.clock.images  # Then previous.ckpt stays, of an earlier moment.
        write_checkpoint(trainer, module, folder / LAST, None if from_previous or again else folder / PREVIOUS)
        module.stopwatch.lap("checkpoint")
        self.last = folder / LAST
        self.saved_at, self.outdated = module.clock.images, False


def save_before(trainer: pl.Trainer, module: TrainedModule, again: bool = False) -> None:
    """Save the run's state before something is drawn, unless it is saved already; a collective call.

    Args:
        trainer: the run's Trainer.
        module: the module being trained.
        again: if true, save again where something was drawn since.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, Checkpoint):
            if callback.saved_at != module.clock.images or (again and callback.outdated):
                callback.save(trainer, module)
            callback.outdated = True


def save_after(trainer: pl.Trainer, module: TrainedModule) -> None:
    """Save the state again after something was drawn, where it was saved before; a collective call."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, Checkpoint) and callback.outdated:
            callback.save(trainer, module)


def _same_file(path: Any, other: Path) -> bool:
    return path is not None and Path(path).resolve() == other.resolve()


def _environment(trainer: pl.Trainer) -> Any:
    return getattr(trainer.strategy, "cluster_environment", None)


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """The folder of a run's checkpoints."""
    run = run_logger_of(trainer)
    return (run.run_dir if run is not None else Path(trainer.default_root_dir)) / "checkpoints"


def write_checkpoint(trainer: pl.Trainer, module: TrainedModule, path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint to a temporary name, sync, rename; a collective call.

    Args:
        trainer: the Trainer whose state is written.
        module: the module whose weights are written.
        path: the file, never torn: at any time it is the old file or the new one.
        previous: path under which the old file is kept; None: it is not kept.

    Raises:
        UserError: on every process, if the weights are not finite, the disk is full, the folder not writable, or the
            run taken over by another process; what was there before is untouched.
    """
    # A finite gradient can still throw the weights out of range: at a learning rate far too large.
    mine = [to_local(p.detach()) for p in module.averaged().values()]
    largest = torch._foreach_norm([p for p in mine if p.numel() > 0], float("inf"))  # A share may be empty.
    broken = torch.stack(largest).isfinite().logical_not().sum().double()
    if float(sum_over_ranks(broken)) > 0.0:
        raise UserError(
            f"training diverged: the weights are not finite at step {module.clock.steps} ({module.clock.images} "
            f"images) and are not saved: lower the learning rate, and continue from the checkpoint before, if any",
            ends_run=True,
        )
    # Not Trainer.save_checkpoint: where one process fails to write, it leaves the others waiting.
    state = checkpoint_of(trainer)
    failure = None
    if trainer.is_global_zero:
        run = run_logger_of(trainer)
        failure = (run.lost() if run is not None else None) or _write(state, path, previous)
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise UserError(failure, ends_run=True)


def _write(state: dict[str, Any], path: Path, previous: Path | None) -> str | None:
    """Write the file, on one process; return what went wrong and how to go on, or None."""
    temporary = path.with_name(f".{path.name}.tmp")  # One name, so that what a kill leaves is written over.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        with suppress(OSError):  # Where the folder is a file, even looking for it fails.
            temporary.unlink(missing_ok=True)
        return (
            f"cannot write {path} ({str(error).splitlines()[0]}); the one before is untouched: free some space and "
            f"continue from it"
        )
    return None


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name by a hard link, so that the first stays until the new file replaces it."""
    link = previous.with_name(f".{previous.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # A file system without hard links: for a moment there is only the previous one.
        path.replace(previous)
    else:
        link.replace(previous)
