"""Objectives: the losses that training minimizes, and the laws of t."""

from lit_diffusion.objectives.base import Loss
from lit_diffusion.objectives.coupling import OptimalTransport
from lit_diffusion.objectives.denoising import DenoisingScoreMatching
from lit_diffusion.objectives.diffusion import DiffusionObjective
from lit_diffusion.objectives.laws import (
    Importance,
    Levels,
    LogitNormal,
    LogNormal,
    LogUniform,
    SecondMoments,
    TimeLaw,
    Uniform,
)
from lit_diffusion.objectives.objective import Objective

__all__ = [
    "DenoisingScoreMatching",
    "DiffusionObjective",
    "Importance",
    "Levels",
    "LogNormal",
    "LogUniform",
    "LogitNormal",
    "Loss",
    "Objective",
    "OptimalTransport",
    "SecondMoments",
    "TimeLaw",
    "Uniform",
]
