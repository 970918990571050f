"""The training loop for any number of networks with an optimizer each; it knows nothing of diffusion."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lit_diffusion import interrupts
from lit_diffusion.backbones.base import Backbone
from lit_diffusion.backbones.flops import forward_flops
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.distributed import all_gather_objects
from lit_diffusion.errors import UserError
from lit_diffusion.objectives.base import Loss
from lit_diffusion.randomness import stream_key
from lit_diffusion.runs.clock import Clock, in_images
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.formats import CHECKPOINT_KEY, FORMAT_VERSION, require_known_format
from lit_diffusion.runs.logger import run_logger_of, survived
from lit_diffusion.training.callback import own_callbacks
from lit_diffusion.training.datamodule import PADDING_INDEX, Batch, DataModule
from lit_diffusion.training.gradients import average_over_processes, clip
from lit_diffusion.training.lightning_internals import count_step, validate_now, validation_follows
from lit_diffusion.training.own_loaders import batch_of, indices_to_predict, require_fitting_trainer
from lit_diffusion.training.sharding import ShardedStrategy, no_gradient_sync, shard
from lit_diffusion.training.stopwatch import Stopwatch
from lit_diffusion.training.trainer import Trainer

# Both override it by design: the DataModule prepares its own batches, the module those of other loaders.
warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule` but")

NON_FINITE_IN_A_ROW = 3
"""A run is given up after this many consecutive steps whose loss or gradient is not finite."""

T = TypeVar("T")


def of_name(given: T | Mapping[str, T], name: str) -> T | None:
    """The value for a network's name, given one value for all or one by name; None for a name that is missing."""
    return given.get(name) if isinstance(given, Mapping) else given


@dataclass(frozen=True)
class Step:
    """The result of a training step on this process.

    Attributes:
        loss: mean over this process's images, ``[]``; the sum of all networks' losses.
        gradient_norm: norm of all networks' gradients together, before clipping, ``[]``.
        losses: each network's loss, of all this process's images.
        made: true where the weights changed, false where a loss or a gradient was not finite on any process.
        overflowed: true where a gradient left float16's range and the scaler lowered its scale.
    """

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradient_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    losses: Mapping[str, Loss] = field(default_factory=dict)
    made: bool = False
    overflowed: bool = False

    def prefix(self, name: str) -> str:
        """Prefix of a network's values in logs: its name and a slash, empty where there is one network."""
        return f"{name}/" if len(self.losses) > 1 else ""


class TrainedModule(pl.LightningModule):
    r"""Any number of networks that are trained together, with an optimizer each.

    A step minimizes, for every name k of :meth:`trained`, the mean loss over the global batch in the parameters of that
    network alone,

    .. math::  \theta_k \leftarrow \mathrm{optimizer}_k\Big(\theta_k,\;
               \nabla_{\theta_k} \frac{1}{B} \sum_{i=1}^B L_k^{(i)}(\theta)\Big),

    all at the weights before the step. Where one loss or gradient is not finite on any process, no network steps.

    A subclass defines what is trained (:meth:`trained`) and the losses of a batch (:meth:`losses`, or :meth:`loss` with
    one network).

    Args:
        optimizer: optimizer class and arguments, for every network that ``optimizers`` does not name.
        optimizers: optimizer class and arguments of single networks, by name.
        warmup_images: images over which the learning rate rises linearly (or give warmup_steps); one value for all
            networks, or one by name.
        warmup_steps: steps over which the learning rate rises linearly (or give warmup_images); one value for all
            networks, or one by name.
        gradient_clip: largest norm of a network's gradient, null for none; one value for all networks, or one by name.

    Raises:
        UserError: for a negative warm-up, one given both in images and in steps, or a norm that is not positive.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        optimizers: dict[str, OptimizerCallable] | None = None,
        warmup_images: int | dict[str, int] | None = None,
        warmup_steps: int | dict[str, int] | None = None,
        gradient_clip: float | dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_optimizer = optimizer
        self.make_optimizers = optimizers or {}
        self.warmup = (warmup_images, warmup_steps)
        self.gradient_clip = gradient_clip
        for name in _names(warmup_images, warmup_steps, gradient_clip) or [""]:
            self.warmup_of(name, batch=1)  # Refuses a wrong value at once.
            clip_at = of_name(gradient_clip, name)
            if clip_at is not None and not clip_at > 0.0:
                raise UserError(f"gradient_clip is {clip_at:g}; give a positive norm, or null for none")
        self.clock = Clock()
        self.seed = 0
        self._data_spec: DataSpec | None = None
        self.run_config: dict[str, Any] | None = None
        """The whole resolved configuration; the command line sets it, checkpoints carry it."""
        self.last_step = Step()
        self.stopwatch = Stopwatch()
        self.flops: int | None = None
        """Floating-point operations of one evaluation of the backbones for one datum; measured in :meth:`setup`."""
        self.interrupted = False
        """True once one of the run's processes was asked to stop; all processes learn of it at the same step."""
        self.sharded = False
        """True where each process holds a part of the weights only, so that all evaluate the backbone or none does."""
        self.skipped_steps = 0
        self._non_finite_in_a_row = 0
        self._validation_began = 0.0
        self._validation_due = False
        """True while the held-out loss after the last step is still to be measured; saved in every checkpoint."""
        self._configured: list[list[dict[str, Any]]] = []
        """Options of each optimizer's parameter groups, as configured."""
        self._held_out: dict[str, list[Tensor]] = {}
        self._held_out_trouble: Exception | None = None
        self._full_batch = 0
        """Largest batch of the user's own DataLoader; warm-up in steps goes by it."""
        self._numbered = 0
        """Held-out images of the user's own DataLoader that are numbered so far."""
        self._looked_at: set[tuple[str, int]] = set()

    # ---- what a subclass defines -------------------------------------------------------------------------------

    @abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name, each with an optimizer of its own; always in the same order."""

    def loss(self, batch: Batch, seed: int) -> Loss:
        """The loss of a batch, for a module of one network; randomness is keyed by ``seed`` and ``batch.index``."""
        raise NotImplementedError(f"{type(self).__name__} defines neither loss nor losses")

    def losses(self, batch: Batch, seed: int) -> dict[str, Loss]:
        """The loss that each network minimizes, by the names in :meth:`trained`; a network may be left out of a step.

        The gradient of a loss reaches the network of its name alone. Losses may share what they are computed from.
        """
        (name,) = self.trained()
        return {name: self.loss(batch, seed)}

    def before_step(self, batch: Batch, seed: int) -> Batch:
        """This process's share of a batch with what depends on the whole global batch, such as pairs of data and noise.

        Called once a step of training on every process, before the share is split into parts; by default the share.
        """
        return batch

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        """Update what a step changes besides weights: target networks, replay buffers, laws of t that learn.

        Not called for a skipped step. Keep what changes in buffers, so that a continued run has it.

        Args:
            kept: ``Loss.kept`` of the whole global batch in its order: the same on every process.
        """

    def averaged(self) -> dict[str, nn.Parameter]:
        """Parameters, by full name, that EMA averages and that are checked before they are saved."""
        held = {id(p) for network in self.trained().values() for p in network.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) in held}

    def networks(self) -> list[Backbone]:
        """The backbones inside: what autocast, compilation, CUDA graphs, memory format and sharding apply to."""
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def noise_level(self, t: float) -> tuple[str, dict[str, float]]:
        """The noise level at a time t: a text for messages, and values for an event."""
        return f"t {t:.4g}", {"t": t}

    # ---- the data ----------------------------------------------------------------------------------------------

    @property
    def data_spec(self) -> DataSpec | None:
        """Shape, value range and classes of the data; None until set."""
        return self._data_spec

    @data_spec.setter
    def data_spec(self, data_spec: DataSpec | None) -> None:
        self._data_spec = data_spec
        self.on_data_spec()

    def on_data_spec(self) -> None:
        """React to a change of :attr:`data_spec`."""

    def require_data_spec(self) -> DataSpec:
        """The data spec.

        Raises:
            UserError: if it is not set.
        """
        if self.data_spec is None:
            raise UserError("this model does not know its data: set method.data_spec = datamodule.data_spec")
        return self.data_spec

    @property
    def num_conditional_classes(self) -> int | None:
        """Number of classes that the networks are conditioned on and batches must label; None: labels are ignored."""
        return None if self.data_spec is None else self.data_spec.num_classes

    def _take_data_spec(self, stage: str) -> None:
        """Set the data spec from lit_diffusion's DataModule, or require that it was set by hand."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, DataModule):
            self.data_spec = datamodule.data_spec
            self.clock.batch = datamodule.global_batch_size
            return
        self.require_data_spec()
        if stage == "fit" and self.trainer.world_size > 1 and isinstance(self.trainer, Trainer):
            raise UserError(
                f"your DataLoader is not split over {self.trainer.world_size} processes by this Trainer: use "
                f"lit_diffusion's DataModule, or Lightning's own Trainer, which splits it"
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert the batch of the user's own DataLoader; lit_diffusion's DataModule prepares its own.

        Raises:
            UserError: if it cannot be converted, see :mod:`lit_diffusion.training.own_loaders`.
        """
        trainer = self.trainer
        if isinstance(batch, Batch) or isinstance(getattr(trainer, "datamodule", None), DataModule):
            return batch
        if trainer.predicting:
            return indices_to_predict(batch)
        place = (str(trainer.state.stage), dataloader_idx)
        taken = batch_of(batch, self.require_data_spec(), self.num_conditional_classes, place not in self._looked_at)
        self._looked_at.add(place)
        rank, processes = trainer.global_rank, trainer.world_size
        if trainer.training:
            self.clock.batch = processes * len(taken)  # The last of an epoch may be smaller.
            self._full_batch = max(self._full_batch, self.clock.batch)
            return Batch(taken.x, taken.index + self.clock.images + rank * len(taken), taken.cond)
        first, self._numbered = self._numbered, self._numbered + len(taken)
        return Batch(taken.x, (taken.index + first) * processes + rank, taken.cond)

    # ---- set-up ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the data spec, run the networks as the Trainer says, and refuse what would go wrong later."""
        self._take_data_spec(stage)
        require_fitting_trainer(self.trainer)
        if (run := run_logger_of(self.trainer)) is not None:
            run.clock = self.clock
        self._looked_at.clear()
        self.interrupted = False
        if stage == "fit":
            if getattr(self.trainer, "endless", False):
                raise UserError("a run needs an end: give trainer.max_images, trainer.max_steps or trainer.max_time")
            self.require_held_parameters()
        self.sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if self.sharded:
            self._require_shardable()
        if stage == "fit" and self.flops is None:
            self.flops = sum(map(forward_flops, self.networks())) or None
        self._run_networks_as_the_trainer_says()

    def require_held_parameters(self) -> None:
        """Refuse a parameter that requires a gradient and is held by no optimizer, or by two.

        Raises:
            UserError: naming the parameter; also for options of a network that is not trained.
        """
        holders: dict[int, str] = {}
        trained, what = self.trained(), type(self).__name__
        for name, network in trained.items():
            for p in network.parameters():
                if holders.setdefault(id(p), name) != name:
                    raise UserError(f"{what}: a parameter belongs to {holders[id(p)]} and to {name}; train it with one")
        for full_name, p in self.named_parameters():
            if p.requires_grad and id(p) not in holders:
                raise UserError(
                    f"{what}: the parameter {full_name} requires a gradient, and no optimizer holds it: name its "
                    f"network in trained(), or freeze it, requires_grad_(False)"
                )
        for name in _names(self.make_optimizers, *self.warmup, self.gradient_clip):
            if name not in trained:
                raise UserError(f"{what} trains no {name!r}; give options for {', '.join(trained)}")

    def _run_networks_as_the_trainer_says(self) -> None:
        trainer, datamodule = self.trainer, getattr(self.trainer, "datamodule", None)
        channels_last = getattr(trainer, "channels_last", False)
        if channels_last and self.sharded:
            print_note("trainer.channels_last is off: fsdp keeps weights in PyTorch's own order")
        if getattr(trainer, "cuda_graphs", False) and trainer.strategy.root_device.type != "cuda":
            raise UserError("trainer.cuda_graphs needs a CUDA device; leave it out")
        for network in self.networks():
            network.run_as(
                getattr(trainer, "autocast_dtype", None),
                compiled=getattr(trainer, "compile", False),
                rows=datamodule.rows_at_once if isinstance(datamodule, DataModule) else None,
                cuda_graphs=getattr(trainer, "cuda_graphs", False),
                channels_last=channels_last and not self.sharded,
            )

    def _require_shardable(self) -> None:
        names, networks, what = list(self.trained()), self.networks(), type(self).__name__
        if len(names) != 1 or len(networks) != 1:
            raise UserError(
                f"trainer.strategy fsdp shards one backbone with one loss, and {what} trains {', '.join(names)} "
                f"with {len(networks)} backbones: use ddp"
            )
        if getattr(self.trainer, "compile", False):
            raise UserError("trainer.strategy fsdp does not go with trainer.compile; choose one, or ddp with compile")
        if getattr(self.trainer, "cuda_graphs", False):
            raise UserError("trainer.strategy fsdp does not go with trainer.cuda_graphs; choose one, or ddp with them")
        if self._scaler is not None:
            raise UserError("trainer.strategy fsdp does not go with precision 16-mixed; use bf16-mixed, or ddp")

    def configure_model(self) -> None:
        """Shard the backbone's weights, where the strategy asks for it."""
        if self.sharded and not isinstance(backbone := self.networks()[0], FSDPModule):
            mesh = self.device_mesh
            assert mesh is not None
            shard(backbone, mesh["data_parallel"])

    def optimizer_of(self, name: str) -> OptimizerCallable:
        """The function that makes a network's optimizer from its parameters."""
        return self.make_optimizers.get(name, self.make_optimizer)

    def configure_optimizers(self) -> list[Optimizer]:
        """Make one optimizer for each network, with the learning rate that follows warm-up."""
        optimizers = []
        for name, network in self.trained().items():
            optimizers.append(self.optimizer_of(name)(network.parameters()))
            for group in optimizers[-1].param_groups:
                group.setdefault("initial_lr", group["lr"])
        self._configured = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        return optimizers

    def on_fit_start(self) -> None:
        """Print which callbacks will write nothing, for want of a RunLogger."""
        if run_logger_of(self.trainer) is None and not getattr(self.trainer, "fast_dev_run", False):
            writers = [type(each).__name__ for each in own_callbacks(self.trainer) if each.writes_to_run]
            if writers:
                print_note(
                    f"{', '.join(writers)}: nothing is drawn or written, since the Trainer has no RunLogger: give it "
                    f"Trainer(logger=lit_diffusion.runs.logger.RunLogger('name'))"
                )

    def on_train_start(self) -> None:
        """Set the optimizers' options to the configured ones, whatever a checkpoint's optimizer state says.

        A run continued after its end makes no further step; a held-out loss that a kill cut short is measured.
        """
        for optimizer, configured in zip(self.trainer.optimizers, self._configured, strict=True):
            for group, options in zip(optimizer.param_groups, configured, strict=True):
                group.update(options)
        if self.clock.images > 0:  # As the last step left them, for the checkpoint of a run that makes no further step.
            self._set_learning_rates(self.clock.images)
        self._stop_when_done()
        if self._validation_due:
            validate_now(self.trainer)

    # ---- the training step -------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the time until here as waiting for data."""
        self.stopwatch.lap("data")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the time since the step as logging."""
        self.stopwatch.lap("logging")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make one step of all optimizers, or of none, on this process's share of the global batch."""
        # Dropout draws from the global generator: tie it to the image count, so that resuming needs no state.
        torch.manual_seed(stream_key(self.seed, f"dropout/{self.global_rank}/{self.clock.images}") >> 1)
        networks, optimizers, scaler = self.trained(), self.trainer.optimizers, self._scaler
        seen: dict[str, list[Loss]] = {}
        total = torch.zeros((), device=self.device)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        with self.stopwatch.part("forward_backward", self.device):
            batch = self.before_step(batch, self.seed)
            parts = batch.split(getattr(getattr(self.trainer, "datamodule", None), "micro_batch_size", None))
            for part in parts:
                with self._local_gradients(last=part is parts[-1]):
                    losses = self.losses(part, self.seed)
                    for name, loss in losses.items():
                        mean = loss.per_sample.sum() / len(batch)
                        self._backward(mean, networks[name], keep_graph=name != list(losses)[-1])
                        total += mean.detach()
                for name, loss in losses.items():
                    seen.setdefault(name, []).append(Loss.joined([loss]))
                del losses, loss, mean  # Frees their graphs before the next part makes its own.
            if self._averages_gradients:
                average_over_processes([p for network in networks.values() for p in network.parameters()])

        with self.stopwatch.part("optimizer", self.device):
            if scaler is not None:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            norms = [clip(list(n.parameters()), of_name(self.gradient_clip, name)) for name, n in networks.items()]
            norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
            made, overflowed = self._may_step(total, norm)
            self._set_learning_rates(self.clock.images + self.clock.batch)
            if made:
                for optimizer in optimizers:
                    optimizer.step()
            if scaler is not None:
                scaler.update()
        self.clock.tick()
        count_step(self.trainer)

        together = {name: Loss.joined(each) for name, each in seen.items()}
        self.last_step = Step(total, norm, together, made, overflowed)
        if made:
            self._non_finite_in_a_row = 0
            with self.stopwatch.part("ema", self.device):
                for callback in own_callbacks(self.trainer):
                    callback.after_step(self)
            self.after_step(self._kept_by_all(together.values()))
        else:
            self._report_skipped_step(batch.index)
        if not isinstance(self.trainer, Trainer):  # Then loggers and progress bar are Lightning's.
            self.log("train/loss", total, prog_bar=True)
        self._stop_when_done()
        self._validation_due = validation_follows(self.trainer)
        self.stopwatch.mark()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def _averages_gradients(self) -> bool:
        """True where the step averages gradients itself: DDP expects one backward pass through all parameters."""
        return self.sharded or len(self.trained()) > 1

    def _local_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Context that accumulates gradients without averaging them, where the strategy would average in backward."""
        if self.sharded:
            return nullcontext() if last else no_gradient_sync(self.networks()[0])
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None or (last and not self._averages_gradients) else block()

    def _backward(self, loss: Tensor, network: nn.Module, keep_graph: bool) -> None:
        """Add the gradient of a loss to one network's parameters, and to nothing else."""
        if len(self.trained()) == 1:
            self.manual_backward(loss)
        else:
            held = [p for p in network.parameters() if p.requires_grad]
            self.manual_backward(loss, inputs=held, retain_graph=keep_graph)

    def _may_step(self, loss: Tensor, norm: Tensor) -> tuple[bool, bool]:
        """Two flags: all losses and gradients of all processes are finite; if not, float16 overflowed."""
        # What all processes must agree on, in one exchange: is every loss finite, was anyone asked to stop? Gradients
        # are averaged over the processes, so a NaN anywhere is a NaN everywhere; losses and signals are not.
        mine = torch.stack((1.0 - loss.isfinite().float(), loss.new_tensor(float(interrupts.asked() is not None))))
        broken, asked = self.trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        self.interrupted = self.interrupted or asked > 0.0
        loss_is_finite, gradient_is_finite = broken == 0.0, bool(torch.isfinite(norm))
        # The scaler handles an overflow of float16 gradients by lowering its scale; a gradient that is not finite at a
        # scale below 1 did not overflow.
        in_range = self._scaler is None or self._scaler.get_scale() < 1.0
        return loss_is_finite and gradient_is_finite, loss_is_finite and not gradient_is_finite and not in_range

    def _kept_by_all(self, losses: Iterable[Loss]) -> dict[str, Tensor]:
        """``Loss.kept`` of all processes; each holds consecutive rows of the batch, so the gathered are in order."""
        kept: dict[str, Tensor] = {}
        for loss in losses:
            for name, rows in loss.kept.items():
                if name in kept:
                    raise ValueError(f"two losses keep a {name!r}; give each its own name")
                everywhere = self.all_gather(rows)
                assert isinstance(everywhere, Tensor)
                kept[name] = everywhere.flatten(0, 1) if everywhere.dim() > rows.dim() else everywhere
        return kept

    def _report_skipped_step(self, index: Tensor) -> None:
        """Print and record which image, of all processes, spoilt the step, and at which noise level.

        Args:
            index: the images' numbers ``[B]``.

        Raises:
            UserError: after three such steps in a row.
        """
        mine = []
        for loss in self.last_step.losses.values():
            broken = loss.per_sample.isfinite().logical_not()
            # The first whose loss is not finite; where all are, and the gradient is not, the largest.
            worst = int(torch.where(broken, float("inf"), loss.per_sample).argmax())
            t = None if loss.t is None else float(loss.t[worst])
            mine.append((bool(broken.any()), float(loss.per_sample[worst]), t, int(index[worst])))
        shares = [share for share in all_gather_objects(mine) for share in share]
        found = [share for share in shares if share[0]]
        is_loss, value, t, number = found[0] if found else max(shares, key=lambda share: share[1])
        level_text, level_values = ("", {}) if t is None else self.noise_level(t)
        where = level_text and f" at {level_text}"
        what = f"the gradient is not finite; the largest loss is {value:.4g}, of image {number}{where}"
        if is_loss:
            what = f"the loss of image {number} is {value:g}{where}"
        overflowed = self.last_step.overflowed
        if overflowed and self._scaler is not None:
            what = f"float16 gradients overflowed, the loss scale is {self._scaler.get_scale():g} now; {what}"
        self.skipped_steps += not overflowed
        self._non_finite_in_a_row = 0 if overflowed else self._non_finite_in_a_row + 1
        if (run := run_logger_of(self.trainer)) is not None:
            run.record("skipped", {"reason": what, **level_values, "overflow": overflowed})
        if self._non_finite_in_a_row >= NON_FINITE_IN_A_ROW:
            raise UserError(
                f"training diverged at step {self.clock.steps} ({self.clock.images} images), {NON_FINITE_IN_A_ROW} "
                f"times in a row: {what}; the last checkpoint is from before: lower the learning rate or set "
                f"model.init_args.gradient_clip, and continue from it"
            )
        print_note(f"step {self.clock.steps} changed nothing: {what}")

    def _stop_when_done(self) -> None:
        limit = getattr(self.trainer, "max_images", None)
        if limit is not None and self.clock.images >= limit:
            self.trainer.should_stop = True

    def warmup_of(self, name: str, batch: int) -> int:
        """A network's warm-up in images, for a global batch of ``batch`` images."""
        images, steps = (of_name(each, name) for each in self.warmup)
        return in_images("model", "warmup", images, steps, batch)

    def _set_learning_rates(self, images: int) -> None:
        """Set the learning rates of the step after which ``images`` images are seen."""
        batch = max(self._full_batch, self.clock.batch)
        for name, optimizer in zip(self.trained(), self.trainer.optimizers, strict=True):
            warmup = self.warmup_of(name, batch)
            factor = 1.0 if warmup == 0 else min(1.0, images / warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    # ---- held-out loss -----------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Note the time: validation is no part of a step."""
        self._validation_began = time.perf_counter()
        self._numbered = 0

    def on_test_start(self) -> None:
        """Restart the numbering of the user's own DataLoader's images."""
        self._numbered = 0

    def on_validation_end(self) -> None:
        """Leave validation out of the training time."""
        self._validation_due = False
        seconds = time.perf_counter() - self._validation_began
        self.stopwatch.exclude(seconds)
        for callback in own_callbacks(self.trainer):
            callback.exclude(seconds)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the losses of held-out images, each with its own fixed noise: equal on any number of processes."""
        try:
            losses = self.losses(batch, stream_key(self.seed, "held-out"))
            step, counted = Step(losses=losses), batch.index != PADDING_INDEX
            values = {"loss": torch.stack([loss.per_sample.double() for loss in losses.values()]).sum(0)}
            for name, loss in losses.items():
                terms = loss.terms if len(losses) == 1 else {"loss": loss.per_sample, **loss.terms}
                values |= {f"{step.prefix(name)}{term}": value.double() for term, value in terms.items()}
            for name, value in values.items():
                rows = value[counted]
                sums = torch.stack((rows.sum(), rows.new_tensor(float(len(rows)))))
                self._held_out.setdefault(name, []).append(sums)
        except Exception as error:
            if not self._while_training or self.sharded:
                raise
            self._held_out_trouble = error

    def test_step(self, batch: Batch | Tensor, batch_idx: int) -> None:
        """Measure as in validation; a tensor stands for no held-out images."""
        if isinstance(batch, Batch):
            self.validation_step(batch, batch_idx)

    @property
    def _while_training(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def on_validation_epoch_end(self) -> None:
        """Average over all images of all processes, however many each had; a failure does not end a training."""
        with survived(self.trainer, "val/loss") if self._while_training else nullcontext():
            self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Average as in validation."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        mine = {name: torch.stack(sums).sum(0).tolist() for name, sums in self._held_out.items()}
        self._held_out.clear()
        if self._held_out_trouble is not None:
            trouble, self._held_out_trouble = self._held_out_trouble, None
            raise trouble
        shares = all_gather_objects(mine)
        for name in dict.fromkeys(name for share in shares for name in share):
            total, count = (sum(share[name][k] for share in shares if name in share) for k in (0, 1))
            if count:
                # Logged on every process: callbacks look for it there.
                self.log(f"{stage}/{name}", total / count, sync_dist=True)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the clock, the configuration and the data spec to a checkpoint, as plain types."""
        run = run_logger_of(self.trainer)
        checkpoint[CHECKPOINT_KEY] = {
            "format_version": FORMAT_VERSION,
            "run_id": None if run is None else run.version,
            "config": self.run_config,
            "data_spec": None if self.data_spec is None else self.data_spec.plain(),
            "images_seen": self.clock.images,
            "steps": self.clock.steps,
            "skipped_steps": self.skipped_steps,
            "non_finite_in_a_row": self._non_finite_in_a_row,
            "validation_due": self._validation_due,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the clock and the counts of skipped steps from a checkpoint.

        Raises:
            UserError: for a checkpoint of an unknown format version, or of another project.
        """
        state = checkpoint.get(CHECKPOINT_KEY, {})
        require_known_format(state.get("format_version"), "the checkpoint")
        self.clock.images = state["images_seen"]
        self.clock.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]
        self._non_finite_in_a_row = state["non_finite_in_a_row"]
        self._validation_due = state["validation_due"]


def _names(*given: Any) -> list[str]:
    """All network names that the given options use."""
    return [name for each in given if isinstance(each, Mapping) for name in each]
