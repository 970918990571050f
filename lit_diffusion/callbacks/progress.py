"""The progress bar of a training, and its telemetry in metrics.jsonl."""

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
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.backbones.flops import TRAINING
from lit_diffusion.distributed import many_processes, sum_over_ranks
from lit_diffusion.failures import agree
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.logger import run_logger_of, survived
from lit_diffusion.training.callback import Callback
from lit_diffusion.training.module import TrainedModule


class ProgressBar(TQDMProgressBar):
    """Progress bar of the whole training, in images, with the loss and images/s."""

    def __init__(self) -> None:
        super().__init__()
        self._images: tqdm[Any] | None = None
        self._smooth = 0.0
        self._weight = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, TrainedModule)
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
        """Do nothing: there is one endless epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: there is one endless epoch."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; the loss shown is an average over about the last fifty steps."""
        assert isinstance(pl_module, TrainedModule)
        assert self._images is not None
        with suppress(OSError, ValueError):  # A terminal that is gone, a full disk that the output goes to.
            self._show(pl_module)

    def _show(self, pl_module: TrainedModule) -> None:
        assert self._images is not None
        if pl_module.last_step.made and not self.is_disabled:
            self._smooth = 0.98 * self._smooth + 0.02 * float(pl_module.last_step.loss)
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
"""Number of equal parts of [0, 1] with a loss each: ``loss@0.05`` is the mean loss at times t below 0.1."""


class Telemetry(Callback):
    """Write a training's losses, speed and memory to metrics.jsonl and the dashboard.

    An event ``train`` has the loss, its named terms, the gradient's norm and the loss by time, averages over the steps
    since the last event that were not skipped (of several networks each has its own, ``<network>/loss``, beside the
    sum); ``images_per_second`` of all processes; ``seconds_per_step`` and its parts on process 0
    (``seconds/data``, ..., see :data:`~lit_diffusion.training.stopwatch.PARTS`); ``tflops``, the backbone's
    floating-point operations a second on all processes, in 10^12; and the largest memory of process 0 so far, in GB.

    Args:
        every_n_images: interval in images seen; null: not by images.
        every_n_steps: interval in steps; null: not by steps. With both, when either is due.

    Raises:
        UserError: for an interval that is not positive.
    """

    writes_to_run = True

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return type(self).__name__

    def __init__(self, every_n_images: int | None = None, every_n_steps: int | None = 50) -> None:
        self.cadence = Cadence.of("telemetry", every_n_images, every_n_steps)
        self._values: dict[str, list[Tensor]] = {}
        """Values of every step since the last event, by name."""
        self._by_time: dict[str, Tensor] = {}
        """Sums and counts of each network's losses in each part of the time, ``[2, LOSS_BINS]``."""
        self._since = 0.0
        self._steps = 0
        self._trouble: Exception | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; a continued run goes on with the averages that it was in the middle of."""
        assert isinstance(pl_module, TrainedModule)
        self._values = {name: [v.to(pl_module.device) for v in values] for name, values in self._values.items()}
        # Process 0 has the sums of all processes from the checkpoint.
        mine = 1.0 if trainer.is_global_zero else 0.0
        self._by_time = {name: mine * sums.to(pl_module.device) for name, sums in self._by_time.items()}
        pl_module.stopwatch.read()
        pl_module.stopwatch.mark()
        self._since, self._steps = time.perf_counter(), 0

    def exclude(self, seconds: float) -> None:
        """Leave ``seconds`` spent on drawing or evaluating out of the training time."""
        self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last event, over all processes; a collective call."""
        world_size = dist.get_world_size() if many_processes() else 1
        return {
            "values": {name: sum_over_ranks(torch.stack(values)) / world_size for name, values in self._values.items()},
            "by_time": {name: sum_over_ranks(sums) for name, sums in self._by_time.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sums since the last event."""
        self._values = {name: list(values) for name, values in state_dict["values"].items()}
        self._by_time = {name: sums.clone() for name, sums in state_dict["by_time"].items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step to the sums, and write an event when due."""
        assert isinstance(pl_module, TrainedModule)
        if pl_module.last_step.made:
            try:
                self._add_up(pl_module)
            except Exception as error:  # Raised when the next event is due: a step has no exchange for it.
                self._trouble = error
        self._steps += 1
        if not self.cadence.due(pl_module.clock):
            return
        with survived(trainer, "telemetry"):
            self._write(trainer, pl_module)
        self._values.clear()
        self._by_time.clear()
        self._since, self._steps = time.perf_counter(), 0

    def _add_up(self, module: TrainedModule) -> None:
        step = module.last_step
        values = {"loss": step.loss, "gradient_norm": step.gradient_norm}
        for name, loss in step.losses.items():
            prefix = step.prefix(name)
            terms = {"loss": loss.per_sample, **loss.terms} if prefix else loss.terms
            values |= {f"{prefix}{term}": value.mean() for term, value in terms.items()}
            if loss.t is not None:
                bins = (loss.t * LOSS_BINS).ceil().long().clamp(1, LOSS_BINS) - 1
                new = torch.zeros(2, LOSS_BINS, dtype=torch.float64, device=bins.device)
                sums = self._by_time.setdefault(prefix, new)
                shown = loss.shown.to(sums.dtype)
                sums[0].index_add_(0, bins, shown)
                sums[1].index_add_(0, bins, torch.ones_like(shown))
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def _write(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble
        agree()
        run = run_logger_of(trainer)
        values = {"loss": float("nan"), "gradient_norm": float("nan")}  # For an event of skipped steps alone.
        for name, each in self._values.items():
            values[name] = float(trainer.strategy.reduce(torch.stack(each).mean(), reduce_op="mean"))
        by_time = {}
        for prefix, sums in self._by_time.items():
            totals, counts = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            for k in range(LOSS_BINS):
                if counts[k] > 0:
                    by_time[f"{prefix}loss@{(k + 0.5) / LOSS_BINS:.2f}"] = totals[k] / counts[k]
        if run is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            rates = {
                f"{module.last_step.prefix(name)}learning_rate": optimizer.param_groups[0]["lr"]
                for name, optimizer in zip(module.trained(), trainer.optimizers, strict=True)
            }
            run.record(
                "train",
                {
                    **values,
                    **rates,
                    "skipped_steps": module.skipped_steps,
                    **({} if scaler is None else {"loss_scale": scaler.get_scale()}),
                    **self._speed(module),
                    **by_time,
                },
            )

    def _speed(self, module: TrainedModule) -> dict[str, float]:
        step = (time.perf_counter() - self._since) / self._steps
        images = module.clock.batch / step
        parts = {
            f"seconds/{name}": round(seconds / self._steps, 6) for name, seconds in module.stopwatch.read().items()
        }
        speed = {"images_per_second": round(images, 1), "seconds_per_step": round(step, 6), **parts}
        if module.flops is not None:
            speed["tflops"] = round(TRAINING * module.flops * images / 1e12, 4)
        speed["memory_gb"] = round(resident_memory() / 1e9, 3)
        if module.device.type == "cuda":
            speed["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(module.device) / 1e9, 3)
        return speed


def resident_memory() -> int:
    """The largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others kilobytes.
