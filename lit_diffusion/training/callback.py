"""What a callback of this package is: Lightning's, with two hooks of our own."""

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
    """Whether it writes into the run's directory: without a RunLogger there is nothing to do."""

    def after_step(self, module: TrainedModule) -> None:
        """Follow a step that changed the weights; no hook of Lightning's sees it before."""

    @classmethod
    def made_again(cls, state: Mapping[str, Any], images: int) -> set[str]:
        """Events, and names of pictures, that a continued run makes again at the moment of its checkpoint.

        Args:
            state: of the callback in that checkpoint; empty where it has none.
            images: seen by the checkpoint.
        """
        return set()

    def exclude(self, seconds: float) -> None:
        """Do not count what was no training: drawing, evaluating."""


def own_callbacks(trainer: pl.Trainer) -> Iterator[Callback]:
    """Those of a Trainer's callbacks that are of this package, in their order."""
    return (callback for callback in callbacks_of(trainer) if isinstance(callback, Callback))
