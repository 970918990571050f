from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_diffusion.backbones.embeddings import FourierFeatures, NoiseEmbedding, PositionalFeatures
from lit_diffusion.backbones.layers import ConditionalInstanceNorm, GroupNorm, Pointwise, conv3x3, group_count
from lit_diffusion.backbones.resampling import (
    AverageDown,
    FIRBlur,
    FIRDown,
    FIRUp,
    NearestUp,
    downsampling,
    strided_conv,
    upsampling,
)
from lit_diffusion.errors import UserError

FIR = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]) / 64.0


def filtered(image: np.ndarray, before: int, after: int) -> np.ndarray:
    """The image, padded by zeros, filtered pixel by pixel."""
    image = np.pad(image, (before, after))
    sides = [side - 3 for side in image.shape]
    return np.array([[(FIR * image[i : i + 4, j : j + 4]).sum() for j in range(sides[1])] for i in range(sides[0])])


def test_conditional_instance_norm_is_its_formula():
    torch.manual_seed(0)
    norm = ConditionalInstanceNorm(6, num_levels=4)
    torch.nn.init.normal_(norm.table.weight)
    x = 3.0 * torch.randn(2, 6, 5, 5) + torch.randn(2, 6, 1, 1)
    level = [2, 0]
    expected = np.empty_like(x.numpy())
    for b, image in enumerate(x.double().numpy()):
        gamma, alpha, beta = norm.table.weight[level[b]].detach().double().numpy().reshape(3, 6)
        mu = image.mean(axis=(1, 2))
        m, v = mu.mean(), np.sqrt(mu.var() + 1e-5)
        for k in range(6):
            s = np.sqrt(image[k].var() + 1e-5)
            expected[b, k] = gamma[k] * (image[k] - mu[k]) / s + beta[k] + alpha[k] * (mu[k] - m) / v
    np.testing.assert_allclose(norm(x, torch.tensor(level)).detach(), expected, rtol=1e-5, atol=1e-5)


def test_conditional_instance_norm_starts_near_gamma_1_alpha_1_beta_0():
    torch.manual_seed(0)
    gamma, alpha, beta = ConditionalInstanceNorm(100, num_levels=50).table.weight.detach().chunk(3, dim=1)
    for table in (gamma, alpha):
        assert table.mean().item() == pytest.approx(1.0, abs=0.002)
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
    assert (beta == 0.0).all()


def test_normalisation_keeps_the_dtype_and_group_norm_its_groups():
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert GroupNorm(8)(x).dtype == torch.bfloat16
        assert ConditionalInstanceNorm(8, 3)(x, torch.tensor([0, 2])).dtype == torch.bfloat16
    counts = {2: 1, 4: 1, 8: 2, 24: 6, 32: 8, 48: 12, 60: 15, 64: 16, 100: 25, 128: 32, 200: 25, 256: 32, 384: 32}
    assert {channels: group_count(channels) for channels in counts} == counts
    normal = GroupNorm(64)(5.0 + 3.0 * torch.randn(2, 64, 4, 4)).detach().view(2, 16, -1)
    torch.testing.assert_close(normal.mean(dim=2), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.std(dim=2, correction=0), torch.ones(2, 16), rtol=0, atol=1e-4)


def test_pointwise_is_a_matrix_at_each_pixel():
    torch.manual_seed(0)
    layer = Pointwise(3, 5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 4)
    expected = torch.einsum("oc,bchw->bohw", layer.weight, x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


def test_initial_weights_keep_the_variance():
    torch.manual_seed(0)
    for layer, fans in ((conv3x3(32, 64), 9 * (32 + 64)), (Pointwise(128, 64), 128 + 64)):
        assert layer.weight.var().item() == pytest.approx(2.0 / fans, rel=0.05)
        assert (layer.bias == 0.0).all()


def test_fir_is_the_direct_convolution():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 8))
    zeros_between = np.zeros((2, 3, 12, 16))
    zeros_between[:, :, ::2, ::2] = x
    tensor = torch.from_numpy(x)
    for b in range(2):
        for c in range(3):
            np.testing.assert_allclose(FIRDown()(tensor)[b, c], filtered(x[b, c], 1, 1)[::2, ::2], rtol=1e-6)
            np.testing.assert_allclose(FIRBlur()(tensor)[b, c], filtered(x[b, c], 2, 2), rtol=1e-6)
            np.testing.assert_allclose(FIRUp()(tensor)[b, c], 4.0 * filtered(zeros_between[b, c], 2, 1), rtol=1e-6)


@pytest.mark.parametrize("layer", [FIRDown(), FIRUp(), AverageDown(), NearestUp()], ids=lambda m: type(m).__name__)
def test_a_constant_image_stays_constant_away_from_the_border(layer):
    out = layer(torch.full((1, 2, 8, 8), 1.7))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(out, torch.full_like(out, 1.7))


@pytest.mark.parametrize(("down", "up"), [(FIRDown(), FIRUp()), (AverageDown(), NearestUp())])
def test_up_is_four_times_the_adjoint_of_down(down, up):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(4.0 * (down(x) * y).sum(), (x * up(y)).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "nearest", "fir"])
def test_resampling_shapes_format_and_state(kind):
    x = torch.randn(2, 4, 6, 8).contiguous(memory_format=torch.channels_last)
    for module, shape in ((downsampling(kind, 4), (2, 4, 3, 4)), (upsampling(kind, 4), (2, 4, 12, 16))):
        out = module(x)
        assert out.shape == shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert bool(module.state_dict()) == (kind == "conv")
    for blur in (False, True):
        assert strided_conv(4, 7, blur)(x).shape == (2, 7, 3, 4)


def test_positional_features_are_their_formula():
    c_noise = np.array([0.0, 1.0, 999.0, 0.25])
    w = 10000.0 ** (-np.arange(8) / 7.0)
    angle = c_noise[:, None] * w
    expected = np.concatenate((np.sin(angle), np.cos(angle)), axis=1)
    got = PositionalFeatures(16)(torch.from_numpy(c_noise).float())
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_fourier_features_are_their_formula():
    features = FourierFeatures(2000, scale=16.0)
    assert features.frequencies.std().item() == pytest.approx(16.0, rel=0.1)
    assert features.frequencies.mean().item() == pytest.approx(0.0, abs=1.5)
    c_noise = torch.tensor([-4.6, 0.0, 3.9])
    angle = 2.0 * np.pi * np.outer(c_noise.double(), features.frequencies.double())
    expected = np.concatenate((np.sin(angle), np.cos(angle)), axis=1)
    np.testing.assert_allclose(features(c_noise), expected, atol=2e-4)


def test_fourier_frequencies_are_constants_in_the_checkpoint():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = FourierFeatures(16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(FourierFeatures(16).frequencies, first.frequencies)
    assert set(first.state_dict()) == {"frequencies"}
    assert not list(first.parameters())


@pytest.mark.parametrize("make", [lambda: PositionalFeatures(15), lambda: PositionalFeatures(2)])
def test_features_come_in_pairs(make):
    with pytest.raises(UserError, match="even"):
        make()


def test_embedding_adds_the_class_to_the_noise():
    torch.manual_seed(0)
    c_noise = torch.tensor([0.0, 500.0])
    both, classes = NoiseEmbedding(8, 32, num_classes=2), NoiseEmbedding(8, 32, "none", num_classes=2)
    assert both(c_noise).shape == (2, 32)
    torch.testing.assert_close(classes(c_noise)[0], torch.nn.functional.silu(classes.table.weight[2]))
    with torch.no_grad():
        both.table.weight.zero_()
    alone = NoiseEmbedding(8, 32)
    alone.load_state_dict(both.state_dict() | {}, strict=False)
    torch.testing.assert_close(both(c_noise), alone(c_noise))
