"""What an evaluation asks of a model; a :class:`~lit_diffusion.methods.base.Method` answers all of it."""

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
    """A model of which samples can be drawn."""

    @property
    def denoiser(self) -> Denoiser:
        """What samplers see."""

    @property
    def sampler(self) -> Sampler:
        """The model's own."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights only, so that all evaluate the network or none does."""

    @property
    def num_classes(self) -> int | None:
        """Classes that samples may have; None for a model that is not class-conditional."""

    def require_data_spec(self) -> DataSpec:
        """What the data of the model are."""

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse a sampler that does not fit."""

    def condition_by_counts(
        self, indices: Tensor, seed: int, class_counts: Sequence[int] | None, label: int | str | None = None
    ) -> Condition | None:
        """The condition of samples, their classes as often as the counts say."""

    def decode(self, z: Tensor, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Data of what a sampler made."""

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
