"""What a model must know of its data, and all it ever needs once the data are gone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """Facts of a data set, kept in every checkpoint.

    Attributes:
        source: its name.
        shape: of one datum, ``(C, H, W)`` or ``(D,)``.
        levels: grey levels of an image, None for points.
        value_range: what black and white are normalised to, None for points.
        num_classes: of the labels, None where there are none.
    """

    source: str
    shape: tuple[int, ...]
    levels: int | None
    value_range: tuple[float, float] | None
    num_classes: int | None

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
        )
