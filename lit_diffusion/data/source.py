"""The interface of a data source: numbered images or points with the meaning of their values."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Source(ABC):
    """A finite, ordered set of data, read by index.

    Images are uint8 ``[C, H, W]`` with values ``0 .. num_grey_levels - 1``; only the DataModule normalizes them, once.
    Points are float32 ``[D]`` and are used unchanged.

    Attributes:
        shape: shape of one datum: ``(C, H, W)`` or ``(D,)``.
        num_grey_levels: the number of grey levels of an image (256; the digits have 17), None for points.
        num_classes: number of classes, None without labels.
        class_names: names of the classes in the order of their numbers; None or empty where they have none.
        name: short and stable name, for logs and cache keys.
    """

    name: str
    shape: tuple[int, ...]
    num_grey_levels: int | None = 256
    num_classes: int | None = None
    class_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of data."""

    @abstractmethod
    def value(self, index: int) -> np.ndarray:
        """Datum ``index``: uint8 ``[C, H, W]`` or float32 ``[D]``."""

    def label(self, index: int) -> int | None:
        """The class of datum ``index`` in ``0 .. num_classes - 1``, None where there are none."""
        return None

    def notes(self) -> list[str]:
        """Lines about lost parts of the data, such as cropped borders, printed once at the beginning of a run."""
        return []

    def fingerprint(self) -> str:
        """A hash of the source's data: equal for equal data, different when anything changes.

        The default reads everything; sources on disk override it with something cheaper.
        """
        digest = hashlib.sha256(f"{self.name} {self.shape} {self.num_grey_levels} {len(self)}".encode())
        for index in range(len(self)):
            digest.update(np.ascontiguousarray(self.value(index)).tobytes())
            digest.update(str(self.label(index)).encode())
        return digest.hexdigest()[:16]
