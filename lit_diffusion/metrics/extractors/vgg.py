"""VGG-16, the features in which precision and recall were introduced."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.metrics.extractors.base import FidelityExtractor, readable, require_plain_weights
from lit_diffusion.metrics.weights import find_weights


class VGG16(FidelityExtractor):
    """VGG-16's second fully connected layer, the features of the original precision and recall.

    Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Args:
        weights_path: path of the weights; None for the fetched ones.

    Raises:
        UserError: for missing or damaged weights.
    """

    name = "vgg16"
    model = "vgg16"
    dimension = 4096
    resize = "tensorflow-bilinear-224"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        path, self.sha256 = find_weights("vgg16", weights_path)
        require_plain_weights(path)
        with readable(path):
            network = FeatureExtractorVGG16(self.model, ["fc2_relu"], feature_extractor_weights_path=str(path))
        super().__init__(network)
