"""Metrics over several processes: sums that are added, rows that are counted before they are gathered.

torchmetrics gathers a list state update by update, so processes with different numbers of updates deadlock or compute
on a part. Here all processes make one gather, even without rows, and the rows are sorted by the samples' numbers, so
that every process computes on the same rows as a single process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_diffusion.distributed import gather_rows


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode while states are made or changed: tensors made in it cannot be changed outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class SumsMetric(Metric):
    """A metric of float64 sums that are added over the processes, usable inside and outside of inference mode.

    Nothing is cached: a process without new samples since the last value must take part in the sum with the others.

    Args:
        shape: shape of the sums.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        with outside_inference_mode():
            self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def reset(self) -> None:
        """Forget the samples."""
        with outside_inference_mode():
            super().reset()

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        # Copies on another device must be made outside of inference mode, too.
        with outside_inference_mode():
            return super()._apply(fn, exclude_state)


class RowsMetric(Metric):
    """A metric of all samples' rows, kept on the CPU.

    Args:
        dtype: data type of the rows.
    """

    full_state_update = False
    rows: list[Tensor]
    indices: list[Tensor]

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._rows_dtype = dtype
        self.add_state("rows", [], dist_reduce_fx=None)
        self.add_state("indices", [], dist_reduce_fx=None)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        return self  # The rows stay on the CPU.

    def update(self, rows: Tensor, index: Tensor) -> None:
        """Take the rows ``[B, D]`` of samples number ``index`` ``[B]``."""
        if len(rows) != len(index):
            raise ValueError(f"{len(rows)} rows for {len(index)} samples")
        self.rows.append(rows.detach().to("cpu", self._rows_dtype))
        self.indices.append(index.detach().to("cpu", torch.int64))

    def all_rows(self) -> Tensor:
        """The rows of the samples of all processes, sorted by number: ``[N, D]``.

        Raises:
            ValueError: if two samples have the same number.
        """
        mine = torch.cat(self.rows) if self.rows else torch.empty(0, 0, dtype=self._rows_dtype)
        numbers = torch.cat(self.indices) if self.indices else torch.empty(0, dtype=torch.int64)
        rows, order = gather_rows(mine), gather_rows(numbers[:, None])[:, 0]
        if len(order.unique()) != len(order):
            raise ValueError("two samples have the same number; each must be counted once")
        return rows[order.argsort()]

    def compute(self) -> Any:
        """The rows; a subclass computes its metric of them."""
        return self.all_rows()
