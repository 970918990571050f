"""Points as their own features, without a network."""

from __future__ import annotations

import numpy as np
import torch

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.extractors.base import Extractor, Features


class Points(Extractor):
    """The identity on points, which are their own features.

    Args:
        dimension: dimension of a point.
    """

    name = "points"
    model = "points"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    @classmethod
    def require_fit(cls, shape: tuple[int, ...]) -> None:
        """Refuse images."""
        if len(shape) != 1:
            raise UserError(f"extractor points takes points, the data have shape {list(shape)}")

    def __call__(self, data: np.ndarray) -> Features:
        """The points ``[B, D]`` as features."""
        return Features(torch.from_numpy(np.ascontiguousarray(data)).float())
