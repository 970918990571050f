"""What happens beside a training step: averages, checkpoints, pictures, telemetry."""

from lit_diffusion.callbacks.checkpoint import Checkpoint
from lit_diffusion.callbacks.ema import EMA
from lit_diffusion.callbacks.progress import ProgressBar, Telemetry
from lit_diffusion.callbacks.samples import Samples
from lit_diffusion.callbacks.toys import ModeWeights, ScoreField

__all__ = ["EMA", "Checkpoint", "ModeWeights", "ProgressBar", "Samples", "ScoreField", "Telemetry"]
