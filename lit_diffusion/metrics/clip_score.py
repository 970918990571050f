r"""How well images fit their captions, by CLIP (Hessel et al. 2021).

.. math::  100 \cdot \mathbb{E}\, \max\Big(0, \frac{E_I \cdot E_T}{|E_I|\,|E_T|}\Big)

of the embeddings of image and caption; torchmetrics' scale (the paper multiplies by 2.5 instead of 100).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.distributed import summed
from lit_diffusion.errors import UserError
from lit_diffusion.metrics.gathering import SumsMetric, outside_inference_mode


class CLIPScore(SumsMetric):
    """Mean and standard error over pairs of an image and its caption."""

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, images: Tensor, captions: Tensor) -> None:
        """Take in embeddings of images ``[B, D]`` and of their captions ``[B, D]``."""
        cosine = torch.nn.functional.cosine_similarity(images.double(), captions.to(images.device).double(), dim=1)
        score = (100.0 * cosine.clamp(min=0.0)).to(self.sums.device)
        with outside_inference_mode():
            self.sums += torch.stack((score.new_tensor(float(len(score))), score.sum(), score.square().sum()))

    def compute(self) -> tuple[float, float]:
        """Mean and standard error.

        Raises:
            UserError: without a pair.
        """
        count, total, squares = summed(self.sums).tolist()
        if count < 1:
            raise UserError("a CLIP score needs at least one image with a caption")
        mean = total / count
        variance = max(0.0, squares / count - mean**2) * count / max(count - 1.0, 1.0)
        return mean, (variance / count) ** 0.5
