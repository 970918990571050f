from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lit_diffusion.metrics import Neighbourhood
from lit_diffusion.metrics.neighbours import distance_blocks, nearest, nearest_exactly

CPU = torch.device("cpu")


def points(count, seed, dimension=10, shift=0.0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)) + shift


def sklearns(queries, data, k):
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(data.double()).kneighbors(queries.double())


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("block_mb", [256, 1, 0])  # All at once, 262 rows, one row
@pytest.mark.parametrize("search", [nearest, nearest_exactly])
def test_the_nearest_are_sklearns(search, block_mb, shift):
    queries, data = points(300, 1, shift=shift), points(1000, 2, shift=shift)
    found, positions = search(queries, data, 4, block_mb=block_mb)
    distances, expected = sklearns(queries, data, 4)
    assert positions.tolist() == expected.tolist()
    exact = search is nearest_exactly
    np.testing.assert_allclose(found if exact else found.sqrt(), distances, rtol=1e-7 if exact else 1e-4)
    assert found.dtype == (torch.float64 if exact else torch.float32)


def test_blocks_are_as_large_as_they_may_be():
    data = points(1000, 1)
    sizes = [len(squares) for _, squares in distance_blocks(points(900, 2), data, CPU, 1)]
    assert sizes == [262, 262, 262, 114]  # 262 rows of 1000 float32 are just under 1 MB.
    starts = [start for start, _ in distance_blocks(points(3, 2), data, CPU, 0)]
    assert starts == [0, 1, 2]


@pytest.mark.parametrize("block_mb", [256, 1, 0])
def test_no_point_is_its_own_neighbour_where_that_is_asked_for(block_mb):
    data = points(1000, 2)
    found, positions = nearest(data, data, 3, None, block_mb, excluding_self=True)
    distances, expected = sklearns(data, data, 4)
    assert positions.tolist() == expected[:, 1:].tolist()
    np.testing.assert_allclose(found.sqrt(), distances[:, 1:], rtol=1e-4)
    distances = Neighbourhood(data, CPU).nearest_other()
    np.testing.assert_allclose(distances, sklearns(data, data, 2)[0][:, 1], rtol=1e-7)


def test_near_copies_are_distinguished():
    data = points(60, 1, 64)
    step = 1e-6 * points(60, 2, 64)  # About 1e-6 of a point's norm, where float32 sees 1e-3.
    queries = data + step
    twins = torch.cat((data, data + 3.0 * step))
    found, positions = nearest_exactly(queries, twins, 2)
    expected = sklearns(queries, twins, 2)[1]
    assert positions.tolist() == expected.tolist() == [[k, 60 + k] for k in range(60)]
    assert nearest_exactly(queries, twins, 1)[1].flatten().tolist() == list(range(60))
    assert nearest(queries, twins, 1)[1].flatten().tolist() != list(range(60))
    true = (queries.double()[:, None] - twins.double()[expected]).norm(dim=2)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=0.0)


def test_copies_are_at_distance_0():
    data = points(20, 1, 64, shift=5.0).repeat(3, 1)
    found, positions = nearest_exactly(data[:20], data, 3)
    assert found.tolist() == [[0.0] * 3] * 20
    assert positions.sort().values.tolist() == [[k, 20 + k, 40 + k] for k in range(20)]
    assert Neighbourhood(data, CPU).nearest_other().tolist() == [0.0] * 60
    assert float(nearest(data[:20], data, 1)[0].min()) >= 0.0  # Rounding makes no negative square.


def test_no_queries_have_no_neighbours():
    for search in (nearest, nearest_exactly):
        found, positions = search(points(0, 1), points(9, 2), 3)
        assert (tuple(found.shape), tuple(positions.shape)) == ((0, 3), (0, 3))


def test_the_radius_reaches_the_kth_of_the_others_whatever_is_asked_first():
    data = points(30, 1)
    distances, _ = sklearns(data, data, 10)
    for order in ((3, 5, 9), (9, 3, 5)):
        found = Neighbourhood(data, CPU)
        for k in order:
            np.testing.assert_allclose(found.squared_radius(k).sqrt(), distances[:, k], rtol=1e-4)
    np.testing.assert_allclose(Neighbourhood(data[:3], CPU).squared_radius(2).shape, (3,))


def test_an_outer_autocast_changes_no_distance():
    queries, data = points(20, 1), points(30, 2)
    expected = nearest(queries, data, 3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(queries, data, 3)[0]
    assert torch.equal(found, expected)
