"""Vincent's tied-weight denoising autoencoder, the first network trained by denoising score matching."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lit_diffusion.backbones.base import Backbone, Shape, resolved_shape
from lit_diffusion.conditions import Condition


class TiedAutoencoder(Backbone):
    r"""Vincent's tied autoencoder ``F(x) = W^T sigmoid(W x + b) + c``, without noise level or condition.

    As ``parametrization: x0`` the score is ``(F(x) - x) / sigma^2``, the gradient of an energy (Vincent 2011,
    https://doi.org/10.1162/NECO_a_00142, eqs. 13 and 14).

    Args:
        data_shape: shape of one datum; ``auto``: the data source's.
        hidden: number of hidden units.
    """

    def __init__(self, data_shape: Shape | Literal["auto"] = "auto", hidden: int = 128) -> None:
        super().__init__()
        self.data_shape = resolved_shape(data_shape, "TiedAutoencoder")
        size = math.prod(self.data_shape)
        self.weight = nn.Parameter(torch.randn(hidden, size) / math.sqrt(size))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Map ``[B, *data_shape]`` to the same shape."""
        hidden = torch.sigmoid(nn.functional.linear(x.flatten(1), self.weight, self.hidden_bias))
        return nn.functional.linear(hidden, self.weight.T, self.bias).view_as(x)
