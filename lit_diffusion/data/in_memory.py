"""Data that fit into memory as one array."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lit_diffusion.data.source import Source


class InMemory(Source):
    """An array of images or points, with or without labels.

    Args:
        values: uint8 ``[N, C, H, W]`` with values ``0 .. num_grey_levels - 1``, or float32 ``[N, D]``.
        labels: integers ``[N]`` in ``0 .. num_classes - 1``, or None.
        name: short and stable name, for logs and cache keys.
        num_grey_levels: the number of grey levels, None for points.
        num_classes: number of classes, None without labels.
        class_names: names of the classes in the order of their numbers, None where they have none.
    """

    def __init__(
        self,
        values: np.ndarray,
        labels: np.ndarray | None = None,
        name: str = "array",
        num_grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.shape = values.shape[1:]
        self.num_grey_levels = num_grey_levels
        self.num_classes = num_classes
        self.class_names = class_names
        self._values = values
        self._labels = labels

    def __len__(self) -> int:
        return len(self._values)

    def value(self, index: int) -> np.ndarray:
        """Datum ``index`` as a copy: uint8 ``[C, H, W]`` or float32 ``[D]``."""
        return self._values[index].copy()

    def label(self, index: int) -> int | None:
        """The class of datum ``index`` in ``0 .. num_classes - 1``, None without labels."""
        return None if self._labels is None else int(self._labels[index])

    def fingerprint(self) -> str:
        """A hash of all values and labels, the same for equal data of any origin."""
        digest = hashlib.sha256(f"{self.shape} {self.num_grey_levels} {len(self)}".encode())
        # In pieces, so that a transposed array of many gigabytes is not copied whole.
        for start in range(0, len(self), 1024):
            digest.update(self._values[start : start + 1024].tobytes())
        if self._labels is not None:
            digest.update(self._labels.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]
