"""Collective functions over the processes: sums, rows, anything that can be pickled.

Every exchange begins with a check that no process has failed (:func:`lit_diffusion.failures.agree`), so that none waits
for one that has. All processes must call each of these functions, in the same order; in a single process they cost
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_diffusion.failures import agree, gather_unchecked, many_processes


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 in a single process."""
    return (dist.get_rank(), dist.get_world_size()) if many_processes() else (0, 1)


def _carrier() -> torch.device:
    """The device of tensors that processes exchange."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the processes; returns a copy."""
    total = values.detach().clone()
    if not many_processes():
        return total
    agree()
    total = total.to(_carrier())
    dist.all_reduce(total)
    return total.to(values.device)


def all_gather_objects(mine: Any) -> list[Any]:
    """Gather an object of each process, anything that can be pickled, in the processes' order."""
    if many_processes():
        agree()
    return gather_unchecked(mine)


def gather_rows(rows: Tensor) -> Tensor:
    """Gather rows ``[n, D]`` of all processes, in their order, to ``[sum of n, D]`` on the CPU; n may differ."""
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


def global_batch(rows: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of all processes, at least one of each, as :func:`gathered`."""
    return gather_rows(rows.reshape(len(rows), -1)).view(-1, *rows.shape[1:])
