"""Denoisers: what a network's output means, and what can be read from it."""

from lit_diffusion.denoisers.base import (
    Denoiser,
    EndPoint,
    InterpolatedVariance,
    Prediction,
    ReverseLogVariance,
    WrappedDenoiser,
)
from lit_diffusion.denoisers.clipping import ClipX0, clip_in_words, clip_range, clipped, require_clip
from lit_diffusion.denoisers.network import InputScale, NetworkDenoiser
from lit_diffusion.denoisers.other_process import OtherProcess
from lit_diffusion.denoisers.parametrizations import NOISE_INPUTS, PARAMETRIZATIONS, NoiseInput, Parametrization

__all__ = [
    "NOISE_INPUTS",
    "PARAMETRIZATIONS",
    "ClipX0",
    "Denoiser",
    "EndPoint",
    "InputScale",
    "InterpolatedVariance",
    "NetworkDenoiser",
    "NoiseInput",
    "OtherProcess",
    "Parametrization",
    "Prediction",
    "ReverseLogVariance",
    "WrappedDenoiser",
    "clip_in_words",
    "clip_range",
    "clipped",
    "require_clip",
]
