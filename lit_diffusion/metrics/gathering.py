"""Metrics over several processes: sums that are added, rows that are counted before they are gathered.

torchmetrics gathers a list state update by update, so processes with different numbers of updates wait for each other
for ever or compute on a part. Here all processes make one gather whatever they hold, nothing included, and the rows are
put into the order of the samples' numbers: every process then computes on exactly what a single one would.
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
    """Where states are made or changed: a tensor made in inference mode cannot be added to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class SumsMetric(Metric):
    """A metric of sums in float64 that are added over the processes; usable in and out of inference mode, in any order.

    Nothing is cached: a process that took in nothing since the last figure must come to the sum with the others.

    Args:
        shape: of the sums.
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
        # A copy on another device, too, is made outside.
        with outside_inference_mode():
            return super()._apply(fn, exclude_state)


class RowsMetric(Metric):
    """A metric of all samples' rows, kept on the CPU in the precision that they come in."""

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
        """Take in ``[B, D]`` of samples number ``index`` ``[B]``."""
        if len(rows) != len(index):
            raise ValueError(f"{len(rows)} rows for {len(index)} samples")
        self.rows.append(rows.detach().to("cpu", self._rows_dtype))
        self.indices.append(index.detach().to("cpu", torch.int64))

    def all_rows(self) -> Tensor:
        """Of the samples of all processes, by number ``[N, D]``.

        Raises:
            ValueError: if two samples have one number.
        """
        mine = torch.cat(self.rows) if self.rows else torch.empty(0, 0, dtype=self._rows_dtype)
        numbers = torch.cat(self.indices) if self.indices else torch.empty(0, dtype=torch.int64)
        rows, order = gather_rows(mine), gather_rows(numbers[:, None])[:, 0]
        if len(order.unique()) != len(order):
            raise ValueError("two samples have one number; each must be counted once")
        return rows[order.argsort()]

    def compute(self) -> Any:
        """The rows; a metric of them computes something of its own."""
        return self.all_rows()
