"""The base class of this package's callbacks: Lightning's, with three hooks of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lit_diffusion.training.trainer import callbacks_of

if TYPE_CHECKING:
    from lit_diffusion.training.module import TrainedModule


class Callback(pl.Callback):
    """A callback of a :class:`~lit_diffusion.training.module.TrainedModule`."""

    writes_to_run = False
    """True for a callback that writes into the run's directory, and has nothing to do without a RunLogger."""

    def after_step(self, module: TrainedModule) -> None:
        """React to a step that changed the weights, before any hook of Lightning's sees the step."""

    @classmethod
    def made_again(cls, state: Mapping[str, Any], images: int) -> set[str]:
        """Names of the events and pictures that a continued run makes again at the moment of its checkpoint.

        Args:
            state: the callback's state in that checkpoint; empty where it has none.
            images: images seen at the checkpoint.
        """
        return set()

    def exclude(self, seconds: float) -> None:
        """Leave ``seconds`` spent on drawing or evaluating out of the training time."""


def own_callbacks(trainer: pl.Trainer) -> Iterator[Callback]:
    """The Trainer's callbacks that derive from this package's :class:`Callback`, in their order."""
    return (callback for callback in callbacks_of(trainer) if isinstance(callback, Callback))
