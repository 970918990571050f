"""The loss of a batch, as every objective returns it and the training step takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """The loss of each datum of a batch, with its times, its logged terms and its kept tensors.

    Attributes:
        per_sample: ``[B]``, float32; its mean over the global batch is minimized.
        t: the time to which each datum is noised, float64 ``[B]``; None for a loss without noise level (a classifier's,
            an autoencoder's, an energy's contrast).
        unweighted: ``[B]``, ``per_sample`` without the importance weight of an uneven law of t; None where there is no
            such weight.
        terms: named parts of the loss, ``[B]`` each, logged as ``train/<name>``.
        kept: named tensors ``[B, ...]`` for the method's ``after_step``, which receives those of the whole global batch
            in its order.
    """

    per_sample: Tensor
    t: Tensor | None = None
    unweighted: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shown(self) -> Tensor:
        """The loss of each datum at its own noise level, for plots: ``[B]``, without gradient."""
        return (self.per_sample if self.unweighted is None else self.unweighted).detach()

    @classmethod
    def joined(cls, parts: Sequence[Loss]) -> Loss:
        """The losses of consecutive parts of a batch as one, without gradient."""
        first = parts[0]
        return cls(
            torch.cat([part.per_sample.detach() for part in parts]),
            None if first.t is None else torch.cat([part.t for part in parts if part.t is not None]),
            None if first.unweighted is None else torch.cat([part.shown for part in parts]),
            {name: torch.cat([part.terms[name].detach() for part in parts]) for name in first.terms},
            {name: torch.cat([part.kept[name].detach() for part in parts]) for name in first.kept},
        )
