"""What a model must know of its data, and all it ever needs once the data are gone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GreyLevels:
    """Where the grey levels of normalised images lie.

    Attributes:
        low: value of the lowest level.
        high: value of the highest.
        width: distance of two neighbouring ones.
    """

    low: float
    high: float
    width: float

    def nearest(self, x: Tensor) -> Tensor:
        """The level in whose bin each entry of x lies, as a share of the highest: float64 in ``[0, 1]``.

        A bin holds its lower end; values beyond the outermost bins belong to these.
        """
        highest = round((self.high - self.low) / self.width)
        level = ((x.to(torch.float64) - self.low) / self.width + 0.5).floor()
        return level.clamp(0, highest) / max(highest, 1)

    def centre(self, x: Tensor) -> Tensor:
        """The value of the level in whose bin each entry of x lies: float64."""
        level = ((x.to(torch.float64) - self.low) / self.width).round()
        return self.low + self.width * level


@dataclass(frozen=True)
class DataFacts:
    """Facts of a data set, kept in every checkpoint.

    Attributes:
        source: its name.
        shape: of one datum, ``(C, H, W)`` or ``(D,)``.
        levels: grey levels of an image, None for points.
        value_range: what black and white are normalised to, None for points.
        num_classes: of the labels, None where there are none.
        dequantised: whether a model of them is trained on grey levels with uniform noise, see
            :meth:`~lit_diffusion.datamodule.DataModule.normalise`.
    """

    source: str
    shape: tuple[int, ...]
    levels: int | None
    value_range: tuple[float, float] | None
    num_classes: int | None
    dequantised: bool = False

    @property
    def grey_levels(self) -> GreyLevels | None:
        """Where the grey levels lie in the value range, None for points."""
        if self.levels is None or self.value_range is None:
            return None
        low, high = self.value_range
        if self.dequantised:
            width = (high - low) / self.levels
            return GreyLevels(low + 0.5 * width, high - 0.5 * width, width)
        return GreyLevels(low, high, (high - low) / (self.levels - 1))

    @property
    def is_image(self) -> bool:
        """Whether a datum is an image ``(C, H, W)``."""
        return len(self.shape) == 3

    def plain(self) -> dict[str, Any]:
        """As plain types, for a checkpoint or YAML."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> DataFacts:
        """The inverse of :meth:`plain`."""
        low_high = values["value_range"]
        return cls(
            source=values["source"],
            shape=tuple(values["shape"]),
            levels=values["levels"],
            value_range=None if low_high is None else (low_high[0], low_high[1]),
            num_classes=values["num_classes"],
            dequantised=values.get("dequantised", False),
        )
