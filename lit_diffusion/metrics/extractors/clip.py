"""CLIP, which embeds images and their captions in a common space."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.extractors.base import FidelityExtractor, full_precision, readable
from lit_diffusion.metrics.weights import find_weights


class CLIP(FidelityExtractor):
    """CLIP's image embedding, ViT-B/32 (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Args:
        weights_path: path of the weights as published, a TorchScript archive; None for the fetched ones.

    Raises:
        UserError: for missing or damaged weights.
    """

    name = "clip"
    model = "clip-vit-b-32"
    dimension = 512
    resize = "tensorflow-bilinear-224"

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        path, self.sha256 = find_weights("clip", weights_path)
        self.path = path
        with readable(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*")  # the published file is TorchScript
            network = FeatureExtractorCLIP(self.model, ["clip"], feature_extractor_weights_path=str(path))
        super().__init__(network)

    def captions(self, texts: list[str]) -> Tensor:
        """Embeddings of captions ``[B, 512]`` by the text encoder in the same file.

        Raises:
            UserError: without the extra ``clip``.
        """
        try:
            import open_clip
        except ImportError as error:
            raise UserError("captions need open_clip: pip install 'lit-diffusion[clip]'") from error
        if not hasattr(self, "_text"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.*")
                self._text = open_clip.load_openai_model(str(self.path), precision="fp32", device="cpu").eval()
        tokens = open_clip.SimpleTokenizer()(texts)
        with full_precision(torch.device("cpu")):
            return self._text.encode_text(tokens).float()
