"""Against torchvision's vision transformer, and an independent bicubic resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

from lit_diffusion.metrics.extractors.dinov2 import DINOv2Transformer

WIDTH, DEPTH, HEADS = 48, 2, 3


@pytest.fixture
def network():
    generator = torch.Generator().manual_seed(0)
    network = DINOv2Transformer(WIDTH, DEPTH, HEADS).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
        if "gamma" in name:
            parameter.fill_(1.0)
    return network


def torchvisions(network):
    """The same weights under their names; their positions are of 16 x 16 patches."""
    theirs = VisionTransformer(224, 14, DEPTH, HEADS, WIDTH, 4 * WIDTH, num_classes=1).eval()
    names = {
        "cls_token": "class_token",
        "patch_embed.proj": "conv_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.weight": "self_attention.in_proj_weight",
        "attn.qkv.bias": "self_attention.in_proj_bias",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    state = {"encoder.pos_embedding": network.positions(16)}
    for name, value in network.state_dict().items():
        if "gamma" in name or name in ("pos_embed", "mask_token"):
            continue
        name = name.replace("blocks.", "encoder.layers.encoder_layer_")
        name = f"encoder.ln.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        for ours, other in names.items():
            name = name.replace(ours, other)
        state[name] = value
    state |= {name: value for name, value in theirs.state_dict().items() if name.startswith("heads")}
    theirs.load_state_dict(state)
    theirs.heads = torch.nn.Identity()
    return theirs.requires_grad_(False)


def images(count=2):
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_it_is_torchvisions_transformer(network):
    found = network(images())
    assert tuple(found.shape) == (2, WIDTH)
    torch.testing.assert_close(found, torchvisions(network)(images()), rtol=1e-4, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 0.01


def keys_kernel(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_weights(size, out, factor):
    """``[out, size]``: of Keys' kernel about ``(i + 1/2) / factor - 1/2``, the border repeated."""
    weights = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(j, 0), size - 1)] += keys_kernel(centre - j)
    return weights


@pytest.mark.parametrize("side", [16, 32])
def test_positions_are_resized_by_the_published_factor(network, side):
    found = network.positions(side)
    grid = network.pos_embed[0, 1:].view(37, 37, WIDTH).double().numpy()
    W = bicubic_weights(37, side, (side + 0.1) / 37)
    expected = np.einsum("ia,jb,abc->ijc", W, W, grid).reshape(-1, WIDTH)
    np.testing.assert_allclose(found[0, 1:], expected, atol=2e-5)
    assert torch.equal(found[:, :1], network.pos_embed[:, :1])
    plain = bicubic_weights(37, side, side / 37)
    assert np.abs(np.einsum("ia,jb,abc->ijc", plain, plain, grid).reshape(-1, WIDTH) - expected).max() > 1e-3


def test_at_the_trained_size_positions_are_as_they_are(network):
    assert network.positions(37) is network.pos_embed


@pytest.mark.parametrize("scale", ["ls1", "ls2"])
@pytest.mark.parametrize("block", range(DEPTH))
def test_every_scale_of_a_branch_has_an_effect(network, scale, block):
    before = network(images(1))
    getattr(network.blocks[block], scale).gamma[5] = 0.0
    assert float((network(images(1)) - before).abs().max()) > 1e-4


def test_a_scale_of_0_closes_the_branches(network):
    for block in network.blocks:
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    expected = network.norm(network.cls_token + network.pos_embed[:, :1])[:, 0]
    torch.testing.assert_close(network(images(1)), expected)


def test_names_and_shapes_are_those_of_the_published_large_model():
    with torch.device("meta"):
        state = DINOv2Transformer().state_dict()
    of_block = {
        "norm1.weight": (1024,),
        "norm1.bias": (1024,),
        "attn.qkv.weight": (3072, 1024),
        "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024),
        "attn.proj.bias": (1024,),
        "ls1.gamma": (1024,),
        "norm2.weight": (1024,),
        "norm2.bias": (1024,),
        "mlp.fc1.weight": (4096, 1024),
        "mlp.fc1.bias": (4096,),
        "mlp.fc2.weight": (1024, 4096),
        "mlp.fc2.bias": (1024,),
        "ls2.gamma": (1024,),
    }
    expected = {
        "cls_token": (1, 1, 1024),
        "pos_embed": (1, 1370, 1024),
        "mask_token": (1, 1024),
        "patch_embed.proj.weight": (1024, 3, 14, 14),
        "patch_embed.proj.bias": (1024,),
        "norm.weight": (1024,),
        "norm.bias": (1024,),
        **{f"blocks.{k}.{name}": shape for k in range(24) for name, shape in of_block.items()},
    }
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert sum(value.numel() for value in state.values()) == 304_368_640
    assert len(state) == 343
