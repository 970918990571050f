"""Conditions of samples: labels, vectors, tokens, images and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -1
"""The label of a row without a class: a network maps it to the row of its table for "no label"."""


@dataclass(frozen=True)
class Condition:
    """The condition of each row of a batch; fields that a model does not use are None.

    Attributes:
        label: class indices, int64 ``[B]``; :data:`NO_LABEL` for none.
        vector: a code, such as an encoder's, ``[B, D]``; gradients flow through it.
        tokens: a sequence, such as a text encoder's, ``[B, N, D]``.
        image: an image of the same size as the sample, ``[B, C, H, W]``.
        mask: 1 where :attr:`image` is given, else 0, ``[B, 1, H, W]``.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """This condition with f applied to every field that is given."""
        return Condition(**{name: f(value) for name, value in self.given().items()})

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return self.map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Condition:
        """This condition on a device."""
        return self.map(lambda value: value.to(device))

    def dropped(self, rows: Tensor) -> Condition:
        """This condition with some rows unconditional, for training with classifier-free guidance.

        The label of these rows is :data:`NO_LABEL` and their other fields are 0 (Ho and Salimans 2022, "Classifier-free
        diffusion guidance", https://arxiv.org/abs/2207.12598, algorithm 1).

        Args:
            rows: bool ``[B]``, True for rows that lose their condition.
        """

        kept = {}
        for name, value in self.given().items():
            wide = rows.view(-1, *[1] * (value.ndim - 1))
            kept[name] = value.masked_fill(wide, NO_LABEL if name == "label" else 0)
        return Condition(**kept)
