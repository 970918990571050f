"""The base of every method: a training module that generates samples, one paper each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels, class_number
from lit_diffusion.denoisers import Guidance, NetworkDenoiser
from lit_diffusion.distributed import global_batch, rank_and_world_size
from lit_diffusion.errors import UserError
from lit_diffusion.objectives import Loss, Objective
from lit_diffusion.randomness import SampleNoise, keyed_choice
from lit_diffusion.reverse import ReverseChain, ReverseVariance
from lit_diffusion.runs.console import print_note
from lit_diffusion.samplers import Ancestral
from lit_diffusion.samplers.base import OnStep, Sampler, Samples
from lit_diffusion.training.datamodule import Batch, DataModule
from lit_diffusion.training.module import TrainedModule
from lit_diffusion.training.own_loaders import assumed_data_spec


class Encoded(NamedTuple):
    """Data in the diffused space.

    Attributes:
        z: the encoded data, ``[B, *sample_shape]``.
        nats: the cost of the encoder in ``log p(x) >= log p(z) - nats``, ``[B]``: minus the log-determinant of an
            invertible encoder, ``E log q(z|x) - E log p(x|z)`` of a variational one.
    """

    z: Tensor
    nats: Tensor


class Method(TrainedModule):
    """One paper: a denoiser, an objective, a default sampler and the optimizer.

    A subclass builds the first three in its constructor. A method that diffuses latents instead of the data overrides
    :meth:`encode` and :meth:`decode`, and :meth:`losses` if the encoder learns.

    Args:
        denoiser: the model.
        objective: the loss that is minimized.
        sampler: the default sampler.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    reverse_variance: ReverseVariance | None = None
    """The variance of the reverse chain that the method trains; None: none is trained, the papers' choice is used."""

    encodes_grey_levels: bool = False
    """True where :meth:`encode` takes grey levels and its nats include their probability (a variational encoder with a
    decoder over grey levels); otherwise it takes values, and its nats are those of a density."""

    def __init__(self, denoiser: NetworkDenoiser, objective: Objective, sampler: Sampler, **training: Any) -> None:
        super().__init__(**training)
        objective.check(denoiser.process)
        if objective.couples:
            denoiser.predicts = "velocity"
        self.denoiser = denoiser
        self.objective = objective
        self.sampler = sampler

    # ---- the paper ---------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Module]:
        """The networks that are trained: the denoiser."""
        return {"denoiser": self.denoiser}

    def loss(self, batch: Batch, seed: int) -> Loss:
        """The loss of each datum of an encoded batch; randomness is keyed by ``seed`` and ``batch.index``."""
        return self.objective(self.denoiser, batch.x, seed, batch.index, batch.cond, eps=batch.eps)

    def losses(self, batch: Batch, seed: int) -> dict[str, Loss]:
        """The losses by network: the denoiser's, in the diffused space."""
        return {"denoiser": self.loss(self.encoded(batch, seed), seed)}

    def loss_given_t(self, batch: Batch, t: Tensor, eps: Tensor) -> Loss:
        """The loss of each encoded datum at given times ``[B]`` and noise ``[B, ...]``, whatever the law of t."""
        return self.objective.at(self.denoiser, batch.x, t, eps, batch.cond)

    def before_step(self, batch: Batch, seed: int) -> Batch:
        """Pair noise with the data of the global batch, as diffused, where the objective does that."""
        objective = self.objective
        if not objective.couples:
            return batch
        with torch.no_grad():
            x0 = self.encoded(batch, seed).x
        eps, cond = objective.noise(x0, seed, batch.index), batch.cond
        if cond is not None:
            known = cond if self.num_conditional_classes is not None else replace(cond, label=None)
            cond = known.map(global_batch)
        paired = objective.couple(global_batch(x0), global_batch(eps), cond)
        first = rank_and_world_size()[0] * len(batch)  # Processes hold consecutive rows, equally many each.
        return replace(batch, eps=paired[first : first + len(batch)].to(x0.device))

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        """Pass the losses of the step to a law of t that learns; other laws keep none."""
        if kept:
            self.objective.time_law.learn(**kept)

    def noise_level(self, t: float) -> tuple[str, dict[str, float]]:
        """A time of the process as text, and as numbers for an event."""
        coefficients = self.denoiser.process.coefficients(torch.tensor([t], dtype=torch.float64))
        sigma = float(coefficients.sigma / coefficients.alpha)
        return f"noise level sigma/alpha {sigma:.4g} (t {t:.4g})", {"t": t, "sigma_over_alpha": sigma}

    @classmethod
    def resolve_auto(cls, init_args: dict[str, Any], data: DataModule, say: Callable[[str], None]) -> dict[str, Any]:
        """Numbers for the keys that the configuration leaves to the data (``auto``).

        Args:
            init_args: the configured arguments of this class.
            data: the data module, set up.
            say: prints one line about a value that was found.

        Returns:
            Dotted keys below ``init_args`` and their numbers.
        """
        found: dict[str, Any] = {}
        if (init_args.get("backbone") or {}).get("init_args", {}).get("data_shape") == "auto":
            found["backbone.init_args.data_shape"] = list(data.data_spec.shape)
        return found

    def encode(self, x: Tensor, noise: SampleNoise) -> Encoded:
        """Encode data ``[B, *shape]`` into the diffused space; by default the identity.

        Args:
            x: normalized data.
            noise: random numbers of a stochastic encoder, keyed by the data's numbers.
        """
        return Encoded(x, x.new_zeros(x.shape[0]))

    def decode(self, z: Tensor, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Decode ``[B, *sample_shape]`` of the diffused space to data ``[B, *shape]``; by default the identity.

        Args:
            z: the sampler's output.
            noise: random numbers of a stochastic decoder.
            cond: the condition of the samples, ``[B]`` rows.
        """
        return z

    @property
    def diffuses_data(self) -> bool:
        """True where the data themselves are diffused, with their range and their grey levels."""
        return type(self).encode is Method.encode

    def encoded(self, batch: Batch, seed: int) -> Batch:
        """A batch in the diffused space; a stochastic encoder draws by (seed, number of the datum)."""
        noise = SampleNoise(seed, batch.index, tuple(batch.x.shape[1:])).stream("encode")
        return replace(batch, x=self.encode(batch.x, noise).z)

    @property
    def grey_levels(self) -> GreyLevels | None:
        """Grey levels of the diffused data; None for points and for latents."""
        return self.require_data_spec().grey_levels if self.diffuses_data else None

    @property
    def reverse_chain(self) -> ReverseChain:
        """The reverse chain whose bound ``test`` reports: the default sampler's where that is ancestral."""
        return self.sampler.chain if isinstance(self.sampler, Ancestral) else ReverseChain(self.reverse_variance)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample in the diffused space."""
        return self.require_data_spec().shape

    # ---- sampling ----------------------------------------------------------------------------------------------

    def generate(
        self,
        indices: Tensor,
        seed: int,
        cond: Condition | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        guidance: Guidance | None = None,
    ) -> Samples:
        """Samples number ``indices`` ``[B]`` of a seed, in data space and on this module's device.

        Sample i is a function of (seed, i, its condition) alone.

        Args:
            indices: int64 ``[B]``.
            seed: the samples' seed, independent of the training seed.
            cond: the condition, ``[B]`` rows.
            sampler: any sampler that fits the denoiser; None for the method's default.
            on_step: called after every sampler step.
            guidance: makes the denoiser that is sampled of the method's own; None for that itself.

        Returns:
            ``x`` is ``[B, *shape]``, in ``data_spec.value_range`` up to overshoot.
        """
        was_training = self.training
        self.eval()
        try:
            noise = SampleNoise(seed, indices.to(self.device), self.sample_shape)
            denoiser = self.denoiser if guidance is None else guidance(self.denoiser)
            made = (sampler or self.sampler).sample(denoiser, noise, cond, on_step)
            with torch.no_grad():
                return replace(made, x=self.decode(made.x, noise.stream("decode"), cond))
        finally:
            self.train(was_training)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that samples may have, the data's; None where the model or the data have none."""
        classes = self.denoiser.backbone.num_classes
        if self.data_spec is None or classes is None:
            return classes
        return None if self.data_spec.num_classes is None else min(classes, self.data_spec.num_classes)

    def condition(self, indices: Tensor, label: int | str | None = None) -> Condition | None:
        """The condition of samples ``indices`` ``[B]``: a given class, else all classes of the data in turn.

        With K classes in the training data sample i has the (i mod K)-th; None for a model that is not
        class-conditional.

        Args:
            indices: int64 ``[B]``.
            label: the class of all samples, by its name or its number.

        Raises:
            UserError: for a label where the model is not class-conditional, or an unknown class.
        """
        if self.num_classes is None:
            if label is not None:
                raise UserError(f"label {label}: this model is not class-conditional; leave --label out")
            return None
        if label is not None:
            labels = torch.full_like(indices, self.class_number(label))
        else:
            counts = self.data_spec.class_counts if self.data_spec is not None else None
            there = [k for k in range(self.num_classes) if counts is None or counts[k] > 0]
            labels = torch.tensor(there, device=indices.device)[indices % len(there)]
        return Condition(label=labels.to(self.device))

    def condition_by_counts(
        self, indices: Tensor, seed: int, class_counts: Sequence[int] | None, label: int | str | None = None
    ) -> Condition | None:
        """The condition of samples ``indices`` ``[B]`` with classes in the proportions of the data.

        Sample i's class is drawn in proportion to the counts, keyed by (seed, i).

        Args:
            indices: int64 ``[B]``.
            seed: the samples' seed.
            class_counts: number of data of each class; None: unknown, all classes in turn.
            label: the class of all samples, by its name or its number; None: by the counts.

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
            UserError: for an unknown class.
        """
        names = None if self.data_spec is None else self.data_spec.class_names
        return class_number(label, self.num_classes or 0, names)

    def require_fitting_classes(self, data: DataModule | None = None) -> None:
        """Refuse, before any work, data whose labels do not fit the backbone's classes.

        A backbone without classes ignores labels. One with more classes than the data, for weights that were trained
        on more, is conditioned on those of the data; the others are neither trained nor sampled.

        Args:
            data: the data for training or evaluation, whose held-out part needs labels, too; None for a model alone.

        Raises:
            UserError: naming the numbers of classes and the key to set.
        """
        classes, data_spec = self.denoiser.backbone.num_classes, self.require_data_spec()
        key = "model.init_args.backbone.init_args.num_classes"
        if classes is None:
            return
        if data_spec.num_classes is not None and data_spec.num_classes <= classes:
            if data is not None and data.held_out_labels is None and len(data.held_out_indices) > 0:
                raise UserError(
                    f"the backbone has {classes} classes and data.held_out has no labels: give them (its classes or "
                    f"label_key), or set data.held_out null"
                )
            return
        if data_spec.num_classes is None:
            raise UserError(
                f"the backbone has {classes} classes ({key}) and the data {data_spec.source} have no labels: set {key} "
                f"null, or give the data's labels (data.source's classes or label_key)"
            )
        raise UserError(
            f"the backbone has {classes} classes and the data {data_spec.source} have {data_spec.num_classes}: set "
            f"{key} {data_spec.num_classes}, or null for an unconditional model"
        )

    def on_data_spec(self) -> None:
        """Set the denoiser's data range; latents have none."""
        known = self.data_spec is not None and self.diffuses_data
        self.denoiser.data_range = self.data_spec.value_range if known and self.data_spec is not None else None

    @property
    def num_conditional_classes(self) -> int | None:
        """Number of classes that the backbone is conditioned on; None: none."""
        return self.denoiser.backbone.num_classes

    # ---- training ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse, before any work, classes and a sampler that do not fit: the first samples may come late."""
        super().setup(stage)
        if stage in ("fit", "predict"):
            self.check_sampler(self.sampler)

    def _take_data_spec(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        of_module = isinstance(datamodule, DataModule)
        if not of_module and self.data_spec is None:
            self.data_spec = assumed_data_spec(self.denoiser.backbone)
            if stage == "fit" and self.data_spec.value_range is not None:
                print_note(
                    "data: a DataLoader's images are taken to be in [0, 1] with 256 grey levels; if they are not, set "
                    "method.data_spec"
                )
        super()._take_data_spec(stage)
        self.require_fitting_classes(datamodule if of_module else None)

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse, before any work, a sampler that does not fit this model or the trainer's strategy.

        Raises:
            UserError: with the reason.
        """
        sampler.check(self.denoiser)
        if self.sharded and sampler.adaptive:
            raise UserError(
                f"{type(sampler).__name__} chooses its own steps, and with trainer.strategy fsdp all processes must "
                f"make equally many: choose a sampler of fixed steps such as Heun or DDIM, or use ddp"
            )

    def predict_step(self, indices: Tensor, batch_idx: int) -> Samples:
        """Samples number ``indices`` of the run's seed, with classes in the proportions of the training data."""
        cond = self.condition_by_counts(indices, self.seed, self.require_data_spec().class_counts)
        return self.generate(indices, self.seed, cond)
