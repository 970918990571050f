from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from lit_diffusion.metrics import bootstrap_interval, frechet_distance, gaussian_of
from lit_diffusion.metrics.bootstrap import unanimous_interval


def normal(count, seed, dimension=1):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_the_normal_one():
    x = normal(400, 0)[:, 0]
    low, high = bootstrap_interval(lambda chosen: float(x[chosen].mean()), 400, 2000)
    half = 1.96 * float(x.std()) / 20.0
    assert 0.5 * (low + high) == pytest.approx(float(x.mean()), abs=0.1 * half)
    assert 0.5 * (high - low) == pytest.approx(half, rel=0.1)


def test_it_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        x = normal(40, seed)[:, 0]
        low, high = bootstrap_interval(lambda chosen, x=x: float(x[chosen].mean()), 40, 100, seed)
        covered += low < 0.0 < high
    assert 0.85 < covered / 100 < 0.99


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_it_is_the_central_part_of_the_resamples(confidence):
    x = normal(50, 1)[:, 0]
    found = []

    def mean(chosen):
        found.append(float(x[chosen].mean()))
        return found[-1]

    interval = bootstrap_interval(mean, 50, 300, confidence=confidence)
    values = np.array(found[:300]) + found[300] - np.mean(found[:300])
    assert interval == pytest.approx(tuple(np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])))


def test_a_resample_draws_every_datum_equally_often():
    counts = torch.zeros(7)

    def note(chosen):
        assert len(chosen) == 7
        counts.add_(torch.bincount(chosen, minlength=7))
        return 0.0

    bootstrap_interval(note, 7, 3000)
    assert float((counts - 3001).abs().max()) < 4.5 * 3001**0.5
    assert float((counts - 3001).abs().max()) > 1.0  # With replacement.


def test_the_interval_of_a_biased_statistic_is_about_its_figure():
    """A resample's Frechet distance is larger: it has fewer different samples."""
    reference, x = gaussian_of(normal(5000, 0, 10)), normal(200, 1, 10)
    statistic = lambda chosen: frechet_distance(reference, gaussian_of(x[chosen]))
    figure = statistic(torch.arange(200))
    low, high = bootstrap_interval(statistic, 200, 100)
    assert low < figure < high
    assert 0.5 * (low + high) == pytest.approx(figure, abs=0.15 * (high - low))


def test_the_seed_decides():
    x = normal(50, 1)[:, 0]
    mean = lambda chosen: float(x[chosen].mean())
    assert bootstrap_interval(mean, 50, 50, 1) == bootstrap_interval(mean, 50, 50, 1)
    assert bootstrap_interval(mean, 50, 50, 1) != bootstrap_interval(mean, 50, 50, 2)


@pytest.mark.parametrize("count", [1, 7, 500])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_none_or_all_has_the_exact_interval(share, count):
    """No copies among seven samples do not mean that there are none among a thousand."""
    expected = binomtest(int(share * count), count).proportion_ci(0.95)
    assert unanimous_interval(share, count) == pytest.approx((expected.low, expected.high), rel=1e-9)
