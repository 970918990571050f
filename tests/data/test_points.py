import pickle

import numpy as np
import pytest

from lit_diffusion.data import Checkerboard, GaussianMixturePoints, Rings, Spiral, SwissRoll
from lit_diffusion.errors import UserError

TOYS = [GaussianMixturePoints, Spiral, SwissRoll, Checkerboard, Rings]


def points(source):
    return np.stack([source.value(i) for i in range(len(source))])


@pytest.mark.parametrize("toy", TOYS)
def test_a_point_depends_on_seed_and_index_alone(toy):
    short, long, other = toy(size=200), toy(size=1000), toy(size=200, seed=1)
    assert (short.shape, short.num_grey_levels, len(long)) == ((2,), None, 1000)
    assert short.value(3).dtype == np.float32
    np.testing.assert_array_equal(points(short), points(long)[:200])
    assert [short.label(i) for i in range(200)] == [long.label(i) for i in range(200)]
    assert (points(short) != points(other)).mean() > 0.99
    assert short.fingerprint() == toy(size=200).fingerprint()
    assert len({short.fingerprint(), long.fingerprint(), other.fingerprint()}) == 3
    assert pickle.loads(pickle.dumps(short)).fingerprint() == short.fingerprint()


@pytest.mark.parametrize("toy", TOYS)
def test_neighbours_in_the_set_are_independent(toy):
    x = points(toy(size=20_000)).astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    for lag in (1, 2, 7):
        assert np.abs(x[lag:].T @ x[:-lag] / len(x)).max() < 4.5 / np.sqrt(len(x))


def test_the_default_mixture_is_ncsns():
    source = GaussianMixturePoints(size=32_000)
    assert source.weights.tolist() == [0.2, 0.8]
    assert source.means.tolist() == [[-5.0, -5.0], [5.0, 5.0]]
    assert source.std == 1.0
    assert source.num_classes == 2
    x, label = points(source).astype(np.float64), np.array([source.label(i) for i in range(len(source))])
    for k in range(2):
        part = x[label == k]
        count = len(part)
        # Four standard errors each.
        assert abs(count / len(x) - source.weights[k]) < 4 * np.sqrt(0.16 / len(x))
        assert np.abs(part.mean(0) - source.means[k].numpy()).max() < 4 / np.sqrt(count)
        assert np.abs(np.cov(part.T) - np.eye(2)).max() < 4 * np.sqrt(2 / count)


def test_a_mixture_in_three_dimensions_with_its_own_spread():
    source = GaussianMixturePoints(
        means=[[0, 0, 0], [1, 2, 3], [9, 9, 9]], weights=[0.25, 0.25, 0.5], std=0.01, size=999
    )
    assert source.shape == (3,)
    for i in range(0, 999, 37):
        assert np.abs(source.value(i) - source.means[source.label(i)].numpy()).max() < 0.06


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("means", {"means": []}),
        ("means", {"means": [[0.0, 1.0], [1.0]]}),
        ("weights", {"weights": [0.5, 0.6]}),
        ("weights", {"weights": [1.0]}),
        ("weights", {"weights": [0.0, 1.0]}),
        ("std", {"std": -1.0}),
        ("size", {"size": 0}),
    ],
)
def test_what_is_no_mixture_is_refused(key, wrong):
    with pytest.raises(UserError, match=f"^{key}: [^\n]*$"):
        GaussianMixturePoints(**wrong)


def test_the_checkerboard_has_one_colour_and_is_flat():
    cells = np.floor(points(Checkerboard(size=32_000)) / 2.0).astype(int) + 2
    assert cells.min() == 0
    assert cells.max() == 3
    assert (cells.sum(1) % 2 == 0).all()
    counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert (counts > 0).sum() == 8
    assert np.abs(counts[counts > 0] - 4000).max() < 4 * np.sqrt(4000)
    with pytest.raises(UserError, match="cells"):
        Checkerboard(cells=3)


def test_the_rings_have_their_radii():
    r = np.linalg.norm(points(Rings(size=16_000)), axis=1)
    nearest = np.abs(r[:, None] - [0.75, 1.5, 2.25, 3.0])
    assert nearest.min(1).max() < 0.375 + 0.1
    assert nearest.min(1).std() < 0.08
    assert np.abs(np.bincount(nearest.argmin(1)) - 4000).max() < 4 * np.sqrt(4000)
    with pytest.raises(UserError, match="radii"):
        Rings(radii=[])


def test_spiral_and_roll_lie_on_their_curves_without_noise():
    x = points(SwissRoll(std=0.0, size=500)).astype(np.float64)
    t = 5.0 * np.linalg.norm(x, axis=1)
    assert t.min() > 1.5 * np.pi
    assert t.max() < 4.5 * np.pi
    np.testing.assert_allclose(x, np.stack([np.cos(t), np.sin(t)], 1) * t[:, None] / 5.0, atol=1e-5)

    x = points(Spiral(arms=2, turns=1.5, radius=3.0, std=0.0, size=500)).astype(np.float64)
    r = np.linalg.norm(x, axis=1)
    arm = np.stack([r * np.cos(np.pi * r), r * np.sin(np.pi * r)], 1)
    off = np.minimum(np.abs(x - arm).max(1), np.abs(x + arm).max(1))  # the second arm is half a turn away
    assert r.max() <= 3.0
    assert off.max() < 1e-5
    with pytest.raises(UserError, match="arms"):
        Spiral(arms=0)
