"""A classifier of 8 x 8 digits, so that a run on them has real figures without a download.

The weights are in the package (made by ``benchmarks/train_digits_classifier.py``). Figures of its features are named
``fd/digits-...``: they rank models of the digits, and compare with nothing else.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

WEIGHTS_FILE = Path(__file__).with_name("digits_classifier.safetensors")


class DigitsClassifier(nn.Module):
    """Four convolutions, 64 features, ten classes; 46 thousand parameters."""

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
        """Images ``[B, 1, 8, 8]`` in [-1, 1] to features ``[B, 64]`` and logits ``[B, 10]``."""
        features = self.trunk(x)
        return features, self.head(features)
