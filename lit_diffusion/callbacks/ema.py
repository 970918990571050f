r"""Exponential moving averages of the weights, several at once.

.. math::  \bar\theta \leftarrow \theta + d\,(\bar\theta - \theta), \qquad d = 2^{-B / \min(H,\; r N)}

with half-life H in images, B images a step, N images seen: the average starts with the run and grows with it, at most
half of it older than a fraction r of the run (the "ramp-up" of EDM's code; Karras et al. 2022,
https://arxiv.org/abs/2206.00364). Only parameters are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.runs.clock import in_images
from lit_diffusion.runs.console import print_note
from lit_diffusion.training.callback import Callback
from lit_diffusion.training.module import TrainedModule
from lit_diffusion.training.sharding import distribute_like, full_tensor, to_local
from lit_diffusion.training.trainer import callbacks_of


def named_averages(half_lives: list[int]) -> list[str]:
    """The names ``ema:<half-life>`` of averages."""
    return [f"ema:{half_life}" for half_life in half_lives]


def choose_average(half_lives: list[int], weights: str) -> int | None:
    """The position among the half-lives of the average that ``weights`` names (``ema``: the first); None for ``raw``.

    Raises:
        UserError: for weights that are not kept.
    """
    if weights == "raw":
        return None
    if weights == "ema" and half_lives:
        return 0
    match = re.fullmatch(r"ema:(\d+)", weights)
    if match and int(match[1]) in half_lives:
        return half_lives.index(int(match[1]))
    known = ["raw", *(["ema"] if half_lives else []), *named_averages(half_lives)]
    raise UserError(f"weights {weights!r} are not kept; choose one of {', '.join(known)}")


class EMA(Callback):
    r"""Exponential moving averages of the trained parameters, kept beside the raw weights in every checkpoint.

    After each step of B images, at N images seen,

    .. math::  \bar\theta \leftarrow \theta + 2^{-B / \min(H,\; r N)}\,(\bar\theta - \theta).

    Args:
        half_lives_images: half-lives H in images seen; the first is the one that ``ema`` names.
        half_lives_steps: half-lives in steps, in place of ``half_lives_images``. Both null: no average.
        ramp: the fraction r in (0, 1]: at most half of an average is older than this fraction of the run so far.

    Raises:
        UserError: for a half-life that is not positive, both kinds of half-lives, or a ramp outside (0, 1].
    """

    state_key = "EMA"

    def __init__(
        self,
        half_lives_images: list[int] | None = None,
        half_lives_steps: list[int] | None = None,
        ramp: float = 0.1,
    ) -> None:
        for key, values in (("half_lives_images", half_lives_images), ("half_lives_steps", half_lives_steps)):
            if any(value < 1 for value in values or []):
                raise UserError(f"ema.{key} is {values}; half-lives must be positive")
        if half_lives_images is not None and half_lives_steps is not None:
            raise UserError("ema: give half_lives_images or half_lives_steps, not both (set the other to null)")
        if not 0.0 < ramp <= 1.0:
            raise UserError(f"ema.ramp is {ramp}; it is a fraction of the run, above 0 and at most 1")
        self._given = (half_lives_images, half_lives_steps)
        self.ramp = ramp
        self.half_lives: list[int] = list(half_lives_images or [])
        self.updates = 0
        self.shadows: list[dict[str, Tensor]] = []
        self._raw: list[Tensor] | None = None
        """The raw weights, while the module holds others."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert half-lives in steps to images."""
        assert isinstance(pl_module, TrainedModule)
        images, steps = self._given
        if images is None and steps is not None:
            # doctor, whose Trainer runs nothing, has no state.
            if getattr(trainer, "datamodule", None) is None and trainer.state.fn is not None:
                raise UserError(
                    "ema.half_lives_steps: the batch size of your own DataLoader is not known; give half_lives_images"
                )
            # The module learns its batch from the data only after the callbacks are set up.
            batch = getattr(getattr(trainer, "datamodule", None), "global_batch_size", pl_module.clock.batch)
            self.half_lives = [in_images("ema", "half_life", None, n, batch) for n in steps]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the averages, unless a callback that needs them did so before."""
        assert isinstance(pl_module, TrainedModule)
        self.start(pl_module)

    def start(self, module: TrainedModule) -> None:
        """Start each average at the weights, on their device, unless a checkpoint brought it.

        Called when the training starts, not earlier: sharded weights take a checkpoint's values only after
        ``on_fit_start``. A second call changes nothing.
        """
        parameters = module.averaged()
        if not self.shadows:
            self.shadows = [{} for _ in self.half_lives]
        missing = [half_life for half_life, shadow in zip(self.half_lives, self.shadows, strict=True) if not shadow]
        if missing and module.clock.images > 0:
            print_note(
                f"ema: the checkpoint has no average of half-life {missing} images; it starts at its raw weights"
            )
        # In the order of the parameters, not the file's: they are averaged side by side.
        self.shadows = [
            {
                name: distribute_like(shadow[name], p) if name in shadow else p.detach().clone()
                for name, p in parameters.items()
            }
            for shadow in self.shadows
        ]

    def after_step(self, module: TrainedModule) -> None:
        """Average in the weights of the step that was just made."""
        parameters = [to_local(p.detach()) for p in module.averaged().values()]
        for half_life, shadow in zip(self.half_lives, self.shadows, strict=True):
            length = min(half_life, self.ramp * module.clock.images)
            decay = 0.5 ** (module.clock.batch / length)
            torch._foreach_lerp_([to_local(value) for value in shadow.values()], parameters, 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, module: TrainedModule, weights: str) -> Iterator[None]:
        """Context in which the module has the named weights; those it had before are restored, bit for bit.

        Contexts nest: the inner one has the weights that it names, ``raw`` too.

        Raises:
            UserError: for weights that are not kept, or not in the checkpoint.
        """
        position = choose_average(self.half_lives, weights)
        if position is None and self._raw is None:
            yield
            return
        if position is not None and (not self.shadows or not self.shadows[position]):
            raise UserError(f"weights {weights!r} are not in this checkpoint; choose raw")
        parameters = [to_local(p.detach()) for p in module.averaged().values()]
        before, outer = [p.clone() for p in parameters], self._raw
        self._raw = before if outer is None else outer
        given = self._raw
        if position is not None:
            shadow = self.shadows[position]
            given = [to_local(distribute_like(shadow[name], p)) for name, p in module.averaged().items()]
        torch._foreach_copy_(parameters, given)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, before)
            self._raw = outer

    def kept(self, weights: str) -> str:
        """The name of the weights to use: ``weights``, but ``raw`` for ``ema`` where no average is kept."""
        return weights if weights != "ema" or self.half_lives else "raw"

    def state_dict(self) -> dict[str, Any]:
        """Return the averages for a checkpoint; a collective call where weights are sharded."""
        shadows = [{name: full_tensor(value) for name, value in shadow.items()} for shadow in self.shadows]
        return {"half_lives": list(self.half_lives), "updates": self.updates, "shadows": shadows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's averages of the half-lives that are configured; others start at its raw weights."""
        by_half_life = dict(zip(state_dict["half_lives"], state_dict["shadows"], strict=True))
        self.shadows = [dict(by_half_life.get(half_life, {})) for half_life in self.half_lives]
        self.updates = state_dict["updates"]


def averages_of(trainer: pl.Trainer) -> EMA:
    """The Trainer's EMA callback, or one that keeps no average."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, EMA)), EMA())


def load_average(module: TrainedModule, state: Mapping[str, Any] | None, weights: str) -> None:
    """Copy the named weights of a checkpoint's EMA state into a module.

    Raises:
        UserError: if the checkpoint does not keep them, or they are another model's.
    """
    half_lives = list(state["half_lives"]) if state else []
    position = choose_average(half_lives, weights)
    if position is None or state is None:
        return
    shadow, parameters = state["shadows"][position], module.averaged()
    if unlike := sorted(shadow.keys() ^ parameters.keys()):
        raise UserError(f"weights {weights!r} are of another model: {unlike[0]} is not in both; choose raw")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(shadow[name])
