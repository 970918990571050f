"""Base class of callbacks that draw or measure at intervals, and once at the end of a training."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lit_diffusion.callbacks.checkpoint import save_before
from lit_diffusion.callbacks.ema import averages_of
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.methods.base import Method
from lit_diffusion.runs.clock import Cadence
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.logger import survived
from lit_diffusion.training.callback import Callback, own_callbacks


class PeriodicCallback(Callback, ABC):
    """Draw when the cadence is due and when the training ends, the end only once.

    A failure loses the picture, not the run: it is printed and recorded, event ``failed``, and the next attempt is when
    the next one is due. At the end of the training the run's state is saved before.

    What was due when the run was asked to stop is left out and made when the run is continued, so that a continued run
    has every picture and value of one that never stopped.

    Args:
        cadence: interval in images or steps.
    """

    writes_to_run = True

    name: str
    """Name of what is drawn, which the event ``failed`` records."""

    def __init__(self, cadence: Cadence) -> None:
        self.cadence = cadence
        self._done_at = -1
        """Images seen when it last drew; saved in every checkpoint."""
        self._knows_its_past = False

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return the images seen when it last drew, for a checkpoint."""
        return {"done_at": self._done_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the images seen when it last drew."""
        self._done_at = state_dict["done_at"]
        self._knows_its_past = True

    makes: frozenset[str] = frozenset()
    """Names of the events and pictures that it makes."""

    @classmethod
    def made_again(cls, state: Mapping[str, Any], images: int) -> set[str]:
        """Names of its events and pictures, where they were due and not done when the checkpoint was written."""
        return set(cls.makes) if state.get("done_at", images) != images else set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what a stop cut off."""
        assert isinstance(pl_module, Method)
        clock = pl_module.clock
        averages_of(trainer).start(pl_module)  # Whichever callback comes first in the list.
        if clock.images > 0 and self.cadence.due(clock) and self._is_missing(pl_module):
            self._draw_now(trainer, pl_module)

    def _is_missing(self, method: Method) -> bool:
        """True where what is due at this moment was not drawn before the run stopped here."""
        return self._knows_its_past and self._done_at < method.clock.images

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when the cadence is due."""
        assert isinstance(pl_module, Method)
        if self.cadence.due(pl_module.clock):
            self._draw_now(trainer, pl_module)

    def _draw_now(self, trainer: pl.Trainer, method: Method) -> None:
        if method.interrupted or not self.wanted(trainer, method):
            return
        began = time.perf_counter()
        try:
            with survived(trainer, self.name):
                self.draw(trainer, method)
            self._done_at = method.clock.images
        except Interrupted as stop:
            print_note(f"{stop}; it is made when the run is continued")
            method.interrupted = True
        seconds = time.perf_counter() - began
        method.stopwatch.exclude(seconds)
        for callback in own_callbacks(trainer):  # They measure the training's speed.
            callback.exclude(seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw at the end of the training."""
        assert isinstance(pl_module, Method)
        if self._done_at == pl_module.clock.images or pl_module.interrupted or not self.wanted(trainer, pl_module):
            return
        save_before(trainer, pl_module)
        self._draw_now(trainer, pl_module)

    def wanted(self, trainer: pl.Trainer, method: Method) -> bool:
        """True where there is anything to draw."""
        return True

    @abstractmethod
    def draw(self, trainer: pl.Trainer, method: Method) -> None:
        """Measure, save the picture and record its values; a collective call.

        Raises:
            Interrupted: if the run was asked to stop meanwhile; on all processes or on none.
        """
