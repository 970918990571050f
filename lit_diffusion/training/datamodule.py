"""The DataModule: from a source's bytes to the normalized batch, in an order that is a function of the images seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as IndexSampler

from lit_diffusion.conditions import Condition
from lit_diffusion.data.source import Source
from lit_diffusion.data_spec import DataSpec, in_brief
from lit_diffusion.errors import UserError
from lit_diffusion.images import about_shown
from lit_diffusion.interrupts import leave_it_to_the_main_process
from lit_diffusion.randomness import keyed_permutation, keyed_uniform
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.console import print_note
from lit_diffusion.training.trainer import Trainer

SPLIT_SEED = 0
"""Key of the split: the held-out images do not depend on a run's seed, so that runs can be compared on them."""


BIN_MARGIN = 2.0**-15
"""Uniform noise keeps this part of a grey level away from both ends of its bin: 255.99999 is 256 in float32."""

PADDING_INDEX = -1
"""Index of a padding row, which gives all processes equally many batches and enters no average."""


@dataclass
class Batch:
    """A normalized batch.

    Attributes:
        x: float32 ``[B, C, H, W]`` in the declared value range, or points ``[B, D]``.
        index: int64 ``[B]``: each image's number n in the run, the key of its randomness.
        cond: the condition of each image, None for data without labels.
        eps: the noise paired with each image, ``[B, ...]`` in the space that is diffused; None: its own, keyed by its
            number.
    """

    x: Tensor
    index: Tensor
    cond: Condition | None = None
    eps: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def split(self, size: int | None) -> list[Batch]:
        """Parts of at most ``size`` rows; the whole batch for None."""
        if size is None or size >= len(self):
            return [self]
        return [
            Batch(
                self.x[rows],
                self.index[rows],
                None if self.cond is None else self.cond[rows],
                None if self.eps is None else self.eps[rows],
            )
            for rows in (slice(start, start + size) for start in range(0, len(self), size))
        ]


class _Numbered(Dataset[tuple[np.ndarray, int, int]]):
    """Dataset that maps items ``(number in the run, index in the source)`` to their value, label and number."""

    def __init__(self, source: Source, labels: np.ndarray | None) -> None:
        self.source = source
        self.labels = labels

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int, int]:
        number, index = item
        return self.source.value(index), -1 if self.labels is None else int(self.labels[index]), number

    @staticmethod
    def collate(items: list[tuple[np.ndarray, int, int]]) -> dict[str, Tensor]:
        values, labels, numbers = zip(*items, strict=True)
        return {
            "value": torch.from_numpy(np.stack(values)),
            "label": torch.tensor(labels),
            "index": torch.tensor(numbers),
        }


MOST_CLASSES = 1_000_000
"""Largest number of classes accepted: more mean labels that were never numbered."""


def _labels(source: Source, key: str) -> np.ndarray | None:
    """The class of each datum, int64 ``[N]``; None without classes.

    Raises:
        UserError: if one is not in ``0 .. num_classes - 1``, or the names are not as many different ones.
    """
    count, names = source.num_classes, source.class_names
    if count is None:
        return None
    if count > MOST_CLASSES:
        raise UserError(f"{key} {source.name} has {count} classes: number them from 0 without gaps, or leave them out")
    if names and (len(names) != count or len(set(names)) != count):
        raise UserError(
            f"{key} {source.name} has {count} classes and the names {in_brief(names)}: give each its own name"
        )
    given = [source.label(index) for index in range(len(source))]
    labels = np.array([-1 if label is None else label for label in given], dtype=np.int64)
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= count))):
        raise UserError(
            f"{key} {source.name}: the label of item {wrong[0]} is {given[wrong[0]]}, and it has {count} classes, 0 to "
            f"{count - 1} ({len(wrong)} such items): correct the labels, or leave these items out"
        )
    return labels


def _labels_as_in_training(held_out: Source, source: Source) -> np.ndarray | None:
    """The held-out labels, numbered as the training classes are; None where either source has no classes.

    Raises:
        UserError: for a class that the training data do not have.
    """
    labels = None if source.num_classes is None else _labels(held_out, "data.held_out")
    if labels is None or source.num_classes is None or held_out.num_classes is None:
        return None
    without = "or leave its labels out (classes: false, label_key: null)"
    if not source.class_names or not held_out.class_names:
        if held_out.num_classes > source.num_classes:
            raise UserError(
                f"data.held_out has {held_out.num_classes} classes, data.source {source.num_classes}: give it the "
                f"classes of the training, {without}"
            )
        return labels
    numbers = {name: number for number, name in enumerate(source.class_names)}
    table = np.array([numbers.get(name, -1) for name in held_out.class_names])
    if len(unknown := np.unique(labels[table[labels] < 0])):
        first = held_out.class_names[unknown[0]]
        raise UserError(
            f"data.held_out has a class {first!r} that data.source has not: {in_brief(held_out.class_names)} against "
            f"{in_brief(source.class_names)}; name its classes as those of the training, {without}"
        )
    return table[labels]


class TrainingOrder(IndexSampler[list[tuple[int, int]]]):
    """Endless batches of one process: image n of the run is entry ``n mod N`` of the permutation of its epoch.

    Args:
        indices: int64 ``[N]``, the training images' indices in their source.
        seed: the run's seed.
        start: images seen so far.
        batch: global batch size, over all processes.
        rank: this process's rank.
        world_size: number of processes.
    """

    def __init__(self, indices: Tensor, seed: int, start: int, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = indices
        self.seed = seed
        self.start = start
        self.batch = batch
        self.share = batch // world_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        length = len(self.indices)
        epoch, order = -1, self.indices
        first = self.start + self.rank * self.share
        while True:
            numbered = []
            for n in range(first, first + self.share):
                if n // length != epoch:
                    epoch = n // length
                    order = self.indices[keyed_permutation(self.seed, "order", length, epoch)]
                numbered.append((n, int(order[n % length])))
            yield numbered
            first += self.batch


class _Epoch(TrainingOrder):
    """The same batches for Lightning's own Trainer, which counts in epochs: as many as hold every image once.

    Args:
        clock: the run's clock; each epoch begins at its images seen.
    """

    def __init__(self, clock: Clock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.clock = clock

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.start = self.clock.images
        return islice(super().__iter__(), len(self))


class DataModule(pl.LightningDataModule):
    """Images (or points) of one source, split, ordered, flipped and normalized exactly once.

    Args:
        source: the training data.
        global_batch_size: images per optimizer step, over all processes together.
        value_range: values of black and white, ``[0, 1]`` or ``[-1, 1]``; points are used as they are.
        held_out: a separate source for validation and test; null: a fraction of ``source``. Its classes are those of
            ``source``: by their names where both have names, else by their numbers.
        held_out_fraction: fraction of ``source`` kept for validation and test when ``held_out`` is null; the same
            images for every seed.
        flip: if true, mirror half of the training images left to right.
        dequantize: if true, add uniform noise of one grey level to the training images, so that values fill the range;
            held-out images get the middle value of each grey level.
        micro_batch_size: largest number of images per forward and backward pass in a process; gradients of the rest
            are accumulated; null: the process's whole share.
        num_workers: processes that load images, per training process; the order is the same for any number.
        predict_samples: number of samples that ``predict`` makes.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int = 128,
        value_range: tuple[float, float] = (0.0, 1.0),
        held_out: Source | None = None,
        held_out_fraction: float = 0.1,
        flip: bool = False,
        dequantize: bool = False,
        micro_batch_size: int | None = None,
        num_workers: int = 0,
        predict_samples: int = 64,
    ) -> None:
        super().__init__()
        if len(source) < 2:
            raise UserError(f"data source {source.name} has {len(source)} items; training needs at least two")
        if global_batch_size < 1:
            raise UserError(f"data.global_batch_size is {global_batch_size}; give a positive number")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(f"data.micro_batch_size is {micro_batch_size}; give a positive number or null")
        if not value_range[0] < value_range[1]:
            raise UserError(f"data.value_range is {list(value_range)}; the first must be below the second")
        if held_out is not None and tuple(held_out.shape) != tuple(source.shape):
            raise UserError(f"data.held_out has shape {held_out.shape}, data.source {source.shape}; they must agree")
        if held_out is not None and held_out.num_grey_levels != source.num_grey_levels:
            raise UserError(
                f"data.held_out has {held_out.num_grey_levels} grey levels, data.source {source.num_grey_levels}; they "
                f"must agree"
            )
        if (len(source.shape) == 3) != (source.num_grey_levels is not None):
            raise UserError(
                f"data source {source.name} has shape {list(source.shape)} and num_grey_levels "
                f"{source.num_grey_levels}; images (C, H, W) have a number of grey levels, points (D,) have none: null"
            )
        if not 0.0 <= held_out_fraction < 1.0:
            raise UserError(f"data.held_out_fraction is {held_out_fraction}; it must be at least 0 and below 1")
        if flip and len(source.shape) != 3:
            raise UserError("data.flip mirrors images; this source has points: set flip: false")
        self.source = source
        self.global_batch_size = global_batch_size
        self.flip = flip
        self.dequantize = dequantize
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.predict_samples = predict_samples
        self.seed = 0
        """The run's seed; the command line sets it."""
        self.held_out_source = source if held_out is None else held_out
        self.labels = _labels(source, "data.source")
        """Labels of the source's data, int64 ``[N]``; None without classes."""
        self.held_out_labels = self.labels if held_out is None else _labels_as_in_training(held_out, source)
        """Labels of the held-out source's data, numbered as the training classes are."""
        data_spec = DataSpec(
            source=source.name,
            shape=tuple(source.shape),
            num_grey_levels=source.num_grey_levels,
            value_range=None if source.num_grey_levels is None else (float(value_range[0]), float(value_range[1])),
            num_classes=source.num_classes,
            dequantized=dequantize and source.num_grey_levels is not None,
            class_names=tuple(source.class_names) if source.num_classes and source.class_names else None,
        )
        if held_out is not None:
            self.train_indices = torch.arange(len(source))
            self.held_out_indices = torch.arange(len(held_out))
        else:
            order = keyed_permutation(SPLIT_SEED, "split", len(source))
            count = round(held_out_fraction * len(source))
            self.held_out_indices = order[:count].sort().values
            self.train_indices = order[count:].sort().values
            if len(self.train_indices) == 0:
                raise UserError(
                    f"data.held_out_fraction {held_out_fraction} leaves nothing of {count} images to train on"
                )
        self.data_spec = replace(data_spec, class_counts=self.class_counts(held_out=False))
        self._checked = False
        shown = about_shown(self.data_spec.shape[0]) if self.data_spec.is_image else None
        for line in [*source.notes(), *([] if held_out is None else held_out.notes()), *([shown] if shown else [])]:
            print_note(line)

    def class_counts(self, held_out: bool) -> tuple[int, ...] | None:
        """Number of held-out (or training) data in each class; None where they have no labels."""
        labels, indices = (
            (self.held_out_labels, self.held_out_indices) if held_out else (self.labels, self.train_indices)
        )
        if labels is None:
            return None
        return tuple(np.bincount(labels[indices.numpy()], minlength=self.source.num_classes or 0).tolist())

    # ---- loaders -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the batch and the held-out data against the number of processes, which only the Trainer knows.

        Raises:
            UserError: if the global batch cannot be shared equally, or a process would have nothing to evaluate.
        """
        _, processes = self._place
        connector = getattr(self.trainer, "_accelerator_connector", None)
        shares_out = connector is not None and connector.use_distributed_sampler
        if processes > 1 and shares_out:
            raise UserError("give the Trainer use_distributed_sampler=False: the DataModule shares its data out itself")
        if self.global_batch_size % processes != 0:
            raise UserError(
                f"data.global_batch_size {self.global_batch_size} is not a multiple of the "
                f"{processes} processes; choose one that is"
            )
        if stage != "predict" and 0 < len(self.held_out_indices) < processes:
            raise UserError(
                f"data has {len(self.held_out_indices)} held-out images for {processes} processes; hold out "
                f"more, or none"
            )
        if stage == "predict" and self.predict_samples < processes:
            raise UserError(
                f"data.predict_samples is {self.predict_samples}; give at least one for each of the "
                f"{processes} processes"
            )

    @property
    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def rows_at_once(self) -> int:
        """Number of training images per forward pass in a process."""
        share = self.global_batch_size // self._place[1]
        return min(share, self.micro_batch_size or share)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless loader of training batches that starts at the images seen so far."""
        rank, world_size = self._place
        clock = None if self.trainer is None else getattr(self.trainer.lightning_module, "clock", None)
        seen = 0 if clock is None else clock.images
        which = (self.train_indices, self.seed, seen, self.global_batch_size, rank, world_size)
        if clock is None or isinstance(self.trainer, Trainer):
            order = TrainingOrder(*which)
        else:
            order = _Epoch(clock, *which)
        return self._loader(self.source, self.labels, order)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Loader of every held-out image once, strided over the processes; an empty list where none is held out.

        All processes have equally many batches, since a sharded network is evaluated by all or by none: a process that
        has fewer gets one more batch of one padding row.
        """
        numbered = list(enumerate(self.held_out_indices.tolist()))
        if not numbered:
            return []
        batches = self._shared_out(numbered, (PADDING_INDEX, numbered[0][1]))
        return self._loader(self.held_out_source, self.held_out_labels, batches)

    def _shared_out(self, items: list[Any], padding: Any) -> list[list[Any]]:
        """This process's batches, of every world_size-th item; as many as the first process has, padded if need be."""
        rank, world_size = self._place
        size = max(1, self.global_batch_size // world_size)
        mine, most = items[rank::world_size], len(items[::world_size])
        batches = [mine[k : k + size] for k in range(0, len(mine), size)]
        return batches + [[padding]] * (-(-most // size) - len(batches))

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation loader; where nothing is held out one empty batch, so that samples are still evaluated."""
        held_out = self.val_dataloader()
        return held_out if isinstance(held_out, DataLoader) else DataLoader(torch.empty(1, 0))  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loader of the indices of the samples that ``predict`` makes, shared out as the held-out images are."""
        indices = list(range(self.predict_samples + 1))  # The last one pads.
        batches = self._shared_out(indices[:-1], indices[-1])
        return DataLoader([torch.tensor(batch) for batch in batches], batch_size=None)  # type: ignore[arg-type]

    def _loader(self, source: Source, labels: np.ndarray | None, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            _Numbered(source, labels),
            batch_sampler=batches,
            collate_fn=_Numbered.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_it_to_the_main_process,
            pin_memory=torch.cuda.is_available(),
        )

    # ---- normalization -----------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalize on the device; indices of samples to predict pass through."""
        if isinstance(batch, Tensor):
            return batch
        training = self.trainer is not None and self.trainer.training
        return self.prepare(batch["value"], batch["label"], batch["index"], training)

    def prepare(self, value: Tensor, label: Tensor, index: Tensor, training: bool) -> Batch:
        """A normalized batch from a source's values ``[B, ...]``, labels ``[B]`` (-1: none) and numbers ``[B]``."""
        if self.data_spec.is_image:
            self._check(value)
            if training and self.flip:
                mirrored = keyed_uniform(self.seed, "flip", index) < 0.5
                value = torch.where(mirrored[:, None, None, None], value.flip(-1), value)
        x = self.normalize(value, index if self.dequantize and training else None)
        cond = None if self.data_spec.num_classes is None else Condition(label=label)
        return Batch(x, index, cond)

    def normalize(self, value: Tensor, dequantize_index: Tensor | None = None) -> Tensor:
        """Map K grey levels to the value range, float32; points as they are.

        ``low + (high - low) v / (K - 1)``; for a model of dequantized data ``low + (high - low) (v + u) / K``, where u
        is 1/2, the centre of the grey level's bin.

        Args:
            value: uint8 ``[B, C, H, W]`` in ``0 .. K - 1``, or float32 ``[B, D]``.
            dequantize_index: if given, u is uniform in [0, 1), keyed by these numbers ``[B]``.
        """
        if self.data_spec.num_grey_levels is None or self.data_spec.value_range is None:
            return value.to(torch.float32)
        low, high = self.data_spec.value_range
        if not self.data_spec.dequantized:
            unit = value.to(torch.float32) / (self.data_spec.num_grey_levels - 1)
        else:
            u: Tensor | float = 0.5
            if dequantize_index is not None:
                u = keyed_uniform(self.seed, "dequantise", dequantize_index, tuple(value.shape[1:]))
                # Rounded to float32, the ends of a bin may lie in the next one.
                u = u.clamp(BIN_MARGIN, 1.0 - BIN_MARGIN)
            unit = (value.to(torch.float32) + u) / self.data_spec.num_grey_levels
        return low + (high - low) * unit

    def _check(self, value: Tensor) -> None:
        """Require, on the first batch, that the source yields raw grey levels."""
        if self._checked:
            return
        name, num_grey_levels = self.source.name, self.data_spec.num_grey_levels
        assert num_grey_levels is not None
        if value.dtype != torch.uint8:
            raise UserError(
                f"data source {name} yields {value.dtype}, not uint8 grey levels 0..{num_grey_levels - 1}: it was "
                f"normalized already; the DataModule does that once, to value_range "
                f"{list(self.data_spec.value_range or ())}"
            )
        if int(value.max()) > num_grey_levels - 1:
            raise UserError(
                f"data source {name} yields grey level {int(value.max())} but declares grey levels "
                f"0..{num_grey_levels - 1}; correct the source's num_grey_levels"
            )
        self._checked = True

    # ---- single data, for what looks at them before or during training ------------------------------------------

    def training_values(self, indices: Tensor) -> Tensor:
        """Normalized training data at positions ``indices`` of ``train_indices``: float32 ``[B, ...]``."""
        return self._values(self.source, self.train_indices[indices])

    def training_batch(self, indices: Tensor) -> Batch:
        """Batch of training data at positions ``indices`` of ``train_indices`` with their labels, numbered as given."""
        cond = None
        if self.labels is not None:
            cond = Condition(label=torch.from_numpy(self.labels)[self.train_indices[indices]])
        return Batch(self.training_values(indices), indices, cond)

    def held_out_values(self, indices: Tensor) -> Tensor:
        """Normalized held-out data at positions ``indices`` of ``held_out_indices``: float32 ``[B, ...]``."""
        return self._values(self.held_out_source, self.held_out_indices[indices])

    def _values(self, source: Source, indices: Tensor) -> Tensor:
        return self.normalize(torch.from_numpy(np.stack([source.value(int(i)) for i in indices])))
