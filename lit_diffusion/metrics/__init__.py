"""How good generated data are: distances, scores and shares, each with the protocol that it was made by.

Free of Lightning: :class:`Scores` is all that the evaluating callback and the command ``evaluate`` use.
"""

from lit_diffusion.metrics.bootstrap import bootstrap_interval
from lit_diffusion.metrics.clip_score import CLIPScore
from lit_diffusion.metrics.extractors import Extractor, ExtractorName, Features, load_extractor
from lit_diffusion.metrics.frechet import (
    FrechetDistance,
    Gaussian,
    Moments,
    frechet_distance,
    frechet_infinity,
    gaussian_of,
)
from lit_diffusion.metrics.inception_score import InceptionScore
from lit_diffusion.metrics.kernel import KernelDistance
from lit_diffusion.metrics.manifolds import ManifoldMetrics
from lit_diffusion.metrics.memorisation import Memorisation
from lit_diffusion.metrics.neighbours import Neighbourhood
from lit_diffusion.metrics.reference import RealData, Reference, reference_of
from lit_diffusion.metrics.scores import MetricName, Result, ScoreOptions, Scores

__all__ = [
    "CLIPScore",
    "Extractor",
    "ExtractorName",
    "Features",
    "FrechetDistance",
    "Gaussian",
    "InceptionScore",
    "KernelDistance",
    "ManifoldMetrics",
    "Memorisation",
    "MetricName",
    "Moments",
    "Neighbourhood",
    "RealData",
    "Reference",
    "Result",
    "ScoreOptions",
    "Scores",
    "bootstrap_interval",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_of",
    "load_extractor",
    "reference_of",
]
