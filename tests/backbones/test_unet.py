from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lit_diffusion.backbones import UNet
from lit_diffusion.backbones.layers import Attention
from lit_diffusion.backbones.unet import ResidualBlock
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError

SMALL = {"data_shape": (1, 8, 8), "channels": 16, "mult": [1, 2], "blocks": 1, "attention": [4]}
PLUS = {"resampling": "nearest", "resample_in_block": True, "rescale_residual": True, "decoder_attention": "last"}
NETWORKS = {
    "ddpm": {},
    "ddpm++": PLUS,
    "ncsn++": {**PLUS, "resampling": "fir", "progressive_input": "residual", "time_embedding": "fourier"},
    "ncsn++ without fir": {**PLUS, "progressive_input": "residual", "time_embedding": "fourier"},
    "fir between blocks": {"resampling": "fir"},
    "ncsn": {"normalization": "conditional_instance", "num_levels": 5, "time_embedding": "none"},
    "ncsnv2": {"time_embedding": "none"},
    "adm": {"scale_shift": True, "heads": 4, "num_classes": 3, "attention": [8, 4], "resample_in_block": True}
    | {"resampling": "nearest"},
    "classes only": {"time_embedding": "none", "num_classes": 3},
    "no attention": {"attention": [], "middle_attention": False, "time_embedding": "fourier"},
}


def small(**keys) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**SMALL, "zero_init": False, **keys})


def a_batch(shape: tuple[int, ...] = (1, 8, 8), batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, *shape), torch.tensor([0.0, 3.0, 1.0])[:batch]


def parameters_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_ddpm_has_the_papers_size():
    with torch.device("meta"):
        assert parameters_of(UNet((3, 32, 32))) == 35_746_307


@pytest.mark.parametrize(
    ("keys", "millions"),
    # DDPM++, NCSN++ and NCSN++ deep on CIFAR-10: 62, 63 and 107 million in the literature.
    [(NETWORKS["ddpm++"], 61.8), (NETWORKS["ncsn++"], 62.8), ({**NETWORKS["ncsn++"], "blocks": 8}, 107.6)],
)
def test_the_score_sde_networks_have_their_sizes(keys, millions):
    with torch.device("meta"):
        count = parameters_of(UNet((3, 32, 32), **{"blocks": 4, **keys}))
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("keys", NETWORKS.values(), ids=NETWORKS.keys())
def test_shapes_and_gradients(keys):
    network = small(**keys)
    x, c_noise = a_batch()
    out = network(x, c_noise, Condition(label=torch.tensor([0, 1, 3])) if "num_classes" in keys else None)
    assert out.shape == x.shape
    out.square().mean().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0.0, name


@pytest.mark.parametrize("keys", NETWORKS.values(), ids=NETWORKS.keys())
def test_starts_at_zero_and_every_sample_stands_alone(keys):
    x, c_noise = a_batch()
    assert torch.equal(small(**keys, zero_init=True)(x, c_noise), torch.zeros_like(x))
    network = small(**keys)
    torch.testing.assert_close(network(x, c_noise)[1:], network(x[1:], c_noise[1:]), rtol=1e-4, atol=1e-5)


def test_the_noise_level_is_heard_only_where_it_should_be():
    x, c_noise = a_batch()
    for name, keys in NETWORKS.items():
        network = small(**keys)
        same = torch.equal(network(x, c_noise), network(x, c_noise + 1.0))
        assert same == (name in ("ncsnv2", "classes only")), name


def test_colours_non_square_images_and_output_channels():
    network = small(data_shape=(3, 8, 16), out_channels=6)
    x, c_noise = a_batch((3, 8, 16))
    assert network(x, c_noise).shape == (3, 6, 8, 16)
    assert network.data_shape == (3, 8, 16)


def test_where_there_is_attention():
    def places(**keys):
        network = small(data_shape=(1, 8, 16), mult=[1, 2, 2], **keys)
        return [name.rsplit(".", 1)[0] for name, m in network.named_modules() if isinstance(m, Attention)]

    every = ["decoder.1.0", "decoder.1.1"]  # height 4, not width 4
    assert places(attention=[4]) == ["encoder.1.0", "middle.0", *every]
    assert places(attention=[4], decoder_attention="last") == ["encoder.1.0", "middle.0", every[-1]]
    assert places(attention=[], middle_attention=False) == []


@pytest.mark.parametrize("rescale", [True, False])
def test_the_input_pyramid_is_added_after_each_halving(rescale):
    network = small(**{**NETWORKS["ncsn++"], "rescale_residual": rescale}, data_shape=(3, 8, 8), mult=[1, 2, 2])
    seen = {}
    for name, module in network.named_modules():
        if name in ("down.0", "down.1", "pyramid.0", "pyramid.1", "encoder.1.0", "encoder.2.0"):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    x, c_noise = a_batch((3, 8, 8))
    network(x, c_noise)
    assert seen["pyramid.0"][0] is x
    for n in (0, 1):
        total = seen[f"pyramid.{n}"][1] + seen[f"down.{n}"][1]
        torch.testing.assert_close(seen[f"encoder.{n + 1}.0"][0], total / math.sqrt(2.0) if rescale else total)
    assert seen["pyramid.1"][0] is seen["encoder.1.0"][0]


def test_labels():
    network = small(num_classes=4)
    x, c_noise = a_batch()
    nothing = network(x, c_noise)
    null = network(x, c_noise, Condition(label=torch.full((3,), 4)))
    mixed = network(x, c_noise, Condition(label=torch.tensor([4, 0, 1])))
    assert torch.equal(nothing, network(x, c_noise, Condition()))
    assert torch.equal(nothing, null)
    torch.testing.assert_close(mixed[0], null[0])
    assert (mixed[1:] - null[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    plain = small()
    assert torch.equal(plain(x, c_noise, Condition(label=torch.tensor([0, 1, 2]))), plain(x, c_noise))


def test_dropout_is_in_training_only():
    network = small(dropout=0.5)
    x, c_noise = a_batch()
    assert not torch.equal(network(x, c_noise), network(x, c_noise))
    network.eval()
    assert torch.equal(network(x, c_noise), network(x, c_noise))


def test_the_embedding_is_float32_under_autocast():
    network = small(num_classes=3)
    embeddings = []
    network.embedding.register_forward_hook(lambda _, __, e: embeddings.append(e))
    x, _ = a_batch()
    c_noise = torch.tensor([998.39, 750.0, 1e-3])
    network(x, c_noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x, c_noise)
    assert out.dtype == torch.bfloat16
    assert embeddings[1].dtype == torch.float32
    assert torch.equal(*embeddings)


@pytest.mark.parametrize("name", ["ddpm", "ncsn++", "ncsn", "adm"])
def test_channels_last(name):
    network = small(**NETWORKS[name], data_shape=(3, 8, 8))
    x, c_noise = a_batch((3, 8, 8))
    out = network(x, c_noise)
    assert out.is_contiguous()
    network = network.to(memory_format=torch.channels_last)
    last = network(x.contiguous(memory_format=torch.channels_last), c_noise)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out, rtol=0, atol=1e-5)
    last.square().mean().backward()
    for name, p in network.named_parameters():
        # Otherwise DistributedDataParallel copies every gradient and warns.
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("name", ["ddpm", "ncsn++", "ncsn", "adm"])
def test_compiles_without_a_graph_break(name):
    network = small(**NETWORKS[name])
    x, c_noise = a_batch()
    cond = Condition(label=torch.tensor([0, 1, 2]))
    expected = network(x, c_noise, cond)
    keys = set(network.state_dict())
    network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(network(x, c_noise, cond), expected)
    assert set(network.state_dict()) == keys


@pytest.mark.parametrize("keys", [{}, {"heads": 4}])
def test_higher_order_attention_agrees_with_the_fused_kernel(keys):
    network = small(**keys)
    x, c_noise = a_batch()
    fused = network(x, c_noise)
    network.set_higher_order()
    torch.testing.assert_close(network(x, c_noise), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ncsn++", "ncsn", "adm"])
def test_second_derivatives(name):
    tiny = {"data_shape": (1, 4, 4), "channels": 4, "attention": [2]}
    network = small(**{**NETWORKS[name], **tiny}).double()
    network.set_higher_order()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    c_noise = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: network(x, c_noise), x, fast_mode=True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data_shape": "auto"}, ["data_shape", "auto"]),
        ({"data_shape": (3, 28, 28), "mult": [1, 2, 2, 2]}, ["28", "3 times", "3 entries", "multiple of 8"]),
        ({"data_shape": (3, 32, 20), "mult": [1, 2, 2, 2]}, ["20", "3 times"]),
        ({"data_shape": (3, 12, 30), "mult": [1, 2, 2, 2]}, ["side 12", "at most 2 entries", "multiple of 8"]),
        ({"data_shape": (2,)}, ["(2,)", "(C, H, W)"]),
        ({"mult": []}, ["mult"]),
        ({"attention": [16]}, ["16", "[8, 4]"]),
        ({"heads": 3}, ["heads 3", "32"]),
        ({"normalization": "conditional_instance"}, ["conditional_instance", "levels"]),
        ({"normalization": "batch"}, ["normalization", "batch", "group"]),
        ({"resample_in_block": True}, ["resample_in_block", "nearest", "fir"]),
        ({"scale_shift": True, "time_embedding": "none"}, ["scale_shift", "time_embedding"]),
        ({"channels": 17}, ["17", "even"]),
    ],
)
def test_mistakes_get_one_line(keys, words):
    with pytest.raises(UserError) as error:
        small(**keys)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def copy_weights(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """To each pair's first module from its second; the 1 x 1 convolutions become matrices."""
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))
            ours.bias.copy_(theirs.bias)


def resnet_pairs(ours: ResidualBlock, theirs: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in ("norm1", "conv1", "norm2", "conv2")]
    pairs.append((ours.project, theirs.time_emb_proj))
    return pairs if ours.skip is None else [*pairs, (ours.skip, theirs.conv_shortcut)]


def test_ddpm_agrees_with_diffusers():
    unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")
    torch.manual_seed(0)
    theirs = unet_2d.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    ours = UNet((3, 32, 32), zero_init=False)
    assert parameters_of(ours) == parameters_of(theirs)

    pairs = [(ours.stem, theirs.conv_in), (ours.head_norm, theirs.conv_norm_out), (ours.head, theirs.conv_out)]
    pairs += [(ours.embedding.dense1, theirs.time_embedding.linear_1)]
    pairs += [(ours.embedding.dense2, theirs.time_embedding.linear_2)]
    pairs += [
        (down.resample[1], block.downsamplers[0].conv)
        for down, block in zip(ours.down, theirs.down_blocks[:-1], strict=True)
    ]
    pairs += [
        (up.resample[1], block.upsamplers[0].conv) for up, block in zip(ours.up, theirs.up_blocks[:-1], strict=True)
    ]
    levels = [*zip(ours.encoder, theirs.down_blocks, strict=True), *zip(ours.decoder, theirs.up_blocks, strict=True)]
    attentions = []
    for stages, block in [*levels, (ours.middle, theirs.mid_block)]:
        for stage, resnet in zip(stages, block.resnets, strict=True):
            pairs += resnet_pairs(stage.block, resnet)
        pairs_here = [stage.attention for stage in stages if stage.attention is not None]
        attentions += zip(pairs_here, getattr(block, "attentions", []), strict=True)
    for attention, their_attention in attentions:
        pairs += [(attention.norm, their_attention.group_norm), (attention.out, their_attention.to_out[0])]
        maps = (their_attention.to_q, their_attention.to_k, their_attention.to_v)
        attention.qkv.weight.data = torch.cat([m.weight for m in maps])
        attention.qkv.bias.data = torch.cat([m.bias for m in maps])
    copy_weights(pairs)

    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(x, torch.tensor([421])).sample
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x, torch.tensor([421.0])), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_resampling_blocks_agree_with_diffusers(direction, scale_shift):
    resnet = pytest.importorskip("diffusers.models.resnet")
    from lit_diffusion.backbones.layers import GroupNorm
    from lit_diffusion.backbones.resampling import FIRDown, FIRUp

    torch.manual_seed(0)
    theirs = resnet.ResnetBlock2D(
        in_channels=128,
        temb_channels=16,
        kernel="fir",
        output_scale_factor=math.sqrt(2.0),
        time_embedding_norm="scale_shift" if scale_shift else "default",
        use_in_shortcut=True,
        **{direction: True},
    )
    resample = FIRUp() if direction == "up" else FIRDown()
    ours = ResidualBlock(
        128, 128, norm=GroupNorm, embedding=16, rescale=True, scale_shift=scale_shift, resample=resample
    )
    copy_weights(resnet_pairs(ours, theirs))
    x, embedding = torch.randn(2, 128, 8, 8), torch.randn(2, 16)
    # Their block applies silu to the embedding; ours is handed the result.
    torch.testing.assert_close(ours(x, nn.functional.silu(embedding)), theirs(x, embedding), rtol=0, atol=1e-4)
