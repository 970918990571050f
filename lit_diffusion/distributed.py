"""What several processes tell each other: sums, rows, anything that can be pickled.

Every exchange begins with word of how everybody is (:func:`lit_diffusion.failures.agree`), so that no process
waits for one that has failed. All processes call each of these functions, in the same order; alone they cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_diffusion.failures import agree, many_processes, said_by_all


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 alone."""
    return (dist.get_rank(), dist.get_world_size()) if many_processes() else (0, 1)


def _carrier() -> torch.device:
    """The device that the processes' tensors travel on."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Added up over the processes; a copy."""
    total = values.detach().clone()
    if not many_processes():
        return total
    agree()
    total = total.to(_carrier())
    dist.all_reduce(total)
    return total.to(values.device)


def all_gather_objects(mine: Any) -> list[Any]:
    """What each process has, in the processes' order; anything that can be pickled, and all processes come."""
    if many_processes():
        agree()
    return said_by_all(mine)


def gather_rows(rows: Tensor) -> Tensor:
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


def global_batch(rows: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of all processes, at least one of each, as :func:`gathered`."""
    return gather_rows(rows.reshape(len(rows), -1)).view(-1, *rows.shape[1:])
