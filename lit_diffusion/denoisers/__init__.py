"""Denoisers: the meaning of a network's output, and the predictions read from it."""

from lit_diffusion.denoisers.base import (
    Denoiser,
    EndPoint,
    InterpolatedVariance,
    Prediction,
    ReverseLogVariance,
    WrappedDenoiser,
)
from lit_diffusion.denoisers.clipping import ClipX0, clip_range, clipped, describe_clip, require_clip
from lit_diffusion.denoisers.guidance import Guidance
from lit_diffusion.denoisers.network import CIn, NetworkDenoiser
from lit_diffusion.denoisers.other_process import OtherProcess
from lit_diffusion.denoisers.parametrizations import C_NOISE, PARAMETRIZATIONS, CNoise, Parametrization

__all__ = [
    "C_NOISE",
    "PARAMETRIZATIONS",
    "CIn",
    "CNoise",
    "ClipX0",
    "Denoiser",
    "EndPoint",
    "Guidance",
    "InterpolatedVariance",
    "NetworkDenoiser",
    "OtherProcess",
    "Parametrization",
    "Prediction",
    "ReverseLogVariance",
    "WrappedDenoiser",
    "clip_range",
    "clipped",
    "describe_clip",
    "require_clip",
]
