"""Feature extractors: the networks in whose features samples and data are compared."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from lit_diffusion.errors import require_choice
from lit_diffusion.metrics.extractors.base import Extractor, ExtractorName, Features, full_precision
from lit_diffusion.metrics.extractors.clip import CLIP
from lit_diffusion.metrics.extractors.digits import DigitsFeatures
from lit_diffusion.metrics.extractors.dinov2 import DINOv2
from lit_diffusion.metrics.extractors.inception import Inception
from lit_diffusion.metrics.extractors.points import Points
from lit_diffusion.metrics.extractors.vgg import VGG16

__all__ = [
    "CLIP",
    "VGG16",
    "DINOv2",
    "DigitsFeatures",
    "Extractor",
    "ExtractorName",
    "Features",
    "Inception",
    "Points",
    "default_extractor",
    "full_precision",
    "load_extractor",
]


def default_extractor(shape: tuple[int, ...]) -> ExtractorName:
    """The default extractor for data of a shape: ``digits`` for 8 x 8 grey images, ``points``, else ``inception``."""
    if len(shape) == 1:
        return "points"
    return "digits" if tuple(shape) == (1, 8, 8) else "inception"


def load_extractor(name: ExtractorName, shape: tuple[int, ...], weights_path: str | Path | None = None) -> Extractor:
    """The extractor of a name, for data of a shape.

    Raises:
        UserError: if its weights are missing or damaged, or the data do not fit.
    """
    require_choice("", "extractor", name, get_args(ExtractorName))
    classes: dict[str, type[Inception | DINOv2 | CLIP | VGG16 | DigitsFeatures]] = {
        "inception": Inception,
        "dinov2": DINOv2,
        "clip": CLIP,
        "vgg16": VGG16,
        "digits": DigitsFeatures,
    }
    # Before looking for the weights: no file would help.
    (Points if name == "points" else classes[name]).require_fit(shape)
    return Points(shape[0]) if name == "points" else classes[name](weights_path)
