"""Callbacks beside the training step: averages, checkpoints, pictures, telemetry, metrics."""

from lit_diffusion.callbacks.checkpoint import Checkpoint
from lit_diffusion.callbacks.ema import EMA
from lit_diffusion.callbacks.evaluator import Evaluator
from lit_diffusion.callbacks.likelihood import Likelihood
from lit_diffusion.callbacks.noise_levels import NoiseLevels
from lit_diffusion.callbacks.progress import ProgressBar, Telemetry
from lit_diffusion.callbacks.samples import Samples
from lit_diffusion.callbacks.score_figures import ModeWeights, ScoreField

__all__ = [
    "EMA",
    "Checkpoint",
    "Evaluator",
    "Likelihood",
    "ModeWeights",
    "NoiseLevels",
    "ProgressBar",
    "Samples",
    "ScoreField",
    "Telemetry",
]
