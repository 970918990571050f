"""What a person sees while it trains, and what metrics.jsonl keeps of it."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from lit_diffusion.clock import Cadence
from lit_diffusion.distributed import many_processes, summed
from lit_diffusion.failures import agree
from lit_diffusion.flops import TRAINING
from lit_diffusion.methods.base import Method
from lit_diffusion.run import run_logger_of, survived


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
        with suppress(OSError, ValueError):  # A terminal that is gone, a full disk that the output goes to.
            self._show(pl_module)

    def _show(self, pl_module: Method) -> None:
        assert self._images is not None
        if pl_module.stepped and not self.is_disabled:
            self._smooth = 0.98 * self._smooth + 0.02 * float(pl_module.last_loss)
            self._weight = 0.98 * self._weight + 0.02
            self._images.set_postfix(loss=f"{self._smooth / self._weight:.4g}", refresh=False)
        self._images.update(pl_module.clock.batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._images is not None:
            with suppress(OSError, ValueError):
                self._images.close()


LOSS_BINS = 10
"""Equal parts of [0, 1] whose losses are told apart: ``loss@0.05`` is of the noise levels with t below 0.1."""


class Telemetry(pl.Callback):
    """Writes what a training does to metrics.jsonl and the dashboard: losses, speed, memory.

    An event ``train`` has the loss, the gradient's norm and the loss by time, averages over the steps since the last
    event that were not skipped; ``images_per_second`` of all processes; ``seconds_per_step`` and its parts on process 0
    (``seconds/data``, ..., see :data:`~lit_diffusion.stopwatch.PARTS`); ``tflops``, the backbone's floating-point
    operations a second on all processes, in 10^12; and the largest memory of process 0 so far, in GB.

    Args:
        every_n_images: how often, in images seen; null: not by images.
        every_n_steps: how often, in steps; null: not by steps. With both, when either is due.
    """

    writes_to_run = True

    @property
    def state_key(self) -> str:
        """Under which a checkpoint keeps the state."""
        return type(self).__name__

    def __init__(self, every_n_images: int | None = None, every_n_steps: int | None = 50) -> None:
        self.cadence = Cadence.of("telemetry", every_n_images, every_n_steps)
        self._sums: list[torch.Tensor] = []
        self._by_time = torch.zeros(2, LOSS_BINS, dtype=torch.float64)
        self._since = 0.0
        self._steps = 0
        self._trouble: Exception | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the watch; a continued run goes on with the averages that it was in the middle of."""
        assert isinstance(pl_module, Method)
        self._sums = [pair.to(pl_module.device) for pair in self._sums]
        self._by_time = self._by_time.to(pl_module.device)
        if not trainer.is_global_zero:  # Process 0 has taken the sums of all out of the checkpoint.
            self._by_time.zero_()
        pl_module.stopwatch.read()
        pl_module.stopwatch.mark()
        self._since, self._steps = time.perf_counter(), 0

    def exclude(self, seconds: float) -> None:
        """Do not count what was no training: drawing, evaluating."""
        self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        """What was added up since the last event, over all processes, which all come."""
        shares = torch.stack(self._sums) if self._sums else torch.zeros(0, 2)
        world_size = dist.get_world_size() if many_processes() else 1
        return {"sums": summed(shares) / world_size, "by_time": summed(self._by_time)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on adding up."""
        self._sums = list(state_dict["sums"])
        self._by_time = state_dict["by_time"].clone()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; write when due."""
        assert isinstance(pl_module, Method)
        if pl_module.stepped:
            try:
                self._add_up(pl_module)
            except Exception as error:  # Not told before the next event is due: a step has no exchange for it.
                self._trouble = error
        self._steps += 1
        if not self.cadence.due(pl_module.clock):
            return
        with survived(trainer, "telemetry"):
            self._write(trainer, pl_module)
        self._sums.clear()
        self._by_time.zero_()
        self._since, self._steps = time.perf_counter(), 0

    def _add_up(self, method: Method) -> None:
        self._sums.append(torch.stack((method.last_loss, method.last_gradient_norm)))
        bins = (method.last_times * LOSS_BINS).ceil().long().clamp(1, LOSS_BINS) - 1
        losses = method.last_losses.to(self._by_time.dtype)
        self._by_time[0].index_add_(0, bins, losses)
        self._by_time[1].index_add_(0, bins, torch.ones_like(losses))

    def _write(self, trainer: pl.Trainer, pl_module: Method) -> None:
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble
        agree()
        run = run_logger_of(trainer)
        if self._sums:
            loss, norm = trainer.strategy.reduce(torch.stack(self._sums).mean(0), reduce_op="mean").tolist()
        else:
            loss = norm = float("nan")
        totals, counts = trainer.strategy.reduce(self._by_time, reduce_op="sum").tolist()
        if run is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            run.record(
                "train",
                {
                    "loss": loss,
                    "gradient_norm": norm,
                    "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                    "skipped_steps": pl_module.skipped_steps,
                    **({} if scaler is None else {"loss_scale": scaler.get_scale()}),
                    **self._speed(pl_module),
                    **{
                        f"loss@{(k + 0.5) / LOSS_BINS:.2f}": totals[k] / counts[k]
                        for k in range(LOSS_BINS)
                        if counts[k] > 0
                    },
                },
            )

    def _speed(self, method: Method) -> dict[str, float]:
        step = (time.perf_counter() - self._since) / self._steps
        images = method.clock.batch / step
        parts = {
            f"seconds/{name}": round(seconds / self._steps, 6) for name, seconds in method.stopwatch.read().items()
        }
        speed = {"images_per_second": round(images, 1), "seconds_per_step": round(step, 6), **parts}
        if method.flops is not None:
            speed["tflops"] = round(TRAINING * method.flops * images / 1e12, 4)
        speed["memory_gb"] = round(resident_memory() / 1e9, 3)
        if method.device.type == "cuda":
            speed["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(method.device) / 1e9, 3)
        return speed


def resident_memory() -> int:
    """The largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # The one counts bytes, others kilobytes.
