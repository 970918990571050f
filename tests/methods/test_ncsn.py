"""NCSN is the paper's objective on the paper's levels, written here from the paper."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import Convolutions, digits_data, fit, ncsn

from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import Condition
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSN
from lit_diffusion.samplers import AnnealedLangevin
from lit_diffusion.training.datamodule import Batch


def paper_loss(score, x, sigma, eps):
    """Eq. 5 weighted by sigma^2: ``sigma^2 / 2 |s(x~) + (x~ - x)/sigma^2|^2``."""
    noisy = x + sigma[:, None] * eps
    residual = score(noisy, sigma) + (noisy - x) / sigma[:, None] ** 2
    return 0.5 * sigma**2 * residual.square().sum(1)


@pytest.mark.parametrize(("parametrization", "power"), [("raw_score", 0), ("score", 1)])
def test_the_loss_is_the_papers(parametrization, power):
    torch.manual_seed(0)
    method = NCSN(MLP((3,), width=8, depth=1), 2.0, 0.1, 5, parametrization, "log_sigma").double()
    x = torch.randn(64, 3, dtype=torch.float64)
    caught = {}
    at = method.objective.at
    method.objective.at = lambda d, x0, t, eps, *rest: (caught.update(t=t, eps=eps), at(d, x0, t, eps, *rest))[1]
    with torch.no_grad():
        loss = method.loss(Batch(x, torch.arange(64)), seed=4).per_sample
        sigmas = torch.tensor([0.1 * (2.0 / 0.1) ** (k / 4) for k in range(5)], dtype=torch.float64)
        sigma = sigmas[(caught["t"] * 5).round().long() - 1]

        def score(noisy, level):
            return method.denoiser.backbone(noisy, level.log().float()) / level[:, None] ** power

        expected = paper_loss(score, x, sigma, caught["eps"].double())
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert len(set(caught["t"].tolist())) == 5


def test_all_levels_are_drawn_alike():
    method = ncsn(num_levels=10)
    x = torch.zeros(20_000, 1, 8, 8)
    t = method.loss(Batch(x, torch.arange(len(x))), seed=0).t
    counts = torch.bincount((t * 10).round().long() - 1, minlength=10)
    assert float((counts - 2000).abs().max()) < 5 * 2000**0.5


def test_the_papers_defaults():
    method = NCSN(Convolutions())
    process = method.denoiser.process
    sigmas = process.sigma(process.grid())
    assert sigmas.tolist() == pytest.approx([0.01 * 100 ** (k / 9) for k in range(10)])
    assert method.denoiser.parametrization == "raw_score"
    assert isinstance(method.sampler, AnnealedLangevin)
    moves = method.sampler.plan(process)
    assert len(moves) == 1000
    assert moves[0].eta == pytest.approx(
        4e-5 * (1.0 / 0.01) ** 2
    )  # the paper's alpha_1 = 2e-5 sigma_1^2/sigma_L^2, twice
    assert moves[-1].eta == pytest.approx(4e-5)
    assert isinstance(method.configure_optimizers()[0], torch.optim.Adam)
    assert method.configure_optimizers()[0].param_groups[0]["lr"] == 1e-3
    method.sampler.check(method.denoiser)


def test_the_network_receives_the_index_of_the_noise_level():
    method, told = NCSN(Convolutions(), num_levels=10), []
    method.denoiser.backbone.register_forward_hook(lambda module, args, out: told.append(args[1]))
    method.loss(Batch(torch.zeros(500, 1, 8, 8), torch.arange(500)), seed=0)
    assert sorted(set(told[0].tolist())) == list(range(10))


def test_labels_reach_the_network():
    method = ncsn(network={"num_classes": 10})
    x = torch.zeros(4, 1, 8, 8)
    losses = [
        method.loss(Batch(x, torch.arange(4), Condition(label=torch.full((4,), label))), seed=0).per_sample
        for label in (0, 0, 7)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_the_loss_of_an_image_does_not_depend_on_its_batch():
    method = ncsn()
    x = torch.rand(16, 1, 8, 8)
    whole = method.loss(Batch(x, torch.arange(16)), seed=2).per_sample
    parts = [
        method.loss(Batch(x[k : k + 3], torch.arange(k, min(k + 3, 16))), seed=2).per_sample for k in range(0, 16, 3)
    ]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)
    assert not torch.allclose(whole, method.loss(Batch(x, torch.arange(16)), seed=3).per_sample)
    assert not torch.allclose(whole, method.loss(Batch(x, torch.arange(16) + 1), seed=2).per_sample)


def test_it_learns(tmp_path):
    method = ncsn(network={"channels": 16})
    made = fit(method, digits_data(64), tmp_path, 64 * 150, limit_val_batches=1.0)
    zero = 0.5 * 64  # of a network that says nothing
    assert float(made.callback_metrics["val/loss"]) < 0.62 * zero


def test_levels_that_are_none_are_refused():
    for keys in ({"sigma_min": 3.0}, {"num_levels": 1}, {"parametrization": "epsilon"}, {"c_noise": "sigma"}):
        with pytest.raises(UserError):
            ncsn(**keys)
