"""The data spec: all that a model must know of its data, kept in every checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.errors import UserError

NAMES_SAID = 10
"""The number of a data set's classes that are listed in a message."""


@dataclass(frozen=True)
class GreyLevels:
    """The values of the grey levels of normalized images.

    Attributes:
        low: value of the lowest grey level.
        high: value of the highest grey level.
        width: distance of two neighboring grey levels.
    """

    low: float
    high: float
    width: float

    def nearest(self, x: Tensor) -> Tensor:
        """The grey level in whose bin each entry of x lies, as a share of the highest: float64 in ``[0, 1]``.

        A bin includes its lower end; values beyond the outermost bins belong to those.
        """
        highest = round((self.high - self.low) / self.width)
        level = ((x.to(torch.float64) - self.low) / self.width + 0.5).floor()
        return level.clamp(0, highest) / max(highest, 1)

    def centre(self, x: Tensor) -> Tensor:
        """The value of the grey level in whose bin each entry of x lies: float64."""
        level = ((x.to(torch.float64) - self.low) / self.width).round()
        return self.low + self.width * level


@dataclass(frozen=True)
class DataSpec:
    """The spec of a data set, kept in every checkpoint.

    Attributes:
        source: name of the data source.
        shape: shape of one datum, ``(C, H, W)`` or ``(D,)``.
        num_grey_levels: number of grey levels of an image, None for points.
        value_range: normalized values of black and white, None for points.
        num_classes: number of classes, None without labels.
        dequantized: if true, models are trained on grey levels with uniform noise, see
            :meth:`~lit_diffusion.training.datamodule.DataModule.normalize`.
        class_names: names of the classes in the order of their numbers, None where they have none.
        class_counts: number of training data of each class, None without classes.
    """

    source: str
    shape: tuple[int, ...]
    num_grey_levels: int | None
    value_range: tuple[float, float] | None
    num_classes: int | None
    dequantized: bool = False
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None

    @property
    def grey_levels(self) -> GreyLevels | None:
        """The values of the grey levels in the value range, None for points."""
        if self.num_grey_levels is None or self.value_range is None:
            return None
        low, high = self.value_range
        if self.dequantized:
            width = (high - low) / self.num_grey_levels
            return GreyLevels(low + 0.5 * width, high - 0.5 * width, width)
        return GreyLevels(low, high, (high - low) / (self.num_grey_levels - 1))

    @property
    def is_image(self) -> bool:
        """True where a datum is an image ``(C, H, W)``."""
        return len(self.shape) == 3

    def require_classes_of(self, trained: DataSpec, where: str) -> None:
        """Refuse classes whose numbers stand for other classes than in a model's training data.

        Args:
            trained: the spec of the training data.
            where: the model's origin, for the message.

        Raises:
            UserError: with the names of both, where both have names.
        """
        if trained.class_names and self.class_names and trained.class_names != self.class_names:
            raise UserError(
                f"{where} was trained on the classes {in_brief(trained.class_names)}, and data.source has "
                f"{in_brief(self.class_names)}: give it the classes of the training, all and in their order"
            )

    def plain(self) -> dict[str, Any]:
        """The spec as plain types, for a checkpoint or YAML."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> DataSpec:
        """The inverse of :meth:`plain`."""
        low_high = values["value_range"]
        return cls(
            source=values["source"],
            shape=tuple(values["shape"]),
            num_grey_levels=values["num_grey_levels"],
            value_range=None if low_high is None else (low_high[0], low_high[1]),
            num_classes=values["num_classes"],
            dequantized=values["dequantized"],
            class_names=None if values["class_names"] is None else tuple(values["class_names"]),
            class_counts=None if values["class_counts"] is None else tuple(values["class_counts"]),
        )


def class_number(given: int | str, count: int, names: Sequence[str] | None = None) -> int:
    """The number of a class given by its name or, where no class has that name, by its number.

    Args:
        given: a name, or a number in ``0 .. count - 1``.
        count: number of classes.
        names: names of the classes in the order of their numbers; None where they have none.

    Raises:
        UserError: for an unknown class; it lists the classes, the closest matches first.
    """
    if names and given in names:
        return list(names).index(str(given))
    try:
        number = int(given)
    except ValueError:
        number = -1
    if 0 <= number < count:
        return number
    numbers = f"this model's classes are 0 to {count - 1}"
    if not names:
        raise UserError(f"label {given}: {numbers}")
    lower = {name.lower(): name for name in reversed(names)}
    alike = [lower[name] for name in difflib.get_close_matches(str(given).lower(), lower)]
    raise UserError(f"label {given}: {numbers}, by name {in_brief([*alike, *names])}")


def in_brief(names: Iterable[str]) -> str:
    """Names with commas and without repetitions, the first few of many."""
    once = list(dict.fromkeys(names))
    more = f", ... ({len(once)} in all)" if len(once) > NAMES_SAID else ""
    return ", ".join(once[:NAMES_SAID]) + more
