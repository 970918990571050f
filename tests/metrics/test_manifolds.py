from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import ManifoldMetrics, Neighbourhood
from lit_diffusion.metrics.manifolds import compare_manifolds

CPU = torch.device("cpu")


def points(count, seed, scale=1.0, shift=0.0, dimension=8):
    return scale * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def means(samples, real, *args, block_mb=256):
    found = compare_manifolds(samples, Neighbourhood(real, CPU, block_mb), *args)
    return {name: float(parts.mean()) for name, parts in found.items()}


def by_definition(samples, real, precision_k, density_k):
    """As the papers have it, with all distances at once."""
    x, y = samples.double().numpy(), real.double().numpy()
    between = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    radius = lambda a, k: np.sort(between(a, a), axis=1)[:, k]  # column 0 is the point itself
    d = between(x, y)
    return {
        "precision": (d <= radius(y, precision_k)[None]).any(1).mean(),
        "recall": (d <= radius(x, precision_k)[:, None]).any(0).mean(),
        "density": (d <= radius(y, density_k)[None]).sum() / (density_k * len(x)),
        "coverage": (d.min(0) <= radius(y, density_k)).mean(),
    }


@pytest.mark.parametrize("block_mb", [256, 0])  # 0: one row at a time
@pytest.mark.parametrize(("count", "neighbours"), [(90, (3, 5)), (70, (3, 5)), (120, (6, 2))])
def test_they_are_the_papers(count, neighbours, block_mb):
    samples, real = points(count, 1, 1.2, 0.4), points(90, 2)
    expected = by_definition(samples, real, *neighbours)
    assert means(samples, real, *neighbours, block_mb=block_mb) == pytest.approx(expected, rel=1e-12)
    assert len({0.0, 1.0, *expected.values()}) == 6


@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_and_recall_are_torch_fidelitys(save_cpu_ram):
    samples, real = points(200, 1, 0.9, 0.4), points(300, 2)
    expected = prc_features_to_metric(
        samples, real, prc_neighborhood=3, prc_batch_size=70, save_cpu_ram=save_cpu_ram, verbose=False
    )
    found = means(samples, real)
    assert found["precision"] == pytest.approx(expected["precision"], rel=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], rel=1e-6)
    assert expected["precision"] != expected["recall"]


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    real = points(500, 1)
    found = means(real[:1] + points(500, 2, 0.01), real)
    assert found["precision"] == 1.0
    assert found["recall"] < 0.02
    assert found["coverage"] < 0.1


def test_a_wide_generator_recalls_all_and_is_imprecise():
    found = means(points(500, 2, 6.0), points(500, 1))
    assert found["recall"] == 1.0
    assert found["precision"] < 0.1
    assert found["density"] < 0.1


def test_the_same_law_has_density_and_coverage_near_1():
    found = means(points(600, 2), points(600, 1))
    assert found["density"] == pytest.approx(1.0, abs=0.1)
    assert found["coverage"] == pytest.approx(1.0 - 0.5**5, abs=0.04)  # Naeem et al. 2020, sec. 3.3
    far = means(points(100, 2, shift=100.0), points(100, 1))
    assert set(far.values()) == {0.0}


def test_each_contribution_is_of_one_sample_or_datum():
    samples, real = points(40, 1), points(60, 2)
    found = compare_manifolds(samples, Neighbourhood(real, CPU))
    assert {name: len(parts) for name, parts in found.items()} == {
        "precision": 40,
        "density": 40,
        "recall": 60,
        "coverage": 60,
    }
    assert {parts.dtype for parts in found.values()} == {torch.float64}


def test_the_metric_takes_the_samples_with_the_lowest_numbers():
    samples, real = points(90, 1), Neighbourhood(points(60, 2), CPU)
    metric = ManifoldMetrics(real, most=50)
    for part in torch.arange(90).flip(0).split(20):
        metric.update(samples[part], part)
    expected = compare_manifolds(samples[:50], real)
    assert all(torch.equal(parts, expected[name]) for name, parts in metric.compute().items())


@pytest.mark.parametrize(("samples", "real"), [(5, 90), (90, 5), (3, 3)])
def test_too_few_have_no_neighbourhoods(samples, real):
    with pytest.raises(UserError, match=f"more than 5 samples and data, there are {min(samples, real)}"):
        means(points(samples, 1), points(real, 2))
    assert means(points(6, 1), points(6, 2))["precision"] >= 0.0
