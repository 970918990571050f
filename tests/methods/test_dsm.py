"""Denoising score matching at one level: Vincent's autoencoder is it, and it finds the score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import fit, toy_dsm

from lit_diffusion.backbones import TiedAutoencoder
from lit_diffusion.backbones.base import Backbone
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.methods import DSM
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.samplers import Langevin
from lit_diffusion.training.datamodule import Batch, DataModule

SIGMA = 0.4


class Linear(Backbone):
    """``W x + b``: all that the score of a Gaussian needs."""

    def __init__(self, dimension):
        super().__init__()
        self.data_shape = (dimension,)
        self.layer = torch.nn.Linear(dimension, dimension)

    def forward(self, x, c_noise, cond=None):
        return self.layer(x)


def autoencoder(**keys):
    torch.manual_seed(0)
    return DSM(TiedAutoencoder((5,), hidden=7), SIGMA, parametrization="x0", **keys)


def at_level(method, x):
    return method.denoiser(x, torch.ones(len(x), dtype=torch.float64))


def test_its_loss_is_the_autoencoders_reconstruction_error_over_twice_sigma_squared():
    """``sigma^2/2 |s + eps/sigma|^2`` with ``s = (F(x~) - x~)/sigma^2``, ``x~ = x + sigma eps`` is
    ``|F(x~) - x|^2 / (2 sigma^2)``: Vincent's reconstruction error up to a constant."""
    method = autoencoder()
    x, index = torch.randn(32, 5), torch.arange(100, 132)
    noisy = x + SIGMA * keyed_normal(3, "noise", index, (5,))
    with torch.no_grad():
        reconstruction = (method.denoiser.backbone(noisy, None) - x).square().sum(1)
        loss = method.loss(Batch(x, index), seed=3).per_sample
    assert torch.allclose(loss, reconstruction / (2 * SIGMA**2), rtol=1e-4)


def test_its_score_is_the_reconstruction_minus_the_input_over_sigma_squared():
    method, x = autoencoder(), torch.randn(8, 5)
    with torch.no_grad():
        expected = (method.denoiser.backbone(x, None) - x) / SIGMA**2
        assert torch.allclose(at_level(method, x).score, expected, rtol=1e-4, atol=1e-5)


def test_its_score_is_the_gradient_of_vincents_energy():
    """``E = -(c.x - |x|^2/2 + sum_j softplus(W_j.x + b_j)) / sigma^2`` and ``s = -grad E``."""
    method = autoencoder()
    network = method.denoiser.backbone
    for p in network.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    x = torch.randn(8, 5, requires_grad=True)
    hidden = torch.nn.functional.softplus(x @ network.weight.T + network.hidden_bias).sum(1)
    energy = -(x @ network.bias - 0.5 * x.square().sum(1) + hidden) / SIGMA**2
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    assert torch.allclose(at_level(method, x).score, -gradient, rtol=1e-4, atol=1e-4)


def test_tweedie_turns_the_score_into_a_denoiser():
    method, x = toy_dsm(), torch.randn(8, 2)
    with torch.no_grad():
        prediction = at_level(method, x)
    assert torch.allclose(prediction.x0, x + 0.5**2 * prediction.score, atol=1e-6)


def test_a_linear_network_finds_the_score_of_a_gaussian(tmp_path):
    """Data N(m, C): the score at sigma is -(C + sigma^2 I)^-1 (x - m), linear in x."""
    factor = np.array([[1.0, 0.0], [0.6, 0.5]])
    mean = np.array([0.5, -1.0])
    normal = keyed_normal(0, "test", torch.arange(20_000), (2,), dtype=torch.float64).numpy()
    values = (normal @ factor.T + mean).astype(np.float32)
    torch.manual_seed(0)
    method = DSM(Linear(2), SIGMA, optimizer=lambda p: torch.optim.Adam(p, lr=2e-2))
    data = DataModule(InMemory(values, num_grey_levels=None), 512, held_out_fraction=0.0)
    fit(method, data, tmp_path, 512 * 400)
    covariance, centre = np.cov(values.T), values.mean(0)
    precision = np.linalg.inv(covariance + SIGMA**2 * np.eye(2))
    layer = method.denoiser.backbone.layer
    found = layer.weight.detach().numpy() / SIGMA  # the score is F / sigma
    assert np.abs(found + precision).max() < 0.06 * np.abs(precision).max()
    assert np.abs(layer.bias.detach().numpy() / SIGMA - precision @ centre).max() < 0.06
    # and the loss is down to that of the best score: half of D - sigma^2 tr(precision)
    best = 0.5 * (2 - SIGMA**2 * np.trace(precision))
    x = torch.from_numpy(values)
    with torch.no_grad():
        loss = method.loss(Batch(x, torch.arange(len(x))), seed=9).per_sample
    assert float(loss.mean()) == pytest.approx(best, abs=0.02)


def test_its_samples_have_the_smoothed_variance(tmp_path):
    """Langevin with the exact linear score: N(0, C + sigma^2), wider by the step's own bias 1/(1 - eta/4 v)."""
    method = DSM(Linear(1), SIGMA, sampler=Langevin(steps=150, eta=0.3, uniform_range=(-2.0, 2.0)))
    variance = 1.0 + SIGMA**2
    method.denoiser.backbone.layer.weight.data.fill_(-SIGMA / variance)
    method.denoiser.backbone.layer.bias.data.zero_()
    data = DataModule(InMemory(np.zeros((4, 1), np.float32), num_grey_levels=None), 2)
    method.data_spec = data.data_spec
    x = method.generate(torch.arange(20_000), 0).x
    assert float(x.var()) == pytest.approx(variance / (1 - 0.3 / (4 * variance)), rel=0.04)
    assert abs(float(x.mean())) < 0.04


def test_its_default_sampler_fits_it():
    method = DSM(Linear(2), 0.05)
    method.sampler.check(method.denoiser)
    assert method.sampler.eta == pytest.approx(0.1 * 0.05**2)
    assert len(method.sampler.plan(method.denoiser.process)) == 1000
