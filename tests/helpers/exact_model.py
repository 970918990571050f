"""A model with a known density, which is no Lightning module and has never seen a Trainer."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import torch

from lit_diffusion.data_spec import DataSpec
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.processes import VP
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import Ancestral

FACTOR = torch.tensor([[0.6, 0.0], [0.3, 0.4]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(torch.ones(1), torch.tensor([[0.5, -0.2]]), (FACTOR @ FACTOR.T)[None])
Encoded = namedtuple("Encoded", "z nats")


class ExactModel:
    """Points of a Gaussian in the plane, by the best denoiser that there is.

    Args:
        scale: the data are what is diffused times this, so that the encoder has a price.
    """

    device, sharded, num_classes = torch.device("cpu"), False, None
    encodes_grey_levels, grey_levels, sample_shape = False, None, (2,)

    def __init__(self, scale=1.0):
        self.scale = scale
        self.denoiser = ExactDenoiser(GAUSSIAN, VP())
        self.sampler = Ancestral(steps=20)
        self.drawn = []

    @property
    def diffuses_data(self):
        return self.scale == 1.0

    def require_data_spec(self):
        return DataSpec("points", (2,), num_grey_levels=None, value_range=None, num_classes=None)

    def check_sampler(self, sampler):
        sampler.check(self.denoiser)

    def condition_by_counts(self, indices, seed, class_counts, label=None):
        return None

    def encode(self, x, noise):
        return Encoded(x / self.scale, x.new_full((len(x),), 2 * torch.tensor(self.scale).log().item()))

    def decode(self, z, noise, cond):
        return z * self.scale

    def generate(self, indices, seed, cond=None, sampler=None, on_step=None, guidance=None):
        self.drawn += indices.tolist()
        noise = SampleNoise(seed, indices, (2,))
        made = (sampler or self.sampler).sample(
            guidance(self.denoiser) if guidance else self.denoiser, noise, cond, on_step
        )
        return replace(made, x=made.x * self.scale)
