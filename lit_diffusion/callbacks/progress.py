"""What a person sees while it trains, and what metrics.jsonl keeps of it."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from lit_diffusion.clock import Cadence
from lit_diffusion.methods.base import Method
from lit_diffusion.run import run_logger_of


class ProgressBar(TQDMProgressBar):
    """One bar for the whole training, in images, with the loss and images/s."""

    def __init__(self) -> None:
        super().__init__()
        self._images: tqdm[Any] | None = None
        self._smooth = 0.0
        self._weight = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, Method)
        total = getattr(trainer, "max_images", None)
        if total is None and trainer.max_steps > 0:
            total = trainer.max_steps * pl_module.clock.batch
        self._images = tqdm(
            total=total,
            initial=pl_module.clock.images,
            unit=" images",
            unit_scale=True,
            desc="training",
            dynamic_ncols=True,
            disable=self.is_disabled,
            file=sys.stdout,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Nothing: there is one endless epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; the loss shown is an average over about the last fifty steps."""
        assert isinstance(pl_module, Method)
        assert self._images is not None
        if pl_module.stepped and not self.is_disabled:
            self._smooth = 0.98 * self._smooth + 0.02 * float(pl_module.last_loss)
            self._weight = 0.98 * self._weight + 0.02
            self._images.set_postfix(loss=f"{self._smooth / self._weight:.4g}", refresh=False)
        self._images.update(pl_module.clock.batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        if self._images is not None:
            self._images.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal on a line of its own."""
        if self._images is not None:
            self._images.close()


LOSS_BINS = 10
"""Equal parts of [0, 1] whose losses are told apart: ``loss@0.05`` is of the noise levels with t below 0.1."""


class Telemetry(pl.Callback):
    """Writes loss, gradient norm, learning rate and images/s to metrics.jsonl and the dashboard, and the loss by time.

    Args:
        every_n_images: how often, in images seen; null: not by images.
        every_n_steps: how often, in steps; null: not by steps. With both, when either is due.
    """

    def __init__(self, every_n_images: int | None = None, every_n_steps: int | None = 50) -> None:
        self.cadence = Cadence.of("telemetry", every_n_images, every_n_steps)
        self._sums: list[torch.Tensor] = []
        self._by_time = torch.zeros(2, LOSS_BINS, dtype=torch.float64)
        self._since = 0.0
        self._images = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the watch."""
        self._sums.clear()
        self._by_time = torch.zeros(2, LOSS_BINS, dtype=torch.float64, device=pl_module.device)
        self._since, self._images = time.perf_counter(), 0

    def exclude(self, seconds: float) -> None:
        """Do not count what was no training: drawing, evaluating."""
        self._since += seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; write when due. The figures are averages over the steps since the last event that were finite."""
        assert isinstance(pl_module, Method)
        if pl_module.stepped:
            self._sums.append(torch.stack((pl_module.last_loss, pl_module.last_gradient_norm)))
            bins = (pl_module.last_times * LOSS_BINS).ceil().long().clamp(1, LOSS_BINS) - 1
            losses = pl_module.last_losses.to(self._by_time.dtype)
            self._by_time[0].index_add_(0, bins, losses)
            self._by_time[1].index_add_(0, bins, torch.ones_like(losses))
        self._images += pl_module.clock.batch
        if not self.cadence.due(pl_module.clock):
            return
        run = run_logger_of(trainer)
        if self._sums:
            loss, norm = trainer.strategy.reduce(torch.stack(self._sums).mean(0), reduce_op="mean").tolist()
        else:
            loss = norm = float("nan")
        totals, counts = trainer.strategy.reduce(self._by_time, reduce_op="sum").tolist()
        if run is not None:
            elapsed = time.perf_counter() - self._since
            run.record(
                "train",
                {
                    "loss": loss,
                    "gradient_norm": norm,
                    "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                    "images_per_second": round(self._images / elapsed, 1),
                    "skipped_steps": pl_module.skipped_steps,
                    **{
                        f"loss@{(k + 0.5) / LOSS_BINS:.2f}": totals[k] / counts[k]
                        for k in range(LOSS_BINS)
                        if counts[k] > 0
                    },
                },
            )
        self.on_train_start(trainer, pl_module)
