r"""Downsampling and upsampling of ``[B, C, H, W]`` by a factor of 2.

The key ``resampling`` of :class:`~lit_diffusion.backbones.UNet` has three choices:

- ``conv``: a strided convolution down; nearest neighbor and a convolution up (Ho et al. 2020,
  https://arxiv.org/abs/2006.11239).
- ``nearest``: the mean of 2 x 2 pixels down, nearest neighbor up, without parameters (DDPM++: Song et al. 2021,
  https://arxiv.org/abs/2011.13456).
- ``fir``: as ``nearest``, but with the antialiasing filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64 (Zhang 2019,
  https://arxiv.org/abs/1904.11486; Karras et al. 2020, https://arxiv.org/abs/1912.04958; NCSN++: Song et al. 2021).
  Images are padded with zeros.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_diffusion.backbones.layers import conv3x3, initialised

Resampling = Literal["conv", "nearest", "fir"]


class _Filter(nn.Module):
    """The constant 4 x 4 filter, which moves with the module and is in no checkpoint."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def per_channel(self, x: Tensor) -> Tensor:
        """The filter as the kernel of a depthwise convolution: ``[C, 1, 4, 4]`` in x's dtype."""
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)


class FIRDown(_Filter):
    """Filter, and keep every second pixel: H to H/2."""

    def forward(self, x: Tensor) -> Tensor:
        """``y[i] = sum_k f[k] x[2i + k - 1]`` on each axis."""
        return F.conv2d(x, self.per_channel(x), stride=2, padding=1, groups=x.shape[1])


class FIRUp(_Filter):
    """Put zeros between the pixels, filter, and multiply by 4: H to 2H."""

    def forward(self, x: Tensor) -> Tensor:
        """``y[i] = 2 sum_k f[k] x[(i - k + 1) / 2]`` on each axis, over integer indices."""
        return F.conv_transpose2d(x, 4.0 * self.per_channel(x), stride=2, padding=1, groups=x.shape[1])


class FIRBlur(_Filter):
    """Filter only: H to H + 1, which is what an unpadded strided 3 x 3 convolution needs to give H/2."""

    def forward(self, x: Tensor) -> Tensor:
        """``y[i] = sum_k f[k] x[i + k - 2]`` on each axis."""
        return F.conv2d(x, self.per_channel(x), padding=2, groups=x.shape[1])


class AverageDown(nn.Module):
    """The mean of 2 x 2 pixels: H to H/2."""

    def forward(self, x: Tensor) -> Tensor:
        """Average 2 x 2 pixels."""
        return F.avg_pool2d(x, 2)


class NearestUp(nn.Module):
    """Nearest-neighbor upsampling, each pixel four times: H to 2H."""

    def forward(self, x: Tensor) -> Tensor:
        """Repeat each pixel."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class PadAfter(nn.Module):
    """One zero row below and one zero column to the right: H to H + 1 (TensorFlow's SAME padding, which DDPM used)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad with zeros."""
        return F.pad(x, (0, 1, 0, 1))


def strided_conv(inputs: int, outputs: int, blur: bool = False) -> nn.Module:
    """A 3 x 3 convolution of stride 2, with ``blur`` after the FIR filter: H to H/2."""
    conv = initialised(nn.Conv2d(inputs, outputs, kernel_size=3, stride=2))
    return nn.Sequential(FIRBlur() if blur else PadAfter(), conv)


def downsampling(kind: Resampling, channels: int) -> nn.Module:
    """The module that halves height and width."""
    if kind == "conv":
        return strided_conv(channels, channels)
    return FIRDown() if kind == "fir" else AverageDown()


def upsampling(kind: Resampling, channels: int) -> nn.Module:
    """The module that doubles height and width."""
    if kind == "conv":
        return nn.Sequential(NearestUp(), conv3x3(channels, channels))
    return FIRUp() if kind == "fir" else NearestUp()
