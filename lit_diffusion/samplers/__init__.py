"""Samplers, and the one table of their short names."""

from lit_diffusion.samplers.base import Progress, Sampler
from lit_diffusion.samplers.langevin import AnnealedLangevin, Langevin

SAMPLERS: dict[str, type[Sampler]] = {
    "annealed_langevin": AnnealedLangevin,
    "langevin": Langevin,
}
"""Short names for the command line: ``sample --sampler langevin --sampler.steps 500``."""

__all__ = ["SAMPLERS", "AnnealedLangevin", "Langevin", "Progress", "Sampler"]
