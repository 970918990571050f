r"""The CLIP score, the agreement of images with their captions.

.. math::  100 \cdot \mathbb{E}\, \max\Big(0, \frac{E_I \cdot E_T}{|E_I|\,|E_T|}\Big)

of CLIP's embeddings of image and caption, in torchmetrics' scale (Hessel et al. 2021,
https://arxiv.org/abs/2104.08718, multiply by 2.5 instead of 100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from lit_diffusion.errors import UserError
from lit_diffusion.metrics.base import SampleMetric, Seen, Subject, Value
from lit_diffusion.metrics.extractors import CLIP
from lit_diffusion.metrics.mean import Mean


class CLIPScore(SampleMetric):
    r"""The CLIP score, from 0 to 100, with its standard error over pairs of an image and its caption.

    .. math::  100 \cdot \mathbb{E}\, \max\Big(0, \frac{E_I \cdot E_T}{|E_I|\,|E_T|}\Big)

    (Hessel et al. 2021, https://arxiv.org/abs/2104.08718.)

    Args:
        captioner: embeds images and captions; None: embeddings are given to :meth:`update`.
        extractor_too: true where it is also the feature extractor, so that the features are the images' embeddings.
    """

    def __init__(self, captioner: CLIP | None = None, extractor_too: bool = False) -> None:
        self.captioner = captioner
        self.extractor_too = extractor_too
        self.mean = Mean()

    @classmethod
    def of(cls, names: Sequence[str], subject: Subject) -> Self:
        """Build the metric with the subject's captioner."""
        return cls(subject.captioner, subject.captioner is subject.extractor)

    def update(self, images: Tensor, captions: Tensor) -> None:
        """Take embeddings of images ``[B, D]`` and of their captions ``[B, D]``."""
        cosine = torch.nn.functional.cosine_similarity(images.double(), captions.to(images.device).double(), dim=1)
        self.mean.update(100.0 * cosine.clamp(min=0.0))

    def take(self, seen: Seen) -> None:
        """Take a batch with its captions."""
        assert self.captioner is not None
        assert seen.captions is not None
        embedded = seen.features if self.extractor_too else self.captioner(seen.filled).features[: len(seen.index)]
        self.update(embedded, self.captioner.captions(seen.captions))

    def reset(self) -> None:
        """Forget the samples."""
        self.mean.reset()

    def compute(self) -> tuple[float, float]:
        """Mean and standard error; the error of a single pair is NaN.

        Raises:
            UserError: without a pair.
        """
        mean, error, count = self.mean.compute()
        if count < 1:
            raise UserError("a CLIP score needs at least one image with a caption")
        return mean, error

    def values(self, total: int) -> dict[str, Value]:
        """The score with its standard error."""
        score, error = self.compute()
        if math.isnan(error):
            return {"clip_score": Value(score, lacking={"error": "one image has no spread"})}
        return {"clip_score": Value(score, error)}

    def protocol(self, total: int) -> dict[str, Any]:
        """The embedding network and its weights' hash."""
        assert self.captioner is not None
        return {"clip": self.captioner.model, "clip_sha256": self.captioner.sha256}
