"""Embeddings of the noise level and of the class."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_diffusion.backbones.layers import dense
from lit_diffusion.conditions import NO_LABEL, Condition
from lit_diffusion.errors import UserError
from lit_diffusion.randomness import keyed_normal

TimeEmbedding = Literal["positional", "fourier", "none"]


class PositionalFeatures(nn.Module):
    r"""The transformer's positional features::

        [sin(w_0 c), .., sin(w_{n-1} c), cos(w_0 c), .., cos(w_{n-1} c)],   w_j = 10000^(-j / (n - 1))

    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Ho et al. 2020, https://arxiv.org/abs/2006.11239.) The
    periods go from 6 to 63,000, so they distinguish numbers such as 0 .. 999; a time in ``[0, 1]`` has to be scaled.

    Args:
        size: 2n, the number of features.

    Raises:
        UserError: if the size is odd or less than 4.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 4 or size % 2:
            raise UserError(
                f"positional noise features come in pairs: {size} of them; give an even width of at least 4"
            )
        self.size = size

    def forward(self, c_noise: Tensor) -> Tensor:
        """Features ``[B, size]`` in ``[-1, 1]`` of ``c_noise`` ``[B]``."""
        half = self.size // 2
        index = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
        angle = c_noise[:, None] * torch.exp(index * (-math.log(10000.0) / (half - 1)))
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class FourierFeatures(nn.Module):
    r"""Random Fourier features::

        [sin(2 pi w c), cos(2 pi w c)],   w ~ N(0, scale^2 I)

    (Tancik et al. 2020, https://arxiv.org/abs/2006.10739; Song et al. 2021, https://arxiv.org/abs/2011.13456,
    appendix C.) The frequencies are the same in every network of a size: they are keyed, take nothing from the global
    generator, and are kept in the checkpoint.

    Args:
        size: the number of features, even.
        scale: the standard deviation of the frequencies; a larger one separates nearby noise levels more.

    Raises:
        UserError: if the size is odd or less than 2.
    """

    frequencies: Tensor

    def __init__(self, size: int, scale: float = 16.0) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise UserError(f"Fourier noise features come in pairs: {size} of them; give an even width")
        normal = keyed_normal(0, "Fourier features", torch.zeros(1, dtype=torch.int64), (size // 2,))
        self.register_buffer("frequencies", scale * normal[0])

    def forward(self, c_noise: Tensor) -> Tensor:
        """Features ``[B, size]`` in ``[-1, 1]`` of ``c_noise`` ``[B]``."""
        angle = (2.0 * math.pi) * c_noise[:, None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class NoiseEmbedding(nn.Module):
    r"""The embedding of noise level and class that every block receives::

        e = silu(W_2 silu(W_1 features(c_noise) + b_1) + b_2 + table[label])

    The outer silu is the one that each block would apply first. All of it is computed in the parameters' precision,
    never under autocast: bfloat16 does not distinguish 998.4 from 1000.

    Args:
        features: the number of features of ``c_noise``; twice as many Fourier features, sines and cosines.
        width: the length of e.
        kind: ``positional`` or ``fourier`` features; ``none`` embeds the class alone.
        fourier_scale: see :class:`FourierFeatures`.
        num_classes: K; the table has a row for each class and the row K for "no label" (Ho and Salimans 2022,
            https://arxiv.org/abs/2207.12598).
    """

    def __init__(
        self,
        features: int,
        width: int,
        kind: TimeEmbedding = "positional",
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features: nn.Module | None = None
        if kind == "positional":
            self.features = PositionalFeatures(features)
        elif kind == "fourier":
            features = 2 * features
            self.features = FourierFeatures(features, fourier_scale)
        if self.features is not None:
            self.dense1 = dense(features, width)
            self.dense2 = dense(width, width)
        if num_classes is not None:
            self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Embed.

        Args:
            c_noise: ``[B]``.
            cond: the condition; labels are int64 ``[B]`` in ``0 .. K``, where K and
                :data:`~lit_diffusion.conditions.NO_LABEL` stand for no label, as does a missing condition. A network
                without classes ignores labels.

        Returns:
            ``[B, width]`` in the parameters' dtype.
        """
        with torch.autocast(c_noise.device.type, enabled=False):
            parts = []
            if self.features is not None:
                hidden = self.dense1(self.features(c_noise.to(self.dense1.weight.dtype)))
                parts.append(self.dense2(F.silu(hidden)))
            if self.num_classes is not None:
                label = None if cond is None else cond.label
                if label is None:
                    label = torch.full_like(c_noise, self.num_classes, dtype=torch.int64)
                parts.append(self.table(torch.where(label == NO_LABEL, self.num_classes, label)))
            return F.silu(sum(parts))
