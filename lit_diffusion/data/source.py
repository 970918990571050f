"""What every data source is: numbered images (or points) that say what their values mean."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Source(ABC):
    """A finite, ordered set of data, read by index.

    Images are uint8 ``[C, H, W]`` with values ``0 .. levels - 1``, never normalized: that is the DataModule's work and
    happens once. Points (toys) are float32 ``[D]`` and are used as they are.

    Attributes:
        shape: of one datum: ``(C, H, W)`` or ``(D,)``.
        num_grey_levels: the number of grey levels of an image (256; the digits have 17), None for points.
        num_classes: of the labels, None where there are none.
        class_names: of the classes in the order of their numbers; None or empty where they have none.
        name: short and stable, for logs and cache keys.
    """

    name: str
    shape: tuple[int, ...]
    num_grey_levels: int | None = 256
    num_classes: int | None = None
    class_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many data there are."""

    @abstractmethod
    def value(self, index: int) -> np.ndarray:
        """Datum ``index``: uint8 ``[C, H, W]`` or float32 ``[D]``."""

    def label(self, index: int) -> int | None:
        """The class of datum ``index`` in ``0 .. num_classes - 1``, None where there are none."""
        return None

    def caption(self, index: int) -> str | None:
        """The text that describes datum ``index``, None where there is none."""
        return None

    def notes(self) -> list[str]:
        """What is lost of the data on the way, such as what is cut off: a line each, said once where a run begins."""
        return []

    def fingerprint(self) -> str:
        """A hash of what the source would yield: equal for equal data, different when anything changes.

        The default reads everything; sources on disk override it with something cheaper.
        """
        digest = hashlib.sha256(f"{self.name} {self.shape} {self.num_grey_levels} {len(self)}".encode())
        for index in range(len(self)):
            digest.update(np.ascontiguousarray(self.value(index)).tobytes())
            digest.update(str(self.label(index)).encode())
        return digest.hexdigest()[:16]
