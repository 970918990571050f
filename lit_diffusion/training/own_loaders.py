"""Training from the user's own DataLoader, with lit_diffusion's Trainer or Lightning's.

A batch is images, or (images, labels): float in the declared range, ``[0, 1]`` unless ``method.data_spec`` says another
(torchvision's ``ToTensor`` gives that), or uint8 grey levels, which are mapped to the range. Points are float. The
images of a run are numbered by its clock, so that their noise is a function of (seed, number) whatever the batch size;
the loader alone decides which image comes when, and how exactly a run can be continued.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.errors import UserError
from lit_diffusion.training.datamodule import Batch
from lit_diffusion.training.trainer import Trainer

OUT_OF_RANGE = 1e-3
"""The distance outside the value range that rounding may put a value at, as a fraction of the range's width."""


def assumed_data_spec(backbone: Backbone) -> DataSpec:
    """Default data spec: the backbone's shape and classes; for images values in ``[0, 1]``, 256 grey levels."""
    shape = tuple(backbone.data_shape)
    image = len(shape) == 3
    return DataSpec(
        source="DataLoader",
        shape=shape,
        num_grey_levels=256 if image else None,
        value_range=(0.0, 1.0) if image else None,
        num_classes=backbone.num_classes,
    )


def require_fitting_trainer(trainer: pl.Trainer) -> None:
    """Refuse settings of Lightning's own Trainer that would change numbers, and let its evaluation take gradients.

    Raises:
        UserError: for a precision other than ``32-true``, or a sharded strategy.
    """
    if isinstance(trainer, Trainer):
        return
    if trainer.precision != "32-true":
        raise UserError(
            f"precision is {trainer.precision}: Lightning's own Trainer would compute noise levels and losses in it, "
            f"too; give 32-true, or take lit_diffusion.training.trainer.Trainer, which applies it to the backbone alone"
        )
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError("sharded strategies need lit_diffusion.training.trainer.Trainer(strategy='fsdp')")
    loops = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop, trainer.fit_loop.epoch_loop.val_loop)
    for loop in loops:
        loop.inference_mode = False  # Samplers and likelihoods take gradients.


def indices_to_predict(batch: Any) -> Tensor:
    """The numbers ``[B]`` of the samples that ``predict`` is to make.

    Raises:
        UserError: if the loader gives anything else.
    """
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor) and batch.dim() == 1 and batch.dtype == torch.int64:
        return batch
    raise UserError(
        "predict takes the numbers of the samples to make: trainer.predict(method, DataLoader(torch.arange(64), 16))"
    )


def batch_of(given: Any, data_spec: DataSpec, classes: int | None, check: bool) -> Batch:
    """Convert a loader's batch to a :class:`Batch`, its rows numbered from 0.

    Args:
        given: images or points ``[B, *shape]``, alone or with labels ``[B]``.
        data_spec: shape, value range and grey levels of the data.
        classes: the backbone's number of classes; None: it is unconditional, and labels are ignored.
        check: if true, check the values, too; shapes and labels are always checked.

    Raises:
        UserError: for a wrong structure, shape, type, value or label, with what to give.
    """
    parts = list(given) if isinstance(given, list | tuple) else [given]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        keys = f" with the keys {', '.join(map(str, given))}" if isinstance(given, dict) else ""
        raise UserError(
            f"the DataLoader gives a {type(given).__name__}{keys}; give batches of images, or of (images, labels), as "
            f"tensors: collate_fn=lambda items: ..."
        )
    x = parts[0]
    if tuple(x.shape[1:]) != tuple(data_spec.shape):
        raise UserError(
            f"the DataLoader gives a batch of shape {list(x.shape)}; the model takes [B, "
            f"{', '.join(map(str, data_spec.shape))}]"
        )
    return Batch(_values(x, data_spec, check), torch.arange(len(x), device=x.device), _labels(parts, classes))


def _values(x: Tensor, data_spec: DataSpec, check: bool) -> Tensor:
    if data_spec.value_range is None or data_spec.num_grey_levels is None:
        return x.float()
    low, high = data_spec.value_range
    if x.dtype == torch.uint8:
        if check and int(x.max()) >= data_spec.num_grey_levels:
            raise UserError(
                f"the DataLoader gives grey level {int(x.max())}, and method.data_spec says "
                f"{data_spec.num_grey_levels} grey levels: correct one of them"
            )
        if data_spec.dequantized:
            raise UserError("grey levels are dequantized by lit_diffusion's DataModule alone: give floats, or take it")
        return low + (high - low) * (x.float() / (data_spec.num_grey_levels - 1))
    if not x.is_floating_point():
        raise UserError(f"the DataLoader gives {x.dtype}; give floats in [{low:g}, {high:g}], or uint8 grey levels")
    if check:
        least, most = x.min().item(), x.max().item()
        edge = OUT_OF_RANGE * (high - low)
        if not (low - edge <= least and most <= high + edge):
            raise UserError(
                f"the DataLoader gives values from {least:.4g} to {most:.4g}, not in [{low:g}, {high:g}]: scale them, "
                f"or set their range first: method.data_spec = DataSpec(source=..., shape=..., num_grey_levels=256, "
                f"value_range=(-1.0, 1.0), num_classes=...)"
            )
    return x.float()


def _labels(parts: list[Tensor], classes: int | None) -> Condition | None:
    if classes is None:
        return None
    if len(parts) == 1:
        raise UserError(
            f"the backbone has {classes} classes and the DataLoader gives no labels: give batches of (images, labels), "
            f"or a backbone with num_classes None"
        )
    label = parts[1]
    if label.shape != parts[0].shape[:1] or label.is_floating_point():
        raise UserError(
            f"the DataLoader gives labels of shape {list(label.shape)}, {label.dtype}; give class numbers [B], int64"
        )
    # Checked in every batch: the row after the last class is the embedding of no class.
    if not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise UserError(
            f"the DataLoader gives labels from {int(label.min())} to {int(label.max())}; the backbone's classes are 0 "
            f"to {classes - 1}: give it num_classes={max(int(label.max()) + 1, classes)}, or other labels"
        )
    return Condition(label=label.long())
