"""What training minimises."""

from lit_diffusion.objectives.denoising import DenoisingLoss, DenoisingScoreMatching

__all__ = ["DenoisingLoss", "DenoisingScoreMatching"]
