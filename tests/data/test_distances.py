"""The largest distance: exact against scipy, and its bounds where not every pair is compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import digits_data
from scipy.spatial.distance import pdist

from lit_diffusion.data.distances import Diameter, largest_distance


def points(count, dimension, seed=0, shape=None):
    x = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return x if shape is None else x.view(count, *shape)


@pytest.mark.parametrize(("count", "dimension"), [(2, 3), (57, 1), (1500, 4), (2100, 64)])
def test_every_pair_is_compared(count, dimension):
    x = points(count, dimension)
    found = largest_distance(lambda i: x[i], count)
    assert found.found == found.upper == pytest.approx(pdist(x.double().numpy()).max(), rel=1e-12)
    assert found.count == count
    assert "all pairs compared" in found.statement


def test_the_farthest_pair_is_found_wherever_it_is():
    """Blocks of 1000: both in one block, in different blocks, at their edges."""
    for first, second in ((0, 1), (3, 999), (0, 1000), (999, 1000), (1, 2499), (2000, 2499)):
        x = points(2500, 3)
        x[first], x[second] = 100.0, -100.0
        assert largest_distance(lambda i, x=x: x[i], 2500).found == pytest.approx(200 * 3**0.5)


def test_close_points_far_from_the_origin_keep_their_digits():
    x = 1e4 + 1e-2 * points(300, 8)
    assert largest_distance(lambda i: x[i], 300).found == pytest.approx(pdist(x.double().numpy()).max(), rel=1e-9)


def test_so_do_the_bounds_of_a_subset():
    x = 1e6 + 1e-4 * points(300, 8).double()
    truth = pdist(x.numpy()).max()
    found = largest_distance(lambda i: x[i], 300, exact_up_to=20)
    assert 0.5 * truth < found.found <= truth * (1 + 1e-9)
    assert truth * (1 - 1e-9) <= found.upper < 3 * truth


def test_images_are_flattened():
    x = points(40, 12, shape=(3, 2, 2))
    assert largest_distance(lambda i: x[i], 40).found == pytest.approx(pdist(x.flatten(1).double().numpy()).max())


def test_the_digits():
    data = digits_data()
    everything = data.training_values(torch.arange(1761)).flatten(1).double().numpy()
    assert largest_distance(data.training_values, 1761).found == pytest.approx(pdist(everything).max(), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("subset", [2, 10, 200])
def test_of_a_subset_the_truth_lies_between_the_bounds(seed, subset):
    x = points(1300, 5, seed)
    x[seed] *= 3.0  # an outlier that the subset may not hold
    truth = pdist(x.double().numpy()).max()
    found = largest_distance(lambda i: x[i], 1300, exact_up_to=subset)
    assert found.found <= truth * (1 + 1e-12)
    assert truth <= found.upper * (1 + 1e-12)
    assert found.found >= 0.5 * found.upper / 3**0.5
    assert "at most" in found.statement
    assert f"{found.upper:.4g}" in found.statement
    assert f"all pairs of {subset}" in found.statement


def test_the_second_pass_finds_what_the_subset_lacks():
    x = points(1300, 5)
    x[700], x[900] = 1000.0, -1000.0
    within = largest_distance(lambda i: x[i], 1300, exact_up_to=1299)
    far = largest_distance(lambda i: x[i], 1300, exact_up_to=10)
    assert within.found == pytest.approx(2000 * 5**0.5)
    assert far.found >= 1000 * 5**0.5 * 0.99  # at least as far as one of the two is from everything else


def test_equal_data():
    x = torch.ones(20, 3)
    assert largest_distance(lambda i: x[i], 20) == Diameter(0.0, 0.0, 20, 20)


def test_the_subset_is_the_same_every_time():
    x = points(1300, 5)
    asked = []

    def values(i):
        asked.append(i.tolist())
        return x[i]

    first = largest_distance(values, 1300, exact_up_to=20)
    assert first == largest_distance(values, 1300, exact_up_to=20)
    assert asked[0] == asked[len(asked) // 2]
    assert len(set(asked[0])) == 20
    assert sorted(np.concatenate(asked[1 : len(asked) // 2])) == list(range(1300))  # then one pass over all
