from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics
from torch_fidelity.metric_kid import kid_features_to_metric

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import KernelDistance
from lit_diffusion.metrics.kernel import squared_mmd


def features(count, seed, shift=0.0, dimension=6):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def score(x, reference, *args, **keys):
    metric = KernelDistance(reference, *args, **keys)
    metric.update(x, torch.arange(len(x)))
    return metric.compute()


def test_it_is_the_sum_over_different_pairs():
    x, y = features(5, 1).double(), features(5, 2, 0.5).double()
    k = lambda a, b: float((a @ b / 6 + 1) ** 3)
    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(k(a, b) for a in x for b in y) / 25
    assert squared_mmd(x, y) == pytest.approx(within - 2 * between, rel=1e-12)


@pytest.mark.parametrize(("subsets", "size", "seed"), [(7, 20, 2020), (3, 40, 11)])
def test_it_is_torch_fidelitys(subsets, size, seed):
    x, y = features(40, 1), features(60, 2, 0.5)
    expected = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    mean, deviation = score(x, y, subsets, size, seed)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert score(x, y, subsets, size, seed + 1)[0] != mean


def test_of_whole_sets_it_is_torchmetrics():
    x, y = features(50, 1), features(50, 2, 0.5)
    theirs = torchmetrics.image.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=50)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert score(x, y, 1, 50)[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_it_is_unbiased_at_any_size():
    """Of two Gaussians N(0, I) and N(m, I) in one dimension: ``E k(x, y) = E (xy + 1)^3``, by moments."""
    moment = lambda m: np.array([1.0, m, m**2 + 1, m**3 + 3 * m])
    expected_kernel = lambda a, b: float((np.array([1, 3, 3, 1]) * moment(a) * moment(b)).sum())
    exact = expected_kernel(0, 0) + expected_kernel(0.7, 0.7) - 2 * expected_kernel(0, 0.7)
    found = [squared_mmd(features(4, k, 0, 1).double(), features(4, 10**6 + k, 0.7, 1).double()) for k in range(8000)]
    assert abs(np.mean(found) - exact) < 4.0 * np.std(found) / 8000**0.5
    assert np.std(found) / 8000**0.5 < 0.1 * exact


def test_a_small_set_makes_small_subsets():
    x, y = features(8, 1), features(60, 2)
    assert score(x, y, 4, 1000) == score(x, y, 4, 8)


def test_near_equal_sets_keep_their_digits():
    """In float32 the cubes' sum cancels to nothing but rounding."""
    x = features(200, 1, 30.0)
    assert score(x, x + 1e-4, 1, 200)[0] == pytest.approx(
        kid_features_to_metric(x.double(), (x + 1e-4).double(), kid_subsets=1, kid_subset_size=200, verbose=False)[
            "kernel_inception_distance_mean"
        ],
        rel=1e-6,
    )


def test_the_deviation_over_subsets_is_an_error_only_where_they_differ():
    """Against what other sets of the same laws would give."""
    spread = np.std([squared_mmd(features(30, k).double(), features(30, 10**6 + k).double()) for k in range(100)])
    for size, count, honest in ((30, 300, True), (225, 300, True), (226, 300, False), (1000, 300, False)):
        metric = KernelDistance(features(301, 2), 100, size)
        assert metric.has_error(count) is honest
    metric = KernelDistance(features(300, 2), 100, 30)
    metric.update(features(300, 1), torch.arange(300))
    assert metric.compute()[1] == pytest.approx(spread, rel=0.4)
    assert not KernelDistance(features(300, 2), 1, 30).has_error(300)


def test_of_two_whole_sets_there_is_one_subset():
    metric = KernelDistance(features(50, 2), 100, 1000)
    assert (metric.drawn(50), metric.drawn(40), metric.drawn(60)) == ((1, 50), (100, 40), (100, 50))
    metric.update(x := features(50, 1), torch.arange(50))
    assert metric.compute() == (pytest.approx(squared_mmd(x.double(), features(50, 2).double()), rel=1e-9), 0.0)


@pytest.mark.parametrize("count", [0, 1])
def test_one_sample_has_no_pair(count):
    with pytest.raises(UserError, match="at least 2 of each set"):
        score(features(count, 1), features(9, 2))
