"""What training minimises."""

from lit_diffusion.objectives.denoising import DenoisingLoss, DenoisingScoreMatching
from lit_diffusion.objectives.diffusion import DiffusionObjective, SecondMoments

__all__ = ["DenoisingLoss", "DenoisingScoreMatching", "DiffusionObjective", "SecondMoments"]
