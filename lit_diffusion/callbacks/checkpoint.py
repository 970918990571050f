"""Checkpoints that are whole or absent, at a cadence and at the end."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_diffusion.clock import Cadence
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.run import run_logger_of


class Checkpoint(pl.callbacks.Checkpoint):
    """Writes ``checkpoints/last.ckpt``: to a temporary name, synced, renamed.

    Args:
        every_n_images: how often, in images seen; null: not by images.
        every_n_steps: how often, in steps; null: not by steps. With both, when either is due; always at the end.
    """

    def __init__(self, every_n_images: int | None = 100_000, every_n_steps: int | None = None) -> None:
        self.cadence = Cadence.of("checkpoint", every_n_images, every_n_steps)
        self.last: Path | None = None
        self.saved_at = -1
        """Images seen when last.ckpt was written."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due."""
        assert isinstance(pl_module, Method)
        if self.cadence.due(pl_module.clock):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end."""
        assert isinstance(pl_module, Method)
        if self.saved_at != pl_module.clock.images:
            self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, method: Method) -> None:
        """Write last.ckpt; all processes come.

        Raises:
            UserError: see :func:`write_checkpoint`.
        """
        path = checkpoint_folder(trainer) / "last.ckpt"
        write_checkpoint(trainer, method, path)
        self.last = path
        self.saved_at = method.clock.images


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """Where a run keeps its checkpoints."""
    run = run_logger_of(trainer)
    return (run.run_dir if run is not None else Path(trainer.default_root_dir)) / "checkpoints"


def write_checkpoint(trainer: pl.Trainer, method: Method, path: Path) -> None:
    """Write a checkpoint to a temporary name, sync, rename; all processes come.

    Raises:
        UserError: if the weights are not finite, the disk is full or the folder not writable; a file that was there
            before is untouched.
    """
    # A finite gradient can still throw the weights out of range: at a learning rate far too large.
    largest = torch._foreach_norm([p.detach() for p in method.denoiser.parameters()], float("inf"))
    if not bool(torch.stack(largest).isfinite().all()):
        raise UserError(
            f"training diverged: the weights are not finite at step {method.clock.steps} ({method.clock.images} "
            f"images) and are not saved: lower the learning rate, and continue from the checkpoint before, if any"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        with suppress(OSError):  # Where the folder is a file, even looking for it fails.
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({str(error).splitlines()[0]}); the one before is untouched: "
            f"free some space and continue from it"
        ) from error
