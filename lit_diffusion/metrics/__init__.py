"""Distances between generated and real data."""

from lit_diffusion.metrics.frechet import Moments, frechet_distance

__all__ = ["Moments", "frechet_distance"]
