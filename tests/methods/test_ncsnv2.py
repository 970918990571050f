"""NCSNv2's techniques, each against a computation that does not use its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny import Convolutions, digits, digits_data, fit
from scipy.spatial.distance import pdist

from lit_diffusion.backbones import UNet
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSNv2
from lit_diffusion.methods.ncsnv2 import best_eta, level_count, level_ratio, variance_ratio

AUTO = {"sigma_max": "auto", "sigma_min": 0.01, "num_levels": "auto", "steps_per_level": 5, "eta": "auto"}


# ---- technique 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [5, 64, 784, 3072, 3 * 64 * 64])
def test_the_ratio_satisfies_its_equation(dimension):
    ratio = level_ratio(dimension)
    assert ratio > 1.0

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    centre = math.sqrt(2 * dimension) * (ratio - 1)
    assert phi(centre + 3 * ratio) - phi(centre - 3 * ratio) == pytest.approx(0.5, abs=1e-9)


def test_neighbouring_shells_overlap_by_a_half():
    """What the equation approximates: of N(0, s^2 I) half lies within 3 deviations of the shell of the level above."""
    dimension = 3072
    ratio = level_ratio(dimension)
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(8000, dimension, generator=generator).norm(dim=1)
    inside = (norms - math.sqrt(dimension) * ratio).abs() < 3.0 * ratio * math.sqrt(0.5)
    assert float(inside.double().mean()) == pytest.approx(0.5, abs=0.025)


def test_the_number_of_levels_is_about_the_papers():
    """The paper's tables (232, 500, 788, 1086) take a little more: an overlap of 0.57, not 0.5."""
    papers = ((50.0, 3072, 232), (90.0, 3 * 64**2, 500), (140.0, 3 * 96**2, 788), (190.0, 3 * 128**2, 1086))
    for sigma_max, dimension, levels in papers:
        assert 0.94 < level_count(sigma_max, 0.01, dimension) / levels <= 1.0


def test_few_dimensions_have_no_answer():
    with pytest.raises(UserError, match="num_levels: auto has no solution in 2 dimensions") as caught:
        level_count(20.0, 0.01, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sigma_max", "dimension"), [(50.0, 3072), (6.0, 64), (20.0, 8)])
def test_as_few_levels_as_keep_the_ratio(sigma_max, dimension):
    count, bound = level_count(sigma_max, 0.01, dimension), level_ratio(dimension)
    assert (sigma_max / 0.01) ** (1 / (count - 1)) <= bound * (1 + 1e-12)
    assert count == 2 or (sigma_max / 0.01) ** (1 / (count - 2)) > bound


# ---- technique 4 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [1e-3, 0.0621, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 100])
@pytest.mark.parametrize("ratio", [1.01, 1.0375, 2.0])
def test_the_variance_ratio_is_a_simulated_chains(e, steps, ratio):
    """Langevin at level s = 0.3 from the level above it, on data all at 0: the score is -x/s^2."""
    sigma = 0.3
    variance = (ratio * sigma) ** 2
    step = e * sigma**2  # alpha of x + alpha s(x) + sqrt(2 alpha) z
    for _ in range(steps):
        variance = (1 - step / sigma**2) ** 2 * variance + 2 * step
    assert variance_ratio(e, steps, ratio) == pytest.approx(variance / sigma**2, rel=1e-12)


def test_the_variance_ratio_carries_over_from_level_to_level():
    """The chain through all of CIFAR-10's levels ends near sigma_L^2 with the step found, and not with others."""
    sigmas = np.geomspace(50.0, 0.01, 232)

    def end(eta):
        variance = 50.0**2
        for sigma in sigmas:
            alpha = 0.5 * eta * (sigma / sigmas[-1]) ** 2
            for _ in range(5):
                variance = (1 - alpha / sigma**2) ** 2 * variance + 2 * alpha
        return variance / 0.01**2

    eta = best_eta(50.0, 0.01, 232, 5)
    assert abs(end(eta) - 1) < 0.15
    assert abs(end(0.3 * eta) - 1) > abs(end(eta) - 1)
    assert abs(end(10.0 * eta) - 1) > abs(end(eta) - 1)


def test_cifars_step_is_the_papers_doubled():
    eta = best_eta(50.0, 0.01, 232, 5)
    assert f"{eta:.3g}" == "1.24e-05"
    assert f"{eta / 2:.2g}" == "6.2e-06"  # the paper's table


@pytest.mark.parametrize(
    ("sigma_max", "sigma_min", "levels", "steps"), [(50, 0.01, 232, 5), (6, 0.1, 30, 3), (20, 0.3, 15, 100)]
)
def test_no_other_step_is_better(sigma_max, sigma_min, levels, steps):
    ratio = (sigma_max / sigma_min) ** (1 / (levels - 1))
    best = abs(variance_ratio(best_eta(sigma_max, sigma_min, levels, steps) / (2 * sigma_min**2), steps, ratio) - 1)
    others = [abs(variance_ratio(e, steps, ratio) - 1) for e in np.geomspace(1e-6, 0.999, 20_000)]
    assert best <= min(others) + 1e-9
    assert best_eta(sigma_max, sigma_min, levels, steps) < 4 * sigma_min**2


# ---- auto --------------------------------------------------------------------------------------------------------


def test_auto_values_come_from_the_training_data_and_are_said():
    data, said = digits_data(), []
    found = NCSNv2.resolve_auto(AUTO, data, said.append)
    values = np.stack([digits().value(int(i)) for i in data.train_indices]).reshape(1761, 64) / 16.0
    diameter = pdist(values).max()
    assert found["sigma_max"] == pytest.approx(diameter, rel=2e-4)
    assert found["num_levels"] == level_count(found["sigma_max"], 0.01, 64)
    assert found["eta"] == pytest.approx(best_eta(found["sigma_max"], 0.01, found["num_levels"], 5), rel=1e-3)
    assert {type(value) for value in found.values()} == {float, int}
    assert len(said) == 3
    assert all("\n" not in line for line in said)
    assert f"sigma_max {found['sigma_max']:g}" in said[0]
    assert "1761 training data, all pairs compared" in said[0]
    assert f"num_levels {found['num_levels']}" in said[1]
    assert f"eta {found['eta']:g}" in said[2]


def test_the_range_scales_sigma_max():
    keys = {**AUTO, "num_levels": 3, "eta": 1e-5}
    unit = NCSNv2.resolve_auto(keys, digits_data(), lambda line: None)
    double = NCSNv2.resolve_auto(keys, digits_data(value_range=(-1.0, 1.0)), lambda line: None)
    assert unit.keys() == {"sigma_max"}
    assert double["sigma_max"] == pytest.approx(2 * unit["sigma_max"], rel=1e-3)


def test_given_numbers_stay_and_later_ones_follow_from_them():
    said = []
    found = NCSNv2.resolve_auto({**AUTO, "sigma_max": 50.0, "num_levels": 232}, digits_data(), said.append)
    assert found == {"eta": 1.237e-05}
    assert len(said) == 1
    assert (
        NCSNv2.resolve_auto({**AUTO, "sigma_max": 5.0, "num_levels": 9, "eta": 1e-5}, digits_data(), said.append) == {}
    )
    assert len(said) == 1


def test_auto_in_python_code_is_refused():
    for keys in ({}, {"sigma_max": 5.0}, {"sigma_max": 5.0, "num_levels": 9}, {"num_levels": 9, "eta": 1e-5}):
        with pytest.raises(UserError, match="in Python code give the numbers") as caught:
            NCSNv2(Convolutions(), **keys)
        assert "\n" not in str(caught.value)


# ---- the method --------------------------------------------------------------------------------------------------


def test_its_defaults_are_the_papers():
    method = NCSNv2(Convolutions(), sigma_max=50.0, num_levels=232, eta=1.24e-5)
    assert method.denoiser.parametrization == "score"
    sampler = method.sampler
    assert (sampler.steps_per_level, sampler.eta, sampler.denoise, sampler.initial) == (5, 1.24e-5, True, "uniform")
    assert sampler.uniform_range == (0.0, 1.0)
    assert method.configure_optimizers()[0].param_groups[0]["lr"] == 1e-4
    sigmas = method.denoiser.process.sigma(method.denoiser.process.grid())
    assert (float(sigmas[0]), float(sigmas[-1])) == (pytest.approx(0.01), pytest.approx(50.0))


def test_the_network_is_blind_to_the_level():
    """Technique 3: the score at two levels is one function of x, divided by sigma."""
    torch.manual_seed(0)
    backbone = UNet(
        (1, 8, 8), channels=8, mult=[1], blocks=1, attention=[], middle_attention=False, time_embedding="none"
    )
    for p in backbone.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # not zero at the start
    method = NCSNv2(backbone, sigma_max=5.0, num_levels=6, eta=1e-5)
    x = torch.rand(3, 1, 8, 8)
    process = method.denoiser.process
    low, high = process.grid()[[0, 4]]
    with torch.no_grad():
        scores = [method.denoiser(x, torch.full((3,), float(t), dtype=torch.float64)).score for t in (low, high)]
    ratio = float(process.sigma(high) / process.sigma(low))
    assert float(scores[0].abs().max()) > 0.1
    assert torch.allclose(scores[0], ratio * scores[1], rtol=1e-4)


def test_it_trains(tmp_path):
    torch.manual_seed(0)
    method = NCSNv2(Convolutions(), sigma_max=5.0, sigma_min=0.1, num_levels=6, eta=1e-3)
    fit(method, digits_data(), tmp_path, 96)
    assert method.generate(torch.arange(2), 0).x.shape == (2, 1, 8, 8)
