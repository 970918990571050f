"""Images for the extractors to look at."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def smooth_images(count: int, seed: int, roughness: int, size: int = 32) -> np.ndarray:
    """Blurred color noise ``[N, size, size, 3]``; a rougher one has finer grain and more contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, roughness, roughness, generator=generator)
    fine = F.interpolate(coarse, size, mode="bilinear")
    tint = torch.randn(count, 3, 1, 1, generator=generator)
    return (128 + 40 * tint + 12 * roughness * fine).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
