"""What every backbone is: a network ``F(x, c_noise, cond)`` that knows nothing of diffusion."""

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
"""Of one datum without the batch: ``(C, H, W)`` for images, ``(D,)`` for points."""


class Backbone(nn.Module, ABC):
    """A network ``F(x, c_noise, cond)``.

    Subclasses take their data's shape as ``data_shape``; ``auto`` there is replaced by the command line with the shape
    that the data source declares.
    """

    data_shape: Shape
    out_channels: int | None = None
    """Of the output, None for as many as the data have; twice as many where the network also says a variance."""

    level_indexed: bool = False
    """Whether ``c_noise`` is looked up in a table, so that only whole numbers mean anything."""

    higher_order: bool = False
    """True while second derivatives are wanted: attention in plain operations, see :meth:`set_higher_order`."""

    num_classes: int | None = None

    autocast_dtype: torch.dtype | None = None
    """The type that it computes in under mixed precision, None for float32 throughout."""

    compiled: bool = False

    rows: int | None = None
    """How many rows it is given at once, filled up and taken apart; None: as many as there are."""

    recorded: RecordedBackbone | None = None
    """Evaluates it where no gradient is asked for; None: it does so itself."""

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: ``[B, *data_shape]``.
            c_noise: ``[B]`` float32, the noise level as the parametrization encodes it.
            cond: the condition or None.

        Returns:
            ``[B, out_channels, *data_shape[1:]]``, in x's dtype or the autocast one.
        """

    def run_as(
        self,
        autocast_dtype: torch.dtype | None = None,
        compiled: bool = False,
        rows: int | None = None,
        cuda_graphs: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Say how :meth:`evaluate` runs the network.

        Compiled, it is one graph for training and one for what takes no gradients, each for batches of one size, which
        is all that it is given then; gradients in evaluation mode (likelihoods, pictures by noise level) are computed
        without. It is compiled in place: the names of the weights stay, and values that are written over are seen.

        Args:
            autocast_dtype: the type that it computes in, None for float32 throughout.
            compiled: compile it.
            rows: of the batches of a compiled network, those of training; None: whatever comes, compiled again for each
                size.
            cuda_graphs: record an evaluation without gradients once and replay it, on a CUDA device.
            channels_last: keep images as ``[B, H, W, C]`` in memory.
        """
        self.autocast_dtype = autocast_dtype
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if compiled:
            self.compiled, self.rows = True, rows
            self.compile(fullgraph=True, dynamic=False)
        if cuda_graphs:
            from lit_diffusion.backbones.cuda_graphs import RecordedBackbone  # It is about a backbone.

            self.recorded = RecordedBackbone(self)

    def evaluate(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        """Evaluate the network as :meth:`run_as` says; arguments and result are those of :meth:`forward`."""
        x = x.to(next(self.parameters()).dtype)
        with torch.autocast(x.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if self.compiled and torch.is_grad_enabled() and not self.training:
                return self.forward(x, c_noise, cond)
            network = self if self.recorded is None or torch.is_grad_enabled() else self.recorded
            rows, given = self.rows, len(x)
            if rows is None or given == rows:
                return network(x, c_noise, cond)
            # The last row fills up.
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
