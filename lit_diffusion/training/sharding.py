"""Fully sharded training (FSDP): every process keeps a part of each weight, its gradient and its optimizer state.

It uses Lightning's ModelParallelStrategy and PyTorch's ``fully_shard``, for the backbone only. Its weights become
distributed tensors, each gathered while it is used. A checkpoint holds full tensors, as from one device, and opens on
any number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_diffusion.training.lightning_internals import shard_over_all_processes


class ShardedStrategy(ModelParallelStrategy):
    """``trainer.strategy: fsdp``: weights sharded over all processes of all nodes, full tensors in checkpoints."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shard over all processes; Lightning's default shards over the nodes."""
        shard_over_all_processes(self)
        super().setup_environment()


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full value of a distributed tensor, a collective call; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move a full tensor, equal on all processes, to the parameter's device, and shard it as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard(backbone: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's weights in place: the entries of its module lists (stages, layers) one by one, then the rest.

    Args:
        backbone: the network.
        mesh: one-dimensional mesh of all processes.
    """
    for module in backbone.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for entry in module:
            if any(True for _ in entry.parameters()) and not isinstance(entry, nn.ModuleList):
                fully_shard(entry, mesh=mesh)
    # The outermost is resharded after use, too: a sampler evaluates the network without a backward pass.
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True)


@contextmanager
def no_gradient_sync(backbone: Any) -> Iterator[None]:
    """Context that accumulates gradients without averaging them over the processes."""
    assert isinstance(backbone, FSDPModule)
    backbone.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        backbone.set_requires_gradient_sync(True)
