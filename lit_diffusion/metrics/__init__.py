"""Metrics of generated data: distances, scores and shares, each with its protocol.

Free of Lightning. :mod:`lit_diffusion.metrics.catalogue` lists all metrics.
"""

from lit_diffusion.metrics.base import Context, Pair, SampleMetric, ScoreOptions, Seen, Subject, Value
from lit_diffusion.metrics.bootstrap import bootstrap_interval
from lit_diffusion.metrics.choice import Choice, choose_metrics
from lit_diffusion.metrics.clip_score import CLIPScore
from lit_diffusion.metrics.extractors import Extractor, ExtractorName, Features, load_extractor
from lit_diffusion.metrics.frechet import FrechetDistance, FrechetInfinity, frechet_distance, frechet_infinity
from lit_diffusion.metrics.gaussian import Gaussian, Moments, gaussian_of
from lit_diffusion.metrics.inception_score import InceptionScore
from lit_diffusion.metrics.kernel import KernelDistance
from lit_diffusion.metrics.manifolds import ManifoldMetrics
from lit_diffusion.metrics.memorisation import Memorisation
from lit_diffusion.metrics.neighbours import Neighbourhood
from lit_diffusion.metrics.reference import RealData, Reference, reference_of
from lit_diffusion.metrics.scores import Result, Scores

__all__ = [
    "CLIPScore",
    "Choice",
    "Context",
    "Extractor",
    "ExtractorName",
    "Features",
    "FrechetDistance",
    "FrechetInfinity",
    "Gaussian",
    "InceptionScore",
    "KernelDistance",
    "ManifoldMetrics",
    "Memorisation",
    "Moments",
    "Neighbourhood",
    "Pair",
    "RealData",
    "Reference",
    "Result",
    "SampleMetric",
    "ScoreOptions",
    "Scores",
    "Seen",
    "Subject",
    "Value",
    "bootstrap_interval",
    "choose_metrics",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_of",
    "load_extractor",
    "reference_of",
]
