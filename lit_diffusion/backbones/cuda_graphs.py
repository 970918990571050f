"""Evaluation of a network by recorded CUDA graphs, so that a small network does not wait for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError

WARM_UPS = 3
"""The number of evaluations before the recording, in which kernels are chosen and compiled."""


class RecordedBackbone:
    """Evaluate a backbone without gradients by replaying a recording, one for each shape of its inputs.

    A replay reads the weights in place, so that weights overwritten in place (by averages) take effect.

    Args:
        backbone: the network, on a CUDA device and in evaluation mode whenever it is called.

    Raises:
        UserError: when called with a backbone that is not on a CUDA device.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._recordings: dict[object, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Condition | None) -> Tensor:
        """Evaluate as :meth:`~lit_diffusion.backbones.base.Backbone.forward`; the result is a copy."""
        if x.device.type != "cuda":
            raise UserError(f"cuda_graphs needs a CUDA device, and the model is on {x.device}; leave it out")
        given = {"x": x, "c_noise": c_noise} | ({} if cond is None else cond.given())
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        weights = next(self.backbone.parameters())
        kinds = tuple((name, value.shape, value.dtype) for name, value in given.items())
        key = (kinds, cond is None, autocast, weights.data_ptr())
        if key not in self._recordings:
            self._recordings[key] = self._record(given, cond is None, autocast)
        graph, held, output = self._recordings[key]
        for name, value in given.items():
            held[name].copy_(value)
        graph.replay()
        return output.clone()

    def _record(
        self, given: dict[str, Tensor], unconditional: bool, autocast: torch.dtype | None
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
        held = {name: value.clone() for name, value in given.items()}
        x, c_noise, *_ = held.values()
        cond = None if unconditional else Condition(**{name: held[name] for name in list(held)[2:]})
        # Without autocast's cache: a cached copy of the weights would be outside the recording, and become stale.
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.backbone(x, c_noise, cond)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.backbone(x, c_noise, cond)
        return graph, held, output
