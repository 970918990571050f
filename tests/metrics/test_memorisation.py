from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lit_diffusion.metrics import Memorisation, Neighbourhood
from lit_diffusion.metrics.memorisation import FLAGGED_ABOVE

CPU = torch.device("cpu")


def points(count, seed, dimension=8):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


TRAINING = points(800, 0)


def metric_of(samples, training=TRAINING, pairs=0, images=None):
    metric = Memorisation(Neighbourhood(training, CPU), pairs)
    for part in torch.arange(len(samples)).split(130):
        metric.update(samples[part], part, None if images is None else images[part.numpy()])
    return metric


def means(samples, training=TRAINING):
    return {name: float(parts.mean()) for name, parts in metric_of(samples, training).compute().items()}


def test_a_model_that_replays_its_training_data_is_flagged():
    assert means(TRAINING[:300]) == {"nn_ratio": 0.0, "memorised": 1.0, "near_copies": 1.0, "authenticity": 0.0}
    nearly = means(TRAINING[:300] + 1e-3 * points(300, 1))
    assert nearly["near_copies"] == nearly["memorised"] == 1.0
    assert nearly["authenticity"] == 0.0
    assert nearly["nn_ratio"] < 0.01


def test_fresh_data_of_the_same_law_are_not_flagged():
    found = means(points(2000, 2))
    assert found["near_copies"] < 0.5 * FLAGGED_ABOVE
    assert found["near_copies"] > 0.002
    assert 0.45 < found["authenticity"] < 0.65
    assert found["memorised"] < 0.01
    assert found["nn_ratio"] > 0.8


def test_in_the_plane_fresh_data_are_as_authentic_as_nearest_neighbours_are_one_sided():
    """Two points of a Poisson process are each other's nearest with probability 6 pi / (8 pi + 3 sqrt 3)."""
    generator = torch.Generator().manual_seed(0)
    found = means(torch.rand(6000, 2, generator=generator), torch.rand(6000, 2, generator=generator))
    mutual = 6 * np.pi / (8 * np.pi + 27**0.5)
    assert found["authenticity"] == pytest.approx(1 - mutual, abs=0.03)


def test_a_tenth_of_copies_is_a_tenth():
    found = means(torch.cat((TRAINING[:100], points(900, 2))))
    assert found["near_copies"] == pytest.approx(0.11, abs=0.01)
    assert found["near_copies"] > FLAGGED_ABOVE


def test_each_is_its_definition():
    samples = points(200, 3) * 0.9
    neighbours = NearestNeighbors(n_neighbors=2).fit(TRAINING.double())
    d, which = neighbours.kneighbors(samples.double())
    own = neighbours.kneighbors(TRAINING.double())[0][:, 1]
    found = metric_of(samples).compute()
    np.testing.assert_allclose(found["nn_ratio"], d[:, 0] / d[:, 1], rtol=1e-9)
    np.testing.assert_array_equal(found["memorised"], d[:, 0] < d[:, 1] / 3)
    np.testing.assert_array_equal(found["near_copies"], d[:, 0] < np.quantile(own, 0.01))
    np.testing.assert_array_equal(found["authenticity"], d[:, 0] > own[which[:, 0]])


def test_a_datum_that_the_training_data_hold_twice_is_a_datum():
    twice = TRAINING.repeat(2, 1)
    assert means(TRAINING[:50], twice) == {
        "nn_ratio": 0.0,
        "memorised": 1.0,
        "near_copies": 1.0,
        "authenticity": 0.0,
    }
    fresh = means(points(500, 2), twice)
    assert (fresh["near_copies"], fresh["authenticity"]) == (0.0, 1.0)


def test_the_closest_are_kept_with_their_images():
    samples, images = points(300, 3), np.arange(300, dtype=np.uint8).repeat(4).reshape(300, 2, 2, 1)
    samples[[40, 250, 7]] = TRAINING[[5, 6, 700]] + torch.tensor([[1e-3], [2e-3], [3e-3]])
    metric = metric_of(samples, pairs=3, images=images)
    pairs = metric.closest()
    assert [(pair.index, pair.neighbour) for pair in pairs] == [(40, 5), (250, 6), (7, 700)]
    assert [pair.distance for pair in pairs] == pytest.approx([1e-3 * 8**0.5 * k for k in (1, 2, 3)], rel=1e-3)
    assert [int(pair.image[0, 0, 0]) for pair in pairs] == [40, 250, 7]
    metric.reset()
    assert metric.closest() == []


def test_pairs_of_equal_distance_are_in_the_order_of_their_numbers():
    pairs = metric_of(TRAINING[[3, 1, 2, 0]], pairs=2, images=np.zeros((4, 1, 1, 1), np.uint8)).closest()
    assert [pair.index for pair in pairs] == [0, 1]


def test_two_training_data_are_enough():
    assert means(points(10, 1), TRAINING[:2])["nn_ratio"] <= 1.0


def test_where_training_mirrors_a_datum_is_as_far_as_the_nearer_of_its_two_sides():
    training, samples = points(300, 0, 3), points(100, 1, 3)
    training[:5, 0] = 0.0  # Their own mirror images.
    training[10] = training[11] * torch.tensor([-1.0, 1.0, 1.0])  # A datum that the data hold both ways round.
    mirror = lambda x: x * torch.tensor([-1.0, 1.0, 1.0])
    samples[:5], samples[5:20] = training[:5], mirror(training[20:35])
    metric = Memorisation(Neighbourhood(training, CPU), 4, mirror(training))
    for part in torch.arange(100).split(30):
        metric.update(samples[part], part, np.zeros((len(part), 1, 1, 1), np.uint8))
    distance = lambda a, b: torch.minimum(
        torch.cdist(a.double(), b.double()), torch.cdist(a.double(), mirror(b).double())
    )
    d = distance(samples, training).sort(dim=1)
    own = distance(training, training).fill_diagonal_(float("inf")).amin(1)
    found = metric.compute()
    first, second = d.values[:, 0], d.values[:, 1]
    # cdist rounds what is 0; the metric does not.
    torch.testing.assert_close(found["nn_ratio"], first / second, atol=1e-6, rtol=1e-6)
    assert found["memorised"][:20].tolist() == found["near_copies"][:20].tolist() == [1.0] * 20
    near = first < torch.quantile(own, 0.01)
    near[:20] = True
    torch.testing.assert_close(found["near_copies"], near.double())
    torch.testing.assert_close(found["authenticity"], (first > own[d.indices[:, 0]] + 1e-6).double())
    assert [(pair.index, pair.neighbour, pair.mirrored) for pair in metric.closest()] == [
        (n, n, False) for n in range(4)
    ]
    metric.pairs = 6
    metric.reset()
    metric.update(samples[5:11], torch.arange(6), np.zeros((6, 1, 1, 1), np.uint8))
    assert [(pair.neighbour, pair.mirrored) for pair in metric.closest()] == [(20 + n, True) for n in range(6)]
