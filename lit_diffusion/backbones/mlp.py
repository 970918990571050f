"""A residual perceptron for points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_diffusion.backbones.base import Backbone, resolved_shape
from lit_diffusion.backbones.embeddings import NoiseEmbedding, TimeEmbedding
from lit_diffusion.backbones.layers import dense
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError, require_choice

Activation = Literal["silu", "softplus", "tanh"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "softplus": F.softplus, "tanh": torch.tanh}


class MLPBlock(nn.Module):
    """A residual block ``h + W_2 act(W_1 h + W_e e)``, with e the noise embedding."""

    def __init__(self, width: int, embedding: int | None, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.dense1 = dense(width, width)
        self.project = None if embedding is None else dense(embedding, width)
        self.dense2 = dense(width, width)

    def forward(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """Map ``[B, width]`` to the same shape."""
        inner = self.dense1(h)
        if self.project is not None:
            inner = inner + self.project(embedding)
        return h + self.dense2(self.activation(inner))


class MLP(Backbone):
    r"""A residual perceptron for points ``[B, D]``::

        h = W_in x,    h <- h + W_2 act(W_1 h + W_e e)  (depth times),    F = W_out act(h)

    with e the noise embedding. It has derivatives of every order, so that a loss may contain the trace of a score's
    Jacobian or the gradient of an energy.

    Args:
        data_shape: (D,); ``auto``: the data source's.
        width: width of the layers and of the embedding.
        depth: the number of residual blocks.
        activation: the smooth nonlinearity.
        time_embedding: as in :class:`~lit_diffusion.backbones.UNet`.
        fourier_scale: the Fourier frequencies' standard deviation.
        num_classes: K; labels are ``0 .. K - 1`` and K means none; null: labels are ignored.
        out_channels: the length of the output; null: D.

    Raises:
        UserError: if the shape is not a point's.
    """

    def __init__(
        self,
        data_shape: tuple[int] | Literal["auto"] = "auto",
        width: int = 128,
        depth: int = 3,
        activation: Activation = "silu",
        time_embedding: TimeEmbedding = "positional",
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = resolved_shape(data_shape, "MLP")
        if len(self.data_shape) != 1:
            raise UserError(f"MLP: data_shape {self.data_shape} is not (D,), a point's; use UNet for images")
        require_choice("MLP", "activation", activation, get_args(Activation))
        require_choice("MLP", "time_embedding", time_embedding, get_args(TimeEmbedding))
        self.num_classes = num_classes
        self.out_channels = self.data_shape[0] if out_channels is None else out_channels
        self.activation = _ACTIVATIONS[activation]
        self.embedding: NoiseEmbedding | None = None
        if time_embedding != "none" or num_classes is not None:
            self.embedding = NoiseEmbedding(width, width, time_embedding, fourier_scale, num_classes)
        embedding_width = None if self.embedding is None else width
        self.stem = dense(self.data_shape[0], width)
        self.blocks = nn.ModuleList(MLPBlock(width, embedding_width, self.activation) for _ in range(depth))
        self.head = dense(width, self.out_channels)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network at ``x`` ``[B, D]`` and ``c_noise`` float32 ``[B]``: ``[B, out_channels]``."""
        embedding = None if self.embedding is None else self.embedding(c_noise, cond)
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.head(self.activation(h))
