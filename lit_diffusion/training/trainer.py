"""Lightning's Trainer with the choices that this project makes once."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_diffusion.errors import UserError
from lit_diffusion.training import threads as computing
from lit_diffusion.training.lightning_internals import use_own_signals_and_loop
from lit_diffusion.training.precision import BackboneMixedPrecision, PrecisionName, autocast_dtype
from lit_diffusion.training.sharding import ShardedStrategy

_CLOCK = "does nothing here: the clock is images seen; set trainer.max_images"
_REPEATS = "would repeat the same images and noise; set trainer.max_images"  # Lightning begins the endless epoch again.

REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "gradient_clip_val": ((None,), "does nothing here; set model.init_args.gradient_clip"),
    "gradient_clip_algorithm": ((None,), "does nothing here; set model.init_args.gradient_clip"),
    "accumulate_grad_batches": ((1,), "does nothing here; set data.micro_batch_size"),
    "max_epochs": ((None, -1), _CLOCK),
    "min_epochs": ((None,), _CLOCK),
    "min_steps": ((None,), _CLOCK),
    "limit_train_batches": ((None, 1.0), _REPEATS),
    "overfit_batches": ((0.0, 0, None), _REPEATS),
    "check_val_every_n_epoch": ((1, None), "does nothing here: a run is one epoch; set trainer.val_check_interval"),
    "reload_dataloaders_every_n_epochs": ((0,), "does nothing here: a run is one epoch; leave it out"),
    "inference_mode": ((None, False), "stays false here: samplers and likelihoods take gradients; leave it out"),
    "use_distributed_sampler": ((None, False), "stays false here: the data share themselves out; leave it out"),
    "barebones": ((False,), "would leave out the run's events and checkpoints; leave it out"),
    "model_registry": ((None,), "does nothing here: checkpoints are files of the run; leave it out"),
}
"""Lightning's keys that this project's loop does not use: the values accepted, and the advice for any other."""


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """A Trainer's callbacks, in their order; Lightning sets them without declaring them."""
    return trainer.callbacks  # type: ignore[attr-defined]


class Trainer(pl.Trainer):
    """Lightning's Trainer, counted in images, with mixed precision around the backbone only.

    Args:
        max_images: train until this many images are seen; null: no such end (give ``max_steps`` or ``max_time``).
        precision: ``32-true``, ``bf16-mixed`` (the backbone in bfloat16, all else float32) or ``16-mixed``.
        compile: compile the backbone in place (the names in checkpoints stay as they are).
        cuda_graphs: while sampling, record the backbone's evaluation once and replay it (CUDA only); faster where the
            network is small for the GPU.
        threads: CPU threads of each process; null: found once from this machine's cores and written into config.yaml
            as a number. The bits of sums depend on it: a run that goes on keeps its own.
        channels_last: keep the backbone's images as ``[B, H, W, C]`` in memory; faster for most convolutions.
        **kwargs: Lightning's own arguments.

        Raises:
            UserError: for a Lightning key that this project's loop does not use, with the key that replaces it.
    """

    def __init__(
        self,
        *,
        max_images: int | None = None,
        precision: PrecisionName = "32-true",
        compile: bool = False,
        cuda_graphs: bool = False,
        channels_last: bool = False,
        threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        if threads is not None:
            computing.use(threads)
        self.autocast_dtype = autocast_dtype(precision)
        if max_images is not None and max_images < 1:
            raise UserError(f"trainer.max_images is {max_images}; give a positive number")
        self.max_images = max_images
        limits = (max_images, kwargs.get("max_time"), kwargs.get("fast_dev_run") or None)
        self.endless = all(limit is None for limit in limits) and kwargs.get("max_steps", -1) == -1
        """True where nothing would end a training; a method refuses to start one."""
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self.channels_last = channels_last
        for key, (accepted, advice) in REFUSED.items():
            value = kwargs.get(key, accepted[0])
            if not any(value == other and type(value) is type(other) for other in accepted):  # 1 is not 1.0
                raise UserError(f"trainer.{key} {advice} (it is {value})")
        interval = kwargs.get("val_check_interval")
        if interval not in (None, 1.0) and (not isinstance(interval, int) or interval < 1):
            raise UserError(
                f"trainer.val_check_interval is {interval}; a run is one endless epoch, which has no parts: give after "
                f"how many steps the held-out loss is measured, a positive whole number"
            )
        strategy = kwargs.get("strategy", "auto")
        if strategy == "fsdp":
            kwargs["strategy"] = ShardedStrategy()
        elif isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp")):
            raise UserError(
                "trainer.strategy: Lightning's FSDPStrategy is not supported; give fsdp, which shards the backbone's "
                "weights through ModelParallelStrategy"
            )
        elif isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
            raise UserError("trainer.strategy: give fsdp instead of a ModelParallelStrategy; it sets one up")
        if self.autocast_dtype is not None:
            device = "cuda" if self._wants_cuda(kwargs.get("accelerator", "auto")) else "cpu"
            plugins = kwargs.get("plugins") or []
            plugins = list(plugins) if isinstance(plugins, list) else [plugins]
            kwargs["plugins"] = [*plugins, BackboneMixedPrecision(precision, device)]  # type: ignore[arg-type]
        # One endless epoch over a stateless index: epochs are read off the images seen, not the other way round.
        kwargs["max_epochs"] = -1
        # Samplers and likelihoods take gradients inside evaluation; the loaders shard themselves.
        kwargs["inference_mode"] = False
        kwargs["use_distributed_sampler"] = False
        super().__init__(**kwargs)
        use_own_signals_and_loop(self)

    @staticmethod
    def _wants_cuda(accelerator: Any) -> bool:
        return accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available())
