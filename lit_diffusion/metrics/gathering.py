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
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from lit_diffusion.failures import agree


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Where states are made or changed: a tensor made in inference mode cannot be added to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def many_processes() -> bool:
    """Whether there are others to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _carrier() -> torch.device:
    """The device that the processes' tensors travel on."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def summed(values: Tensor) -> Tensor:
    """Added up over the processes; a copy."""
    total = values.detach().clone()
    if not many_processes():
        return total
    agree()
    total = total.to(_carrier())
    dist.all_reduce(total)
    return total.to(values.device)


def shares_of_all(mine: Any) -> list[Any]:
    """What each process has, in the processes' order; anything that can be pickled, and all processes come."""
    if not many_processes():
        return [mine]
    agree()
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares


def gathered(rows: Tensor) -> Tensor:
    """The rows ``[n, D]`` of all processes, in the processes' order, on the CPU; each may hold any number of them."""
    if not many_processes():
        return rows.cpu()
    agree()
    device = _carrier()
    size = torch.tensor(rows.shape, device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = [int(s[0]) for s in sizes]
    width = max(int(s[1]) for s in sizes)  # A process without rows does not know their width.
    padded = torch.zeros(max(counts), width, dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.reshape(len(rows), width).to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])


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
        rows, order = gathered(mine), gathered(numbers[:, None])[:, 0]
        if len(order.unique()) != len(order):
            raise ValueError("two samples have one number; each must be counted once")
        return rows[order.argsort()]
