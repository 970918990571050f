"""The interface of a model in evaluations; every :class:`~lit_diffusion.methods.base.Method` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import DataSpec
from lit_diffusion.denoisers import Denoiser, Guidance
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import OnStep, Sampler, Samples


class GenerativeModel(Protocol):
    """A model from which samples can be drawn."""

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that samplers evaluate."""

    @property
    def sampler(self) -> Sampler:
        """The default sampler."""

    @property
    def device(self) -> torch.device:
        """The device of the model."""

    @property
    def sharded(self) -> bool:
        """True where each process has a shard of the weights, so that all must evaluate the network together."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes that samples may have; None for a model that is not class-conditional."""

    def require_data_spec(self) -> DataSpec:
        """The spec of the model's data."""

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse a sampler that does not fit the model."""

    def condition_by_counts(
        self, indices: Tensor, seed: int, class_counts: Sequence[int] | None, label: int | str | None = None
    ) -> Condition | None:
        """The condition of samples with classes in proportion to the counts."""

    def decode(self, z: Tensor, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Decode a sampler's output to data."""

    def generate(
        self,
        indices: Tensor,
        seed: int,
        cond: Condition | None = None,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
        guidance: Guidance | None = None,
    ) -> Samples:
        """Samples number ``indices`` of a seed, in data space."""
