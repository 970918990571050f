"""A classifier of 8 x 8 digits, for metrics of runs on the digits without a download.

The weights are in the package (made by ``benchmarks/train_digits_classifier.py``). Metric values in its features are
named ``fd/digits-...``: they rank models of the digits, and compare with no other values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.extractors.base import Features, NetworkExtractor, readable
from lit_diffusion.metrics.weights import sha256_of

WEIGHTS_FILE = Path(__file__).with_name("digits_classifier.safetensors")


class DigitsClassifier(nn.Module):
    """A classifier with four convolutions, 64 features and ten classes; 46 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, 64]`` and logits ``[B, 10]`` of images ``[B, 1, 8, 8]`` in [-1, 1]."""
        features = self.trunk(x)
        return features, self.head(features)


class DigitsFeatures(NetworkExtractor):
    """The features of a classifier of 8 x 8 grey digits in the package, see :class:`DigitsClassifier`.

    Args:
        weights_path: path of other weights of the same classifier, safetensors; None for those in the package.
    """

    name = "digits"
    model = "digits-classifier"
    dimension = 64
    has_logits = True

    def __init__(self, weights_path: str | Path | None = None) -> None:
        from safetensors.torch import load_file

        path = WEIGHTS_FILE if weights_path is None else Path(weights_path).expanduser()
        self.sha256 = sha256_of(path)
        network = DigitsClassifier()
        with readable(path):
            network.load_state_dict(load_file(path))
        super().__init__(network)

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse all but 8 x 8 grey images."""
        if tuple(shape) != (1, 8, 8):
            raise UserError(
                f"extractor digits takes 8 x 8 grey images, the data have shape {list(shape)}; choose another: "
                f"inception, dinov2, clip or vgg16"
            )

    def _features(self, images: Tensor) -> Features:
        return Features(*self.network(images.float() / 127.5 - 1.0))

    def protocol(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The protocol's entries, without repetition of grey images."""
        return {**super().protocol(shape), "grey_repeated": False}
