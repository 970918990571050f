"""What happens beside a training step: averages, checkpoints, pictures, telemetry, evaluation."""

from lit_diffusion.callbacks.checkpoint import Checkpoint
from lit_diffusion.callbacks.ema import EMA
from lit_diffusion.callbacks.evaluation import Evaluation
from lit_diffusion.callbacks.noise_levels import NoiseLevels
from lit_diffusion.callbacks.progress import ProgressBar, Telemetry
from lit_diffusion.callbacks.samples import Samples
from lit_diffusion.callbacks.toys import ModeWeights, ScoreField

__all__ = [
    "EMA",
    "Checkpoint",
    "Evaluation",
    "ModeWeights",
    "NoiseLevels",
    "ProgressBar",
    "Samples",
    "ScoreField",
    "Telemetry",
]
