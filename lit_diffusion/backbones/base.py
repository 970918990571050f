"""What every backbone is: a network ``F(x, c_noise, cond)`` that knows nothing of diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError

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
