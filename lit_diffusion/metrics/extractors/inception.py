"""Inception v3, the features of the FID, the KID and the Inception Score."""

from __future__ import annotations

from pathlib import Path

from lit_diffusion.metrics.extractors.base import FidelityExtractor, readable, require_plain_weights
from lit_diffusion.metrics.weights import find_weights


class Inception(FidelityExtractor):
    """Inception v3 with the weights of the original FID: 2048 features and 1008 unbiased logits.

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500.

    Args:
        weights_path: path of the weights; None for the fetched ones.

    Raises:
        UserError: for missing or damaged weights.
    """

    name = "inception"
    model = "inception-v3-compat"
    dimension = 2048
    has_logits = True
    resize = "tensorflow-bilinear-299"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path, self.sha256 = find_weights("inception", weights_path)
        require_plain_weights(path)
        with readable(path):
            network = FeatureExtractorInceptionV3(
                self.model, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        super().__init__(network)
