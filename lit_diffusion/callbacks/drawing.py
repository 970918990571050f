"""What draws during a training: every so often, and once at its end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl

from lit_diffusion.clock import Cadence
from lit_diffusion.methods.base import Method
from lit_diffusion.trainer import callbacks_of


class Drawing(pl.Callback, ABC):
    """Draws when its cadence is due and when the training ends, the end only once.

    Args:
        cadence: how often.
    """

    def __init__(self, cadence: Cadence) -> None:
        self.cadence = cadence
        self._drawn_at = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when due."""
        assert isinstance(pl_module, Method)
        if self.cadence.due(pl_module.clock):
            self._draw_now(trainer, pl_module)

    def _draw_now(self, trainer: pl.Trainer, method: Method) -> None:
        self._drawn_at = method.clock.images
        began = time.perf_counter()
        self.draw(trainer, method)
        seconds = time.perf_counter() - began
        for callback in callbacks_of(trainer):
            if hasattr(callback, "exclude"):  # What measures the training's speed does not count this.
                callback.exclude(seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the end."""
        assert isinstance(pl_module, Method)
        if self._drawn_at != pl_module.clock.images:
            self._draw_now(trainer, pl_module)

    @abstractmethod
    def draw(self, trainer: pl.Trainer, method: Method) -> None:
        """Measure, save the picture and record its numbers."""
