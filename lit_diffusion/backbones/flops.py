"""Floating-point operations of a network."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition

TRAINING = 3
"""Floating-point operations of a training step in multiples of the forward pass's: the backward pass computes the
gradient of each product with respect to both of its factors."""


@torch.no_grad()
def forward_flops(backbone: Backbone) -> int:
    """Floating-point operations of one evaluation for one datum: products of matrices, convolutions and attention.

    A multiplication and an addition count as two.
    """
    parameter = next(backbone.parameters())
    x = torch.zeros(1, *backbone.data_shape, device=parameter.device, dtype=parameter.dtype)
    cond = None
    if backbone.num_classes is not None:
        cond = Condition(label=torch.zeros(1, dtype=torch.int64, device=parameter.device))
    was_training = backbone.training
    backbone.eval()
    with FlopCounterMode(display=False) as counter:
        backbone(x, x.new_zeros(1), cond)
    backbone.train(was_training)
    return int(counter.get_total_flops())
