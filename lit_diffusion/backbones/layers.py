"""Layers of the networks: initialized linear maps, normalizations, attention.

Every layer is twice differentiable, except attention's fused kernel (see :class:`Attention`), and keeps the memory
format of its input.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = TypeVar("Linear", bound="nn.Linear | nn.Conv2d")


def initialised(layer: Linear, zero: bool = False) -> Linear:
    """Set DDPM's initial weights: uniform of variance ``2 / (fan_in + fan_out)``, or zeros; zero biases.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239.
    """
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def dense(inputs: int, outputs: int, zero: bool = False) -> nn.Linear:
    """A linear layer with DDPM's initial weights."""
    return initialised(nn.Linear(inputs, outputs), zero)


def conv3x3(inputs: int, outputs: int, zero: bool = False) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width, with DDPM's initial weights."""
    return initialised(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), zero)


class Pointwise(nn.Linear):
    """A linear map of the channels at each pixel: ``[B, C, H, W]`` to ``[B, C', H, W]``.

    The weight is a matrix and not a ``[C', C, 1, 1]`` kernel: in the channels-last format the strides of that kernel
    and of its gradient differ, which DistributedDataParallel answers with a copy and a warning.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        initialised(self)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the map to the channels of every pixel."""
        return F.conv2d(input, self.weight[:, :, None, None], self.bias)


def group_count(channels: int) -> int:
    """The number of groups: the largest divisor of the channels, at most 32, with at least 4 channels a group."""
    return max(n for n in range(1, max(1, min(32, channels // 4)) + 1) if channels % n == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalization with :func:`group_count` groups (Wu and He 2018, https://arxiv.org/abs/1803.08494).

    ``y = gamma (x - mean) / std + beta`` with the moments of each group over channels and pixels; the same at every
    noise level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(group_count(channels), channels, eps=1e-6)

    def forward(self, input: Tensor, level: Tensor | None = None) -> Tensor:
        """Normalize ``[B, C, H, W]``; ``level`` is ignored."""
        # Autocast computes it in float32 and would leave the result, and the activation after it, in float32.
        return super().forward(input).to(input.dtype)


class ConditionalInstanceNorm(nn.Module):
    r"""Conditional instance normalization++ (Song and Ermon 2019, https://arxiv.org/abs/1907.05600, appendix A).

    With the mean ``mu_k`` and standard deviation ``s_k`` of channel k over the pixels of one image, and the mean m and
    standard deviation v of ``mu_1 .. mu_C``::

        z_k = gamma[i, k] (x_k - mu_k) / s_k + beta[i, k] + alpha[i, k] (mu_k - m) / v

    where i is the noise level's index. The last term restores the brightness of the image, which instance normalization
    removes. Standard deviations have the divisor N, and 1e-5 is added to both variances.

    Args:
        channels: C.
        num_levels: number of noise levels.
    """

    eps = 1e-5

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.table.weight[:, : 2 * channels], 1.0, 0.02)  # gamma and alpha
        nn.init.zeros_(self.table.weight[:, 2 * channels :])  # beta

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Normalize ``[B, C, H, W]`` for the noise levels' indices int64 ``[B]``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gamma, alpha, beta = self.table(level)[:, :, None, None].chunk(3, dim=1)
        variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        mean_variance, mean_mean = torch.var_mean(mean, dim=1, correction=0, keepdim=True)
        brightness = (mean - mean_mean) * torch.rsqrt(mean_variance + self.eps)
        scale, shift = gamma * torch.rsqrt(variance + self.eps), torch.addcmul(beta, alpha, brightness)
        return torch.addcmul(shift, wide - mean, scale).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, higher_order: bool = False) -> Tensor:
    """Attention ``softmax(q k' / sqrt(d)) v`` of ``[B, heads, N, d]``; ``higher_order`` avoids the fused kernels."""
    if not higher_order:
        return F.scaled_dot_product_attention(query, key, value)
    logits = (query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1) @ value


class Attention(nn.Module):
    """Self-attention over the pixels of ``[B, C, H, W]``: ``x + W_o attend(W_qkv norm(x))``.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239.

    Args:
        channels: C.
        norm: the normalization before the projections; its ``forward`` takes the features and the noise level's index.
        heads: number of heads, a divisor of C.
        rescale: if true, divide the sum by sqrt(2).
        zero_init: if true, start with ``W_o = 0``, that is with the identity.
    """

    higher_order: bool = False
    """True computes attention in plain operations, since fused kernels have no second derivative."""

    def __init__(
        self, channels: int, norm: nn.Module, heads: int = 1, rescale: bool = False, zero_init: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rescale = rescale
        self.norm = norm
        self.qkv = dense(channels, 3 * channels)
        for weight in self.qkv.weight.detach().chunk(3):  # three maps of C to C: another variance than one of C to 3C
            nn.init.xavier_uniform_(weight)
        self.out = dense(channels, channels, zero=zero_init)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Attend over the pixels; ``level`` goes to the normalization."""
        # Linear maps on [B, N, C]: in the channels-last format this is a view, and 1 x 1 convolutions are slower.
        h = self.norm(x, level).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = attend(query, key, value, self.higher_order)
        h = self.out(h.transpose(1, 2).flatten(2))
        return add_residual(x, h.transpose(1, 2).unflatten(-1, x.shape[2:]), self.rescale)


def add_residual(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """``x + h``, with ``rescale`` divided by sqrt(2), so that two unit variances add up to one.

    Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix H.
    """
    total = x + h
    return total * math.sqrt(0.5) if rescale else total
