import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import Moments, frechet_distance


def moments(x, parts=1):
    found = Moments(x.shape[1])
    for part in x.chunk(parts):
        found.add(part)
    return found


def features(count, dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return x @ torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) + seed


def test_moments_are_numpys_however_they_are_streamed():
    x = features(500, 6, 1)
    for parts in (1, 7):
        found = moments(x, parts)
        assert found.count == 500
        np.testing.assert_allclose(found.mean, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


def test_it_is_the_formula_with_a_matrix_root():
    x, y = features(400, 8, 1), features(300, 8, 2)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    mean = x.numpy().mean(0) - y.numpy().mean(0)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(moments(x), moments(x, 3)) == pytest.approx(0.0, abs=1e-6)


def test_of_gaussians_on_the_axes_it_is_the_closed_form():
    first, second = Moments(3), Moments(3)
    # Points whose covariance is exactly diagonal: plus and minus each axis.
    for found, scales, shift in ((first, (1.0, 2.0, 0.5), 0.0), (second, (3.0, 2.0, 0.25), 1.0)):
        axes = torch.diag(torch.tensor(scales, dtype=torch.float64))
        found.add(torch.cat((axes, -axes)) + shift)
    variance = np.array([[1.0, 4.0, 0.25], [9.0, 4.0, 0.0625]]) * 2 / 5
    expected = 3.0 + ((np.sqrt(variance[0]) - np.sqrt(variance[1])) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_features_that_never_change_do_no_harm():
    x, y = features(50, 4, 1), features(50, 4, 2)
    x[:, 0] = y[:, 0] = 3.0
    reduced = frechet_distance(moments(x[:, 1:]), moments(y[:, 1:]))
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(reduced, rel=1e-9)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(moments(features(1, 3, 0)), moments(features(5, 3, 1)))
