"""A compiled backbone is one graph for one batch size, whatever the number of rows that it is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.tiny import digits_data, fit, ncsn, same, weights
from torch._dynamo.testing import CompileCounter

from lit_diffusion.backbones import UNet
from lit_diffusion.callbacks import EMA
from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.evaluation.sampling import generate_in_batches
from lit_diffusion.methods import NCSN
from lit_diffusion.processes import VE
from lit_diffusion.samplers import AnnealedLangevin


def network(**keys):
    keys = {"channels": 8, "mult": (1, 2), "blocks": 1, "attention": (), "num_classes": 4, "zero_init": False, **keys}
    torch.manual_seed(0)
    return UNet((1, 8, 8), **keys)


def gradients(denoiser, x, t, cond):
    """The prediction, and its gradients by the data and by the weights."""
    denoiser.zero_grad()
    x = x.clone().requires_grad_()
    score = denoiser(x, t, cond).score
    (score.square() * torch.arange(1.0, 1.0 + len(x)).view(-1, 1, 1, 1)).sum().backward()
    return score.detach(), x.grad, torch.cat([p.grad.flatten() for p in denoiser.parameters()])


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_any_number_of_rows_gives_what_it_gives_without(count):
    denoiser = NetworkDenoiser(network(), VE(0.1, 2.0), "score", "log_sigma")
    seen = []
    denoiser.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    t = torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=0.1)
    cond = Condition(label=torch.arange(count) % 4)
    plain = gradients(denoiser, x, t, cond)
    assert seen == [count]
    denoiser.backbone.rows = 4
    seen.clear()
    for mine, expected in zip(gradients(denoiser, x, t, cond), plain, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert seen == [4] * -(-count // 4)


@pytest.fixture
def compiler(monkeypatch):
    """Counts graphs and runs them as they are; takes the place of the real compiler, which takes minutes."""
    torch._dynamo.reset()
    counter, asked = CompileCounter(), []
    whole = torch.nn.Module.compile

    def compile_with_the_counter(self, **keys):
        asked.append(keys)
        whole(self, backend=counter, **keys)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_the_counter)
    counter.asked = asked
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "keys",
    [
        {"num_classes": None},
        {"attention": (4,), "dropout": 0.1, "scale_shift": True},
        {"resampling": "fir", "resample_in_block": True, "rescale_residual": True, "progressive_input": "residual"},
        {"time_embedding": "fourier", "heads": 2},
    ],
)
def test_the_unet_is_one_graph(compiler, keys):
    """``fullgraph`` raises where there is a break."""
    denoiser = NetworkDenoiser(network(**keys), VE(0.1, 2.0), "score", "log_sigma")
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5, dtype=torch.float64)
    cond = None if denoiser.backbone.num_classes is None else Condition(label=torch.arange(3))
    denoiser.eval()
    plain = denoiser(x, t, cond).score
    denoiser.backbone.run_as(compiled=True)
    with torch.no_grad():
        assert torch.allclose(denoiser(x, t, cond).score, plain, atol=1e-5)
    assert compiler.asked == [{"fullgraph": True, "dynamic": False}]
    assert compiler.frame_count == 1


def method(**keys):
    torch.manual_seed(0)
    keys = {"optimizer": partial(torch.optim.Adam, lr=1e-2), **keys}
    backbone = network(mult=(1,), num_classes=None)
    walk = AnnealedLangevin(steps_per_level=2, eta=1e-3, denoise=True)
    return NCSN(backbone, sigma_max=2.0, sigma_min=0.1, num_levels=3, c_noise="log_sigma", sampler=walk, **keys)


def test_nothing_is_compiled_twice(tmp_path, compiler):
    """Training, its held-out loss, sampling in batches of 16, 16 and 5 with other weights: one graph a grad mode."""
    made, ema = method(), EMA([64])
    data = digits_data(micro_batch_size=16)
    fit(made, data, tmp_path, 96, callbacks=[ema], compile=True, limit_val_batches=1.0)
    assert made.denoiser.backbone.rows == 16
    graphs = [compiler.frame_count]
    for weights_of in ("ema", "raw", "ema"):
        with ema.applied(made, weights_of):
            sizes = [len(batch.x) for batch in generate_in_batches(made, torch.arange(37), 0, 16, show_progress=False)]
        assert sizes == [16, 16, 5]
        graphs.append(compiler.frame_count)
    fit(made, data, tmp_path, 128, callbacks=[ema])
    graphs.append(compiler.frame_count)
    assert graphs == [2, 2, 2, 2, 2]  # To train with gradients, to evaluate without.


def test_compiled_averages_are_the_averages(tmp_path, compiler):
    """Weights that are written over in place are seen by the graph."""
    ends = []
    for compiled in (False, True):
        made, ema = method(), EMA([64])
        fit(made, digits_data(micro_batch_size=16), tmp_path, 96, callbacks=[ema], compile=compiled)
        with ema.applied(made, "ema"):
            (batch,) = generate_in_batches(made, torch.arange(5), 0, 16, show_progress=False)
        ends.append((batch.x, weights(made), ema.shadows[0]))
    (x, raw, average), (y, compiled_raw, compiled_average) = ends
    assert torch.allclose(x, y, atol=1e-4)
    assert raw.keys() == compiled_raw.keys()
    for name in raw:
        assert torch.allclose(raw[name], compiled_raw[name], atol=1e-5), name
        assert torch.allclose(average[name], compiled_average[name], atol=1e-5), name
    assert not same(raw, average)


def test_a_training_without_a_data_module_of_ours_is_compiled_for_what_comes(compiler):
    denoiser = ncsn().denoiser
    denoiser.backbone.run_as(compiled=True)
    for count in (2, 3, 2):
        denoiser(torch.randn(count, 1, 8, 8), torch.ones(count, dtype=torch.float64))
    assert denoiser.backbone.rows is None
