"""What training minimises."""

from lit_diffusion.objectives.base import Loss
from lit_diffusion.objectives.denoising import DenoisingScoreMatching
from lit_diffusion.objectives.diffusion import DiffusionObjective, SecondMoments

__all__ = ["DenoisingScoreMatching", "DiffusionObjective", "Loss", "SecondMoments"]
