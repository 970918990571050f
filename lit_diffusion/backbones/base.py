"""The base of every backbone: a network ``F(x, c_noise, cond)``, independent of diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError

if TYPE_CHECKING:
    from lit_diffusion.backbones.cuda_graphs import RecordedBackbone

Shape = tuple[int, ...]
"""The shape of one datum without the batch: ``(C, H, W)`` for images, ``(D,)`` for points."""


class Backbone(nn.Module, ABC):
    """A network ``F(x, c_noise, cond)``.

    Subclasses take their data's shape as ``data_shape``; ``auto`` there is replaced by the command line with the shape
    that the data source declares.
    """

    data_shape: Shape
    out_channels: int | None = None
    """Channels of the output, None for as many as the data have; twice as many where the network predicts a
    variance."""

    level_indexed: bool = False
    """True where ``c_noise`` is the index of a noise level in a table, so that only integers are valid."""

    higher_order: bool = False
    """True while second derivatives are needed: attention in plain operations, see :meth:`set_higher_order`."""

    num_classes: int | None = None

    autocast_dtype: torch.dtype | None = None
    """The data type under mixed precision, None for float32 throughout."""

    compiled: bool = False

    rows: int | None = None
    """The fixed batch size of every evaluation, by padding and splitting; None: any batch size."""

    recorded: RecordedBackbone | None = None
    """Evaluates the network by CUDA graphs where no gradient is needed; None: without."""

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: ``[B, *data_shape]``.
            c_noise: ``[B]`` float32, the encoded noise level.
            cond: the condition or None.

        Returns:
            ``[B, out_channels, *data_shape[1:]]``, in x's dtype or the autocast dtype.
        """

    def run_as(
        self,
        autocast_dtype: torch.dtype | None = None,
        compiled: bool = False,
        rows: int | None = None,
        cuda_graphs: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Set the way in which :meth:`evaluate` runs the network.

        A compiled network is one graph for training and one for evaluations without gradients, each for one batch size;
        gradients in evaluation mode (likelihoods, pictures by noise level) run uncompiled. It is compiled in place: the
        names of the weights stay, and weights overwritten in place take effect.

        Args:
            autocast_dtype: data type under mixed precision, None for float32 throughout.
            compiled: if true, compile the network.
            rows: batch size of a compiled network, that of training; None: any, compiled again for each size.
            cuda_graphs: if true, record an evaluation without gradients once and replay it, on a CUDA device.
            channels_last: if true, keep images as ``[B, H, W, C]`` in memory.
        """
        self.autocast_dtype = autocast_dtype
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if compiled:
            self.compiled, self.rows = True, rows
            self.compile(fullgraph=True, dynamic=False)
        if cuda_graphs:
            from lit_diffusion.backbones.cuda_graphs import RecordedBackbone  # It imports this module.

            self.recorded = RecordedBackbone(self)

    def evaluate(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network in the way set by :meth:`run_as`; arguments and result as for :meth:`forward`."""
        x = x.to(next(self.parameters()).dtype)
        with torch.autocast(x.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if self.compiled and torch.is_grad_enabled() and not self.training:
                return self.forward(x, c_noise, cond)
            network = self if self.recorded is None or torch.is_grad_enabled() else self.recorded
            rows, given = self.rows, len(x)
            if rows is None or given == rows:
                return network(x, c_noise, cond)
            # Padded with copies of the last row.
            number = torch.arange(-(-given // rows) * rows, device=x.device).clamp(max=given - 1)
            parts = [network(x[at], c_noise[at], None if cond is None else cond[at]) for at in number.split(rows)]
            return torch.cat(parts)[:given]

    def set_higher_order(self, enabled: bool = True) -> None:
        """Make every operation twice differentiable (fused attention kernels are not)."""
        for module in self.modules():
            if hasattr(module, "higher_order"):
                module.higher_order = enabled  # type: ignore[assignment]


def resolved_shape(data_shape: Shape | list[int] | Literal["auto"], owner: str) -> Shape:
    """The data shape as a tuple of integers.

    Raises:
        UserError: if it is still ``auto``, which only the command line can resolve.
    """
    if isinstance(data_shape, str):
        raise UserError(f"{owner}: data_shape is {data_shape!r}; in Python code give the numbers, e.g. (3, 32, 32)")
    return tuple(int(n) for n in data_shape)
