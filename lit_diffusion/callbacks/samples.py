"""Pictures of samples during training, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_diffusion import samplers
from lit_diffusion.callbacks.ema import averages_of, choose_average
from lit_diffusion.callbacks.periodic import PeriodicCallback
from lit_diffusion.data.npz import label_arrays
from lit_diffusion.distributed import all_gather_objects
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation.sampling import DivergedError, Shard, generate_in_batches
from lit_diffusion.failures import Failure
from lit_diffusion.files import atomic_write
from lit_diffusion.images import image_grid, to_uint8
from lit_diffusion.methods.base import Method
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.logger import run_logger_of
from lit_diffusion.samplers.base import Progress, Strays
from lit_diffusion.training.datamodule import DataModule

FILM_ROWS = 16
"""Most rows of a film strip, evenly spaced over the noise levels."""


class _Film:
    """Recorder of a trajectory: the state at the end of each noise level."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.frames: list[tuple[float, Tensor]] = []

    def __call__(self, progress: Progress) -> None:
        frame = progress.x[: self.columns].detach().float().cpu()
        if self.frames and self.frames[-1][0] == progress.t:
            self.frames[-1] = (progress.t, frame)
        else:
            self.frames.append((progress.t, frame))

    def rows(self, end: Tensor, decode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """At most ``FILM_ROWS`` frames, the last of them the finished samples.

        Args:
            end: the finished samples.
            decode: maps the frames, which are in the space that is diffused, to data.
        """
        frames = [frame for _, frame in self.frames]
        keep = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FILM_ROWS - 1)).round().astype(int))
        return [*(decode(frames[k]).float().cpu() for k in keep), end[: self.columns].detach().float().cpu()]


def in_their_order(shares: Sequence[Tensor]) -> Tensor:
    """Interleave samples of all processes, of which process r made numbers r, r + world_size, ...: ``[N, ...]``."""
    x = torch.empty(sum(len(share) for share in shares), *shares[0].shape[1:], dtype=shares[0].dtype)
    for rank, share in enumerate(shares):
        x[rank :: len(shares)] = share
    return x


class Samples(PeriodicCallback):
    """Draw a grid of samples, and a film strip of their trajectories from noise, at intervals and at the end.

    In ``predict`` it gathers the samples of all processes, made with the same weights.

    Args:
        every_n_images: interval in images seen; null: not by images.
        every_n_steps: interval in steps; null: not by steps. With both, when either is due; always at the end.
        count: number of samples; 0: no pictures.
        weights: weights to sample with: ``ema`` (raw ones where no average is kept), ``ema:HALF_LIFE`` or ``raw``.
        seed: seed of the samples; the same noise every time, so that the pictures differ by the weights alone.
        film_columns: number of samples in the film strip, one row a noise level; 0: no film strip.

    Raises:
        UserError: for a negative ``count`` or ``film_columns``.
    """

    name = "samples"
    makes = frozenset({"samples", "film"})

    def __init__(
        self,
        every_n_images: int | None = None,
        every_n_steps: int | None = None,
        count: int = 64,
        weights: str = "ema",
        seed: int = 0,
        film_columns: int = 12,
    ) -> None:
        if count < 0 or film_columns < 0:
            raise UserError(f"samples.count {count} and samples.film_columns {film_columns} cannot be negative")
        super().__init__(Cadence.of("samples", every_n_images, every_n_steps))
        self.count = count
        self.weights = weights
        self.seed = seed
        self.film_columns = min(film_columns, count)
        self.last: Path | None = None
        self._applied = ExitStack()
        self._farthest: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse weights that are not kept, before the work instead of at the first picture."""
        choose_average(averages_of(trainer).half_lives, self._weights(trainer))

    def _weights(self, trainer: pl.Trainer) -> str:
        return averages_of(trainer).kept(self.weights)

    def wanted(self, trainer: pl.Trainer, method: Method) -> bool:
        """True where there is anything to draw."""
        return self.count > 0 and run_logger_of(trainer) is not None and method.require_data_spec().is_image

    def draw(self, trainer: pl.Trainer, method: Method) -> None:
        """Generate the samples, each process its share, and save their pictures."""
        run, data_spec = run_logger_of(trainer), method.require_data_spec()
        assert run is not None
        weights = self._weights(trainer)
        each = math.ceil(self.count / trainer.world_size)
        share = Shard.of(self.count, each, trainer.global_rank, trainer.world_size)
        film = _Film(len(share.indices[share.indices < self.film_columns]))
        try:
            with averages_of(trainer).applied(method, weights):
                made = generate_in_batches(
                    method,
                    share,
                    self.seed,
                    each,
                    show_progress=False,
                    on_step=film if self.film_columns else None,
                    say=print_note,
                )
                (drawn,) = made  # One batch on each process.
                rows = film.rows(drawn.x, partial(self._decoded, method, share.indices[: film.columns]))
        except DivergedError as error:
            print_note(f"samples: the sampler diverged at {method.clock.images} images (NaN); no picture this time")
            run.fail(self.name, [Failure.of(error)], said=True)
            return
        shares = all_gather_objects((drawn.x, rows))
        if not trainer.is_global_zero:
            return
        caption = f"{method.clock.images} images seen, step {method.clock.steps}, weights {weights}, seed {self.seed}"
        values: dict[str, Any] = {
            "weights": weights,
            "seed": self.seed,
            "network_evaluations": drawn.evaluations,
        }
        if drawn.strays.count:
            values["strays"] = asdict(drawn.strays)
        x = in_their_order([x for x, _ in shares])
        self.last = run.picture("samples", image_grid(to_uint8(x, data_spec)), caption, values)
        if self.film_columns:
            # A solver that chooses its steps may give each process another number of frames: the last ones align.
            height = min(len(rows) for _, rows in shares)
            strip = torch.cat([in_their_order([rows[k - height] for _, rows in shares]) for k in range(height)])
            run.picture("film", image_grid(to_uint8(strip, data_spec), self.film_columns), caption, values)

    @torch.no_grad()
    def _decoded(self, method: Method, indices: Tensor, z: Tensor) -> Tensor:
        """Decode states of samples ``indices`` to data, as the finished samples are decoded."""
        noise = SampleNoise(self.seed, indices.to(method.device), method.sample_shape).stream("decode")
        return method.decode(z.to(method.device), noise, method.condition(indices))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the model the weights to sample with."""
        assert isinstance(pl_module, Method)
        self._applied.enter_context(averages_of(trainer).applied(pl_module, self._weights(trainer)))
        self._farthest, self._numbers = [], []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the numbers of the batch's samples, and how far they went astray."""
        assert isinstance(pl_module, Method)
        self._farthest.append(outputs.farthest.cpu())
        self._numbers.append(batch.cpu())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the model its own weights back."""
        self._applied.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back."""
        self._applied.close()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the samples of all processes, in their order, into ``samples/predict.npz``."""
        assert isinstance(pl_module, Method)
        data_spec, run = pl_module.require_data_spec(), run_logger_of(trainer)
        made = [made.x.cpu() for made in trainer.predict_loop.predictions if isinstance(made, samplers.Samples)]
        mine = torch.cat(made) if made else torch.empty(0, *data_spec.shape)
        farthest = torch.cat([torch.zeros(0), *self._farthest])
        numbers = torch.cat([torch.zeros(0, dtype=torch.int64), *self._numbers])
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, DataModule):  # Without the padding rows.
            count = len(range(trainer.global_rank, data.predict_samples, trainer.world_size))
            mine, farthest, numbers = mine[:count], farthest[:count], numbers[:count]
        shares = all_gather_objects((mine, Strays.among(farthest), numbers))
        if run is None or not trainer.is_global_zero:
            return
        x = in_their_order([x for x, _, _ in shares])
        if (strays := sum((share for _, share, _ in shares), Strays())).count:
            print_note(str(strays))
        if not torch.isfinite(x).all():
            raise UserError("the sampler diverged (NaN or infinity): choose smaller steps or other weights")
        array = x.numpy() if data_spec.value_range is None else to_uint8(x, data_spec)
        path = run.run_dir / "samples" / "predict.npz"
        numbers = in_their_order([share for _, _, share in shares])
        cond = pl_module.condition_by_counts(numbers, pl_module.seed, data_spec.class_counts)
        labels = None if cond is None else cond.label
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, arr_0=array, **label_arrays(labels, data_spec.class_names))
        weights = self._weights(trainer)
        run.record("predict", {"file": f"samples/{path.name}", "weights": weights, "seed": pl_module.seed})
        print_note(f"wrote {len(array)} samples to {path}, weights {weights}")
