"""Gradients of several networks on several processes: their average, their norm, their clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_diffusion.distributed import many_processes
from lit_diffusion.training.sharding import full_tensor, to_local


@torch.no_grad()
def average_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every unsharded gradient by its average over the processes; a collective call.

    A process without a gradient counts as zeros; where no process has one it stays None. Sharded gradients are averaged
    by FSDP itself.

    Args:
        parameters: the parameters of all networks that learn, in the same order on all processes.
    """
    unsharded = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not many_processes() or not unsharded:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in unsharded]
    there = gradients[0].new_tensor([p.grad is not None for p in unsharded])
    # In one exchange; the last numbers say how many processes have each gradient.
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), there]) / dist.get_world_size()
    dist.all_reduce(flat)
    *averages, there = flat.split([*(gradient.numel() for gradient in gradients), len(unsharded)])
    for p, gradient, average, anywhere in zip(unsharded, gradients, averages, there.tolist(), strict=True):
        p.grad = gradient.copy_(average.view_as(gradient)) if anywhere > 0.0 else None


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
    """Scale a network's gradient g by ``min(1, largest / |g|)``.

    Args:
        parameters: the network's parameters.
        largest: largest norm allowed; None: only measure.

    Returns:
        The norm before scaling, ``[]``; of the full gradient where it is sharded.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    kinds = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
    norms = [full_tensor(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if largest is not None:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([to_local(gradient) for gradient in gradients], factor)
    return norm
