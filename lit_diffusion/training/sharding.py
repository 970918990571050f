"""Fully sharded training (FSDP): every process keeps a part of each weight, its gradient and its optimizer state.

Through Lightning's ModelParallelStrategy and PyTorch's ``fully_shard``: only the backbone is sharded. Its weights
become distributed tensors, each put together for the moment that it is used in. A checkpoint holds whole tensors, as of
one device, and opens on any number of them.
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
    """``trainer.strategy: fsdp``: the weights shared out over all processes of all nodes, whole ones in checkpoints."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Share out over all processes; Lightning's default shares out over the nodes."""
        shard_over_all_processes(self)
        super().setup_environment()


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a distributed tensor, for which all processes come; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, on the parameter's device and shared out as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard(backbone: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the weights of a network in place: the entries of its lists (stages, layers) one by one, then the rest.

    Args:
        backbone: the network.
        mesh: of all processes, one dimension.
    """
    for module in backbone.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for entry in module:
            if any(True for _ in entry.parameters()) and not isinstance(entry, nn.ModuleList):
                fully_shard(entry, mesh=mesh)
    # Also the outermost is shared out again after use: a walk evaluates the network without a backward pass.
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True)


@contextmanager
def no_gradient_sync(backbone: Any) -> Iterator[None]:
    """Accumulate gradients without averaging over the processes yet."""
    assert isinstance(backbone, FSDPModule)
    backbone.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        backbone.set_requires_gradient_sync(True)
