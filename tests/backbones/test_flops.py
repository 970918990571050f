"""Operations of a network against counts by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import Convolutions
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.backbones import MLP, UNet
from lit_diffusion.backbones.base import Backbone
from lit_diffusion.backbones.flops import TRAINING, forward_flops
from lit_diffusion.conditions import Condition


class Alone(Backbone):
    """One layer."""

    def __init__(self, layer, shape):
        super().__init__()
        self.data_shape, self.num_classes, self.layer = shape, None, layer

    def forward(self, x, c_noise, cond=None):
        return self.layer(x)


def test_a_linear_layer():
    assert forward_flops(Alone(nn.Linear(7, 5), (7,))) == 2 * 7 * 5


def test_a_convolution():
    assert forward_flops(Alone(nn.Conv2d(3, 4, 3, padding=1), (3, 8, 6))) == 2 * 3 * 3 * 3 * 4 * 8 * 6


def test_a_multilayer_perceptron():
    sizes = []
    network = MLP((2,), width=16, depth=2, time_embedding="none")
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            sizes.append(2 * layer.in_features * layer.out_features)
    assert forward_flops(network) == sum(sizes) > 0


def digits_unet(**keys):
    keys = {"channels": 32, "mult": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.1, **keys}
    return UNet((1, 8, 8), **keys)


def by_hand(network, x, cond=None):
    """Convolutions and dense layers as they are called, and the two products of each attention."""
    found = []

    def count(module, args, out):
        if isinstance(module, nn.Conv2d):
            each = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        else:
            each = module.in_features
        found.append(2 * each * out.numel())

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        network(x, torch.zeros(len(x)), cond)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_a_unet_of_the_digits():
    network = digits_unet(attention=(), middle_attention=False)
    assert forward_flops(network) == by_hand(network, torch.zeros(1, 1, 8, 8))
    attentive = digits_unet(attention=(), middle_attention=True)
    # At 4 x 4 in 64 channels: scores, and their products with the values; each 2 * 16 * 16 * 64.
    assert forward_flops(attentive) == by_hand(attentive, torch.zeros(1, 1, 8, 8)) + 2 * (2 * 16 * 16 * 64)


def test_a_training_step_is_three_evaluations():
    network, batch = digits_unet(), 4
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(batch, 1, 8, 8), torch.zeros(batch)).square().sum().backward()
    assert counter.get_total_flops() == pytest.approx(TRAINING * batch * forward_flops(network), rel=0.03)


def test_counting_changes_nothing():
    network = digits_unet()
    network.train()
    before = torch.get_rng_state()
    forward_flops(network)
    assert network.training
    assert all(module.training for module in network.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


def test_a_network_of_classes_is_given_one():
    network = Convolutions(num_classes=10)
    assert forward_flops(network) == by_hand(
        network, torch.zeros(1, 1, 8, 8), Condition(label=torch.zeros(1, dtype=torch.int64))
    )
