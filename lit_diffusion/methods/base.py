"""What every method is: a LightningModule that is one paper."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lit_diffusion import interrupts
from lit_diffusion.clock import Clock, in_images
from lit_diffusion.conditions import Condition
from lit_diffusion.cuda_graphs import RecordedBackbone
from lit_diffusion.data.facts import DataFacts, class_number
from lit_diffusion.datamodule import NOBODYS, Batch, DataModule
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.distributed import shares_of_all
from lit_diffusion.errors import UserError
from lit_diffusion.failures import agree
from lit_diffusion.flops import forward_flops
from lit_diffusion.formats import CHECKPOINT_KEY, FORMAT_VERSION, require_known_format
from lit_diffusion.objectives import DenoisingScoreMatching, Loss
from lit_diffusion.own_loaders import assumed_facts, batch_of, indices_to_predict, require_fitting_trainer
from lit_diffusion.randomness import SampleNoise, keyed_choice, stream_key
from lit_diffusion.reverse import ReverseChain, ReverseVariance
from lit_diffusion.run import print_note, run_logger_of, survived
from lit_diffusion.samplers import Ancestral
from lit_diffusion.samplers.base import OnStep, Sampler, Samples
from lit_diffusion.sharding import ShardedStrategy, gradients_kept_back, shard, whole
from lit_diffusion.stopwatch import Stopwatch
from lit_diffusion.trainer import Trainer, callbacks_of

# Both have a say in it by design: the DataModule prepares its own batches, the method those of other loaders.
warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule` but")

NON_FINITE_IN_A_ROW = 3
"""Consecutive steps whose loss or gradient is not finite after which a run is given up."""


class Method(pl.LightningModule):
    """One paper: a denoiser, an objective, a default sampler and the optimiser.

    A subclass builds those in its constructor and says what the loss of a batch is (:meth:`loss`).

    Args:
        denoiser: the model.
        sampler: the paper's own, used where none is asked for.
        optimizer: optimiser class and arguments.
        warmup_images: the learning rate rises linearly over so many images (or give warmup_steps).
        warmup_steps: the learning rate rises linearly over so many steps (or give warmup_images).
        gradient_clip: largest norm of the gradient, null for none.
    """

    learns_from_losses: bool = False
    """Whether :meth:`learn_from` wants the losses of every step; they cross the processes."""

    reverse_variance: ReverseVariance | None = None
    """Of the reverse chain that the method trains; None: it trains none, and the chain has the papers' own variance."""

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        sampler: Sampler,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        warmup_images: int | None = None,
        warmup_steps: int | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.denoiser = denoiser
        self.sampler = sampler
        self.make_optimizer = optimizer
        in_images("model", "warmup", warmup_images, warmup_steps, batch=1)  # Only to refuse what is wrong at once.
        if gradient_clip is not None and not gradient_clip > 0.0:
            raise UserError(f"gradient_clip is {gradient_clip:g}; give a positive norm, or null for none")
        self.warmup = (warmup_images, warmup_steps)
        self.gradient_clip = gradient_clip
        self.clock = Clock()
        self.seed = 0
        self._facts: DataFacts | None = None
        self.run_config: dict[str, Any] | None = None
        """The whole resolved configuration; the command line sets it, checkpoints carry it."""
        self.stepped = False
        """Whether the last training step changed the weights (False when its gradient was not finite)."""
        self.overflowed = False
        """Whether it was float16's range that its gradient left; the scaler then lowers its scale."""
        self.stopwatch = Stopwatch()
        self.flops: int | None = None
        """Of one evaluation of the backbone for one datum; found when training is set up."""
        self._validation_began = 0.0
        self._validation_due = False
        """Whether the held-out loss after the last step is still to be measured; every checkpoint carries it."""
        self.last_loss = torch.zeros(())
        self.last_gradient_norm = torch.zeros(())
        self.last_times = torch.zeros(0, dtype=torch.float64)
        self.last_losses = torch.zeros(0)
        """The losses of this process's images in the last step, and the times of their noise."""
        self.interrupted = False
        """Whether the run is to stop, since one of its processes was asked to; known to all at the same step."""
        self.sharded = False
        """Whether each process has a part of the weights only, so that all evaluate the backbone or none does."""
        self.skipped_steps = 0
        self._non_finite_in_a_row = 0
        self._configured: list[dict[str, Any]] = []
        self._held_out: list[Tensor] = []
        self._held_out_trouble: Exception | None = None
        self._full_batch = 0
        """The largest batch of a DataLoader of one's own; warm-up in steps goes by it."""
        self._numbered = 0
        """Held-out images of such a loader that have their number."""
        self._looked_at: set[tuple[str, int]] = set()

    # ---- what a paper says -------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch, seed: int) -> Loss:
        """The loss of each image of a batch; its randomness is keyed by ``seed`` and ``batch.index``."""

    def loss_at(self, batch: Batch, t: Tensor, eps: Tensor) -> Loss:
        """The loss of each image at given times ``[B]`` and noise ``[B, ...]``, whatever the law of t."""
        objective = cast(DenoisingScoreMatching, self.objective)
        return objective.at(self.denoiser, batch.x, t, eps, batch.cond)

    @classmethod
    def resolve_auto(cls, init_args: dict[str, Any], data: DataModule, say: Callable[[str], None]) -> dict[str, Any]:
        """Numbers for the keys that the configuration leaves to the data (``auto``).

        Args:
            init_args: of this class, as configured.
            data: set up, ready to be measured.
            say: prints one line about a value that was found.

        Returns:
            Dotted keys below ``init_args`` and their numbers.
        """
        found: dict[str, Any] = {}
        if (init_args.get("backbone") or {}).get("init_args", {}).get("data_shape") == "auto":
            found["backbone.init_args.data_shape"] = list(data.facts.shape)
        return found

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From data to the space that is diffused, and its cost in nats ``[B]``: identity and 0 for most methods."""
        return x, x.new_zeros(x.shape[0])

    def decode(self, z: Tensor) -> Tensor:
        """From the space that is diffused to data."""
        return z

    @property
    def reverse_chain(self) -> ReverseChain:
        """The chain whose bound ``test`` reports: its own sampler's where that is ancestral."""
        return self.sampler.chain if isinstance(self.sampler, Ancestral) else ReverseChain(self.reverse_variance)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample in the space that is diffused."""
        return self.require_facts().shape

    # ---- sampling ----------------------------------------------------------------------------------------------

    def generate(
        self,
        indices: Tensor,
        seed: int,
        cond: Condition | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
    ) -> Samples:
        """Samples number ``indices`` ``[B]`` of a seed, in data space and on this module's device.

        Sample i is a function of (seed, i, its condition) alone.

        Args:
            indices: int64 ``[B]``.
            seed: of the samples, independent of the training seed.
            cond: the condition, ``[B]`` rows.
            sampler: any that fits; None for the method's own.
            on_step: called after every sampler step.

        Returns:
            ``x`` is ``[B, *shape]``, in ``facts.value_range`` up to overshoot.
        """
        was_training = self.training
        self.eval()
        try:
            noise = SampleNoise(seed, indices.to(self.device), self.sample_shape)
            made = (sampler or self.sampler).sample(self.denoiser, noise, cond, on_step)
            return replace(made, x=self.decode(made.x))
        finally:
            self.train(was_training)

    @property
    def num_classes(self) -> int | None:
        """Of the classes that samples may have: those of the data; None where the model or the data have none."""
        classes = self.denoiser.backbone.num_classes
        if self.facts is None or classes is None:
            return classes
        return None if self.facts.num_classes is None else min(classes, self.facts.num_classes)

    def condition(self, indices: Tensor, label: int | str | None = None) -> Condition | None:
        """What samples ``indices`` ``[B]`` are conditioned on: a given class, else all classes of the data in turn.

        With K classes in the training data sample i has the (i mod K)-th; None for a model that is not
        class-conditional.

        Args:
            indices: int64 ``[B]``.
            label: of all, by its name or its number.

        Raises:
            UserError: if a label is asked of a model that has none, or there is no such class.
        """
        if self.num_classes is None:
            if label is not None:
                raise UserError(f"label {label}: this model is not class-conditional; leave --label out")
            return None
        if label is not None:
            labels = torch.full_like(indices, self.class_number(label))
        else:
            counts = self.facts.class_counts if self.facts is not None else None
            there = [k for k in range(self.num_classes) if counts is None or counts[k] > 0]
            labels = torch.tensor(there, device=indices.device)[indices % len(there)]
        return Condition(label=labels.to(self.device))

    def condition_by_counts(
        self, indices: Tensor, seed: int, class_counts: Sequence[int] | None, label: int | str | None = None
    ) -> Condition | None:
        """What samples ``indices`` ``[B]`` are conditioned on to have their classes as often as data have them.

        Sample i's class is drawn in proportion to the counts, keyed by (seed, i).

        Args:
            indices: int64 ``[B]``.
            seed: of the samples.
            class_counts: data of each class; None: not known, then all classes in turn.
            label: of all, whatever the counts, by its name or its number; None: as the counts say.

        Raises:
            UserError: as :meth:`condition`.
        """
        if label is not None or self.num_classes is None or class_counts is None:
            return self.condition(indices, label)
        weights = torch.tensor(class_counts)
        # On the CPU: where the edge between two classes lies must not depend on the device.
        labels = keyed_choice(seed, "sample class", indices.cpu(), weights)
        return Condition(label=labels.to(self.device))

    def class_number(self, label: int | str) -> int:
        """The number of a class by its name or, where no class has that name, by its number.

        Raises:
            UserError: if there is no such class.
        """
        names = None if self.facts is None else self.facts.class_names
        return class_number(label, self.num_classes or 0, names)

    def require_fitting_classes(self, data: DataModule | None = None) -> None:
        """Refuse, before any work, data whose labels the backbone cannot be told.

        A backbone without classes is told none. One with more classes than the data have, for weights that were
        trained on more, is told those of the data; the others are neither trained nor sampled.

        Args:
            data: what it is to be trained or measured on, whose held-out part needs labels, too; None for a model
                alone.

        Raises:
            UserError: naming the classes of both and the key to set.
        """
        classes, facts = self.denoiser.backbone.num_classes, self.require_facts()
        key = "model.init_args.backbone.init_args.num_classes"
        if classes is None:
            return
        if facts.num_classes is not None and facts.num_classes <= classes:
            if data is not None and data.held_out_labels is None and len(data.held_out_indices) > 0:
                raise UserError(
                    f"the backbone has {classes} classes and data.held_out has no labels: give them (its classes or "
                    f"label_key), or set data.held_out null"
                )
            return
        if facts.num_classes is None:
            raise UserError(
                f"the backbone has {classes} classes ({key}) and the data {facts.source} have no labels: set {key} "
                f"null, or give the data's labels (data.source's classes or label_key)"
            )
        raise UserError(
            f"the backbone has {classes} classes and the data {facts.source} have {facts.num_classes}: set {key} "
            f"{facts.num_classes}, or null for a model that is not told the class"
        )

    def require_facts(self) -> DataFacts:
        """The facts of the data.

        Raises:
            UserError: if nobody has set them.
        """
        if self.facts is None:
            raise UserError("this model does not know its data: set method.facts = datamodule.facts")
        return self.facts

    @property
    def facts(self) -> DataFacts | None:
        """Of the data, None as long as nobody has set them."""
        return self._facts

    @facts.setter
    def facts(self, facts: DataFacts | None) -> None:
        self._facts = facts
        as_they_are = type(self).encode is Method.encode  # What else is diffused has not the data's range.
        self.denoiser.data_range = facts.value_range if facts is not None and as_they_are else None

    # ---- training ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the data's facts and the Trainer's way of running the backbone."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, DataModule):
            self.facts = datamodule.facts
            self.clock.batch = datamodule.global_batch_size
            self.require_fitting_classes(datamodule)
        else:
            self._take_facts_of_own_loaders(stage)
        require_fitting_trainer(self.trainer)
        if (run := run_logger_of(self.trainer)) is not None:
            run.clock = self.clock
        self._looked_at.clear()
        self.interrupted = False
        if stage == "fit" and getattr(self.trainer, "endless", False):
            raise UserError("a run needs an end: give trainer.max_images, trainer.max_steps or trainer.max_time")
        self.sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if self.sharded:
            self._require_shardable()
        if stage in ("fit", "predict"):
            self.check_walk(self.sampler)  # Before the work: the first samples may be drawn at its end.
        self.denoiser.autocast_dtype = getattr(self.trainer, "autocast_dtype", None)
        if stage == "fit" and self.flops is None:
            self.flops = forward_flops(self.denoiser.backbone)
        if getattr(self.trainer, "channels_last", False) and self.sharded:
            print_note("trainer.channels_last is off: fsdp keeps weights in PyTorch's own order")
        elif getattr(self.trainer, "channels_last", False):
            self.denoiser.backbone.to(memory_format=torch.channels_last)
        if getattr(self.trainer, "compile", False):
            rows = datamodule.rows_at_once if isinstance(datamodule, DataModule) else None
            self.denoiser.compile_backbone(rows)
        if getattr(self.trainer, "cuda_graphs", False):
            if self.trainer.strategy.root_device.type != "cuda":
                raise UserError("trainer.cuda_graphs needs a CUDA device; leave it out")
            self.denoiser.recorded = RecordedBackbone(self.denoiser.backbone)

    def _take_facts_of_own_loaders(self, stage: str) -> None:
        if self.facts is None:
            self.facts = assumed_facts(self.denoiser.backbone)
            if stage == "fit" and self.facts.value_range is not None:
                print_note(
                    "data: a DataLoader's images are taken to be in [0, 1] with 256 grey levels; if they are not, set "
                    "method.facts"
                )
        self.require_fitting_classes()
        if stage == "fit" and self.trainer.world_size > 1 and isinstance(self.trainer, Trainer):
            raise UserError(
                f"a DataLoader of one's own is not shared out over {self.trainer.world_size} processes here: take "
                f"lit_diffusion's DataModule, or Lightning's own Trainer, which does it"
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the batch of a DataLoader that is not of lit_diffusion's DataModule, which prepares its own.

        Raises:
            UserError: if it cannot be taken, see :mod:`lit_diffusion.own_loaders`.
        """
        trainer = self.trainer
        if isinstance(batch, Batch) or isinstance(getattr(trainer, "datamodule", None), DataModule):
            return batch
        if trainer.predicting:
            return indices_to_predict(batch)
        place = (str(trainer.state.stage), dataloader_idx)
        taken = batch_of(batch, self.require_facts(), self.denoiser.backbone.num_classes, place not in self._looked_at)
        self._looked_at.add(place)
        rank, processes = trainer.global_rank, trainer.world_size
        if trainer.training:
            self.clock.batch = processes * len(taken)  # The last of an epoch may be smaller.
            self._full_batch = max(self._full_batch, self.clock.batch)
            return Batch(taken.x, taken.index + self.clock.images + rank * len(taken), taken.cond)
        first, self._numbered = self._numbered, self._numbered + len(taken)
        return Batch(taken.x, (taken.index + first) * processes + rank, taken.cond)

    def configure_model(self) -> None:
        """Share the backbone's weights out, where the strategy asks for it."""
        if self.sharded and not isinstance(self.denoiser.backbone, FSDPModule):
            mesh = self.device_mesh
            assert mesh is not None
            shard(self.denoiser.backbone, mesh["data_parallel"])

    def _require_shardable(self) -> None:
        inside = {id(p) for p in self.denoiser.backbone.parameters()}
        outside = [name for name, p in self.named_parameters() if id(p) not in inside and p.requires_grad]
        if outside:
            raise UserError(
                f"trainer.strategy fsdp shares out the backbone's weights only, and {type(self).__name__} also learns "
                f"{outside[0]}: use ddp"
            )
        if getattr(self.trainer, "compile", False):
            raise UserError("trainer.strategy fsdp does not go with trainer.compile; choose one, or ddp with compile")
        if getattr(self.trainer, "cuda_graphs", False):
            raise UserError("trainer.strategy fsdp does not go with trainer.cuda_graphs; choose one, or ddp with them")
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("trainer.strategy fsdp does not go with precision 16-mixed; use bf16-mixed, or ddp")

    def check_walk(self, sampler: Sampler) -> None:
        """Refuse, before any work, a sampler that cannot walk on this model as it is run.

        Raises:
            UserError: with the reason.
        """
        sampler.check(self.denoiser)
        if self.sharded and sampler.adaptive:
            raise UserError(
                f"{type(sampler).__name__} chooses its own steps, and with trainer.strategy fsdp all processes must "
                f"make equally many: choose a walk of fixed steps such as Heun or DDIM, or use ddp"
            )

    def configure_optimizers(self) -> Optimizer:
        """The optimiser; its learning rate is the one after warm-up."""
        optimizer = self.make_optimizer(self.denoiser.parameters())
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._configured = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        return optimizer

    def on_fit_start(self) -> None:
        """Say what will not be there without a run's logger."""
        if run_logger_of(self.trainer) is None and not getattr(self.trainer, "fast_dev_run", False):
            writers = [type(each).__name__ for each in callbacks_of(self.trainer) if hasattr(each, "writes_to_run")]
            if writers:
                print_note(
                    f"{', '.join(writers)}: nothing is drawn or written, since the Trainer has no RunLogger: "
                    f"Trainer(logger=lit_diffusion.run.RunLogger('name'))"
                )

    def on_train_start(self) -> None:
        """Let the configuration have the last word on learning rates and the like, over a checkpoint's optimiser state.

        A run that was continued after its end makes no further step; a held-out loss that a kill cut short is measured.
        """
        for group, configured in zip(self.trainer.optimizers[0].param_groups, self._configured, strict=True):
            group.update(configured)
        if self.clock.images > 0:  # As the last step left it, for the checkpoint of a run that makes no further one.
            self._set_learning_rate(self.trainer.optimizers[0], self.clock.images)
        self._stop_when_done()
        if self._validation_due:
            self._validate()

    def _validate(self) -> None:
        """As Lightning does after a step."""
        trainer = self.trainer
        first_iteration = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_iteration

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The batch is here."""
        self.stopwatch.lap("data")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """All that follows a step is done."""
        self.stopwatch.lap("logging")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimiser step on this process's share of the global batch, in as many parts as its memory asks for."""
        # Dropout draws from the global generator: tie it to the image count, so that resuming needs no state.
        torch.manual_seed(stream_key(self.seed, f"dropout/{self.global_rank}/{self.clock.images}") >> 1)
        parts = batch.split(getattr(getattr(self.trainer, "datamodule", None), "micro_batch_size", None))
        times: list[Tensor] = []
        at_levels: list[Tensor] = []
        trained_on: list[Tensor] = []

        def losses() -> Iterator[Tensor]:
            for part in parts:
                loss = self.loss(part, self.seed)
                assert loss.t is not None
                times.append(loss.t)
                at_levels.append(loss.shown)
                trained_on.append(loss.per_sample.detach())
                yield loss.per_sample.sum() / len(batch)

        self.optimise(losses(), len(parts))
        if not isinstance(self.trainer, Trainer):  # Whose loggers and bars are Lightning's.
            self.log("train/loss", self.last_loss, prog_bar=True)
        self.last_times, self.last_losses = torch.cat(times), torch.cat(at_levels)
        if self.stepped:
            if self.learns_from_losses:
                # Processes hold consecutive rows of the global batch: put together they are in its order.
                t, loss = self.all_gather((self.last_times, self.last_losses))
                self.learn_from(t.flatten(), loss.flatten())
        else:
            self._say_what_was_skipped(batch.index, torch.cat(trained_on))
        self._stop_when_done()
        loop = self.trainer.fit_loop
        assert loop._data_fetcher is not None
        self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self.stopwatch.mark()

    def learn_from(self, t: Tensor, loss: Tensor) -> None:
        """What a method learns from the losses at times ``t`` of a step over all processes, in the batch's order."""

    def optimise(self, losses: Iterable[Tensor], count: int) -> None:
        """The one way from losses to weights: accumulate, check, clip, step, tick.

        A step whose loss or gradient is not finite on any process changes nothing but the clock, on all of them; so
        the weights stay finite, and with them every checkpoint and the EMA.

        Args:
            losses: ``count`` scalars that add up to this process's loss; made lazily, one graph at a time.
            count: how many.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with self.stopwatch.part("forward_backward", self.device):
            for done, loss in enumerate(losses, start=1):
                with self._hold_sync() if done < count else nullcontext():
                    self.manual_backward(loss)
                total += loss.detach()
        with self.stopwatch.part("optimiser", self.device):
            self._step(optimizer, total)
        self.clock.tick()
        if self.stepped:
            # Averages follow here, not in a hook of the Trainer's, so that no callback sees one that is a step behind.
            with self.stopwatch.part("ema", self.device):
                for callback in callbacks_of(self.trainer):
                    if hasattr(callback, "after_step"):
                        callback.after_step(self)

    def _step(self, optimizer: LightningOptimizer, total: Tensor) -> None:
        """From gradients to weights, or to nothing where they are not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip or float("inf")))
        # What all processes must agree on, in one exchange: is every loss finite, was anyone asked to stop? Gradients
        # are averaged over the processes, so a NaN anywhere is a NaN everywhere; losses and signals are not.
        mine = torch.stack((1.0 - total.isfinite().float(), total.new_tensor(float(interrupts.asked() is not None))))
        broken, asked = self.trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        self.interrupted = self.interrupted or asked > 0.0
        loss_is_finite, gradient_is_finite = broken == 0.0, bool(torch.isfinite(norm))
        self.stepped = loss_is_finite and gradient_is_finite
        # An overflow of float16 gradients is the scaler's business, it skips the step and lowers its scale; a gradient
        # that is not finite at a scale below 1 did not overflow.
        self.overflowed = scaler is not None and loss_is_finite and not gradient_is_finite and scaler.get_scale() >= 1.0
        if self.stepped or self.overflowed:
            self._set_learning_rate(optimizer.optimizer, self.clock.images + self.clock.batch)
            optimizer.step()
            self._non_finite_in_a_row = 0
        else:
            if scaler is not None:
                scaler.update()  # Ends the step that unscale_ began.
            optimizer.zero_grad(set_to_none=True)
            self.skipped_steps += 1
            self._non_finite_in_a_row += 1
        self.last_loss, self.last_gradient_norm = total, norm.detach()

    def _say_what_was_skipped(self, index: Tensor, losses: Tensor) -> None:
        """Which image at which noise level spoilt the step, of all processes.

        Args:
            index: the images' numbers ``[B]``.
            losses: that it was to step on ``[B]``.

        Raises:
            UserError: after three such steps in a row.
        """
        broken = losses.isfinite().logical_not()
        # The first whose loss is not finite; where all are, and the gradient is not, the largest.
        worst = int(torch.where(broken, float("inf"), losses).argmax())
        mine = (bool(broken.any()), float(losses[worst]), float(self.last_times[worst]), int(index[worst]))
        shares = shares_of_all(mine)
        found = [share for share in shares if share[0]]
        is_loss, loss, t, number = found[0] if found else max(shares, key=lambda share: share[1])
        level = self.denoiser.process.level(torch.tensor([t], dtype=torch.float64))
        sigma = float(level.sigma / level.alpha)
        what = (
            f"the loss of image {number} is {loss:g} at noise level sigma/alpha {sigma:.4g} (t {t:.4g})"
            if is_loss
            else f"the gradient is not finite; the largest loss is {loss:.4g}, of image {number} at noise level "
            f"sigma/alpha {sigma:.4g} (t {t:.4g})"
        )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if self.overflowed and scaler is not None:
            what = f"float16 gradients overflowed, the loss scale is {scaler.get_scale():g} now; {what}"
        if (run := run_logger_of(self.trainer)) is not None:
            run.record("skipped", {"reason": what, "t": t, "sigma_over_alpha": sigma, "overflow": self.overflowed})
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

    def _hold_sync(self) -> AbstractContextManager[Any]:
        """Accumulate without averaging over the processes yet, where the strategy does that in backward."""
        if self.sharded:
            return gradients_kept_back(self.denoiser.backbone)
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def _set_learning_rate(self, optimizer: Optimizer, images: int) -> None:
        """That of the step with which so many images are seen."""
        warmup = in_images("model", "warmup", *self.warmup, batch=max(self._full_batch, self.clock.batch))
        factor = 1.0 if warmup == 0 else min(1.0, images / warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    # ---- held-out loss -----------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validation is no part of a step."""
        self._validation_began = time.perf_counter()
        self._numbered = 0

    def on_test_start(self) -> None:
        """Number the images of a DataLoader of one's own anew."""
        self._numbered = 0

    def on_validation_end(self) -> None:
        """Do not count it."""
        self._validation_due = False
        seconds = time.perf_counter() - self._validation_began
        self.stopwatch.exclude(seconds)
        for callback in callbacks_of(self.trainer):
            if hasattr(callback, "exclude"):
                callback.exclude(seconds)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss of held-out images, each with its own fixed noise: equal on any number of processes."""
        try:
            per_sample = self.loss(batch, stream_key(self.seed, "held-out")).per_sample.double()
            counted = per_sample[batch.index != NOBODYS]
            self._held_out.append(torch.stack((counted.sum(), counted.new_tensor(float(len(counted))))))
        except Exception as error:
            if not self._while_training or self.sharded:
                raise
            self._held_out_trouble = error

    def test_step(self, batch: Batch | Tensor, batch_idx: int) -> None:
        """As for validation; a tensor stands for no held-out images."""
        if isinstance(batch, Batch):
            self.validation_step(batch, batch_idx)

    @property
    def _while_training(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def on_validation_epoch_end(self) -> None:
        """Average over all images of all processes, however many each had; beside a training it may fail."""
        with survived(self.trainer, "val/loss") if self._while_training else nullcontext():
            self._log_held_out("val/loss")

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self._log_held_out("test/loss")

    def _log_held_out(self, name: str) -> None:
        sums = torch.stack(self._held_out).sum(0) if self._held_out else torch.zeros(2, device=self.device)
        self._held_out.clear()
        if self._held_out_trouble is not None:
            trouble, self._held_out_trouble = self._held_out_trouble, None
            raise trouble
        agree()
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        if count:
            self.log(name, total / count, sync_dist=True)  # On all processes: callbacks look for it on each.

    def predict_step(self, indices: Tensor, batch_idx: int) -> Samples:
        """Samples number ``indices`` of the run's seed, their classes as often as in the training data."""
        cond = self.condition_by_counts(indices, self.seed, self.require_facts().class_counts)
        return self.generate(indices, self.seed, cond)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know; plain types only."""
        run = run_logger_of(self.trainer)
        checkpoint[CHECKPOINT_KEY] = {
            "format_version": FORMAT_VERSION,
            "run_id": None if run is None else run.version,
            "config": self.run_config,
            "facts": None if self.facts is None else self.facts.plain(),
            "images_seen": self.clock.images,
            "steps": self.clock.steps,
            "skipped_steps": self.skipped_steps,
            "non_finite_in_a_row": self._non_finite_in_a_row,
            "validation_due": self._validation_due,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the clock.

        Raises:
            UserError: for a checkpoint of an unknown format version, or of another project.
        """
        state = checkpoint.get(CHECKPOINT_KEY, {})
        require_known_format(state.get("format_version"), "the checkpoint")
        self.clock.images = state["images_seen"]
        self.clock.steps = state["steps"]
        self.skipped_steps = state["skipped_steps"]
        self._non_finite_in_a_row = state.get("non_finite_in_a_row", 0)  # Checkpoints of before 2026-11-22 lack it.
        self._validation_due = state.get("validation_due", False)
