from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import (
    FrechetDistance,
    FrechetInfinity,
    Gaussian,
    Moments,
    frechet_distance,
    frechet_infinity,
    gaussian_of,
)
from lit_diffusion.metrics.frechet import require_enough_for_infinity


def moments(x, parts=1):
    found = Moments(x.shape[1])
    for part in x.chunk(parts):
        found.add(part)
    return found


def distance(first, second):
    return frechet_distance(first.gaussian(), second.gaussian())


def features(count, dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return x @ torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) + seed


def test_moments_are_numpys_however_they_are_streamed():
    x = features(500, 6, 1)
    for parts in (1, 7):
        found = moments(x, parts)
        assert found.count == 500
        gaussian = found.gaussian()
        assert gaussian.count == 500
        np.testing.assert_allclose(gaussian.mean, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(x.numpy().T), rtol=1e-9, atol=1e-9)


def test_it_is_the_formula_with_a_matrix_root():
    x, y = features(400, 8, 1), features(300, 8, 2)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    mean = x.numpy().mean(0) - y.numpy().mean(0)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-8)
    assert distance(moments(y), moments(x)) == pytest.approx(expected, rel=1e-8)
    assert distance(moments(x), moments(x, 3)) == pytest.approx(0.0, abs=1e-6)


def test_of_gaussians_on_the_axes_it_is_the_closed_form():
    first, second = Moments(3), Moments(3)
    # Points whose covariance is exactly diagonal: plus and minus each axis.
    for found, scales, shift in ((first, (1.0, 2.0, 0.5), 0.0), (second, (3.0, 2.0, 0.25), 1.0)):
        axes = torch.diag(torch.tensor(scales, dtype=torch.float64))
        found.add(torch.cat((axes, -axes)) + shift)
    variance = np.array([[1.0, 4.0, 0.25], [9.0, 4.0, 0.0625]]) * 2 / 5
    expected = 3.0 + ((np.sqrt(variance[0]) - np.sqrt(variance[1])) ** 2).sum()
    assert distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_features_that_never_change_do_no_harm():
    x, y = features(50, 4, 1), features(50, 4, 2)
    x[:, 0] = y[:, 0] = 3.0
    reduced = distance(moments(x[:, 1:]), moments(y[:, 1:]))
    assert distance(moments(x), moments(y)) == pytest.approx(reduced, rel=1e-9)


@pytest.mark.parametrize("few", [2, 5, 19])
def test_fewer_samples_than_dimensions_give_a_finite_distance(few):
    x, y = features(few, 20, 1), features(300, 20, 2)
    a, b = gaussian_of(x), gaussian_of(y)
    # The roots of the product's eigenvalues: those of y's root on x's span, by numpy's singular values.
    centred = (x - x.mean(0)).numpy() / np.sqrt(few - 1)
    shared = np.linalg.svd(centred @ np.real(sqrtm(b.covariance.numpy())), compute_uv=False).sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-6)


def test_of_equal_points_it_is_the_distance_of_the_means_and_what_is_lost():
    nothing = gaussian_of(torch.full((5, 3), 2.0))
    other = Gaussian(torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()), 9)
    assert frechet_distance(nothing, other) == pytest.approx(12.0 + 14.0)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="at least 2 samples, there are 1"):
        moments(features(1, 3, 0)).gaussian()
    with pytest.raises(UserError, match="at least 2 samples, there are 0"):
        FrechetDistance(gaussian_of(features(9, 3, 0))).compute()


# ---- infinitely many samples ---------------------------------------------------------------------------------------

D, N = 12, 1200
REFERENCE = Gaussian(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64), 10**6)
SCALES = torch.linspace(0.7, 1.6, D, dtype=torch.float64)
TRUE = float((SCALES - 1.0).square().sum()) + 0.05**2 * D


def sample(seed, count=N):
    generator = torch.Generator().manual_seed(seed)
    return SCALES * torch.randn(count, D, generator=generator, dtype=torch.float64) + 0.05


def groups_of(x):
    return [moments(part).sums for part in x.tensor_split(10)]


@pytest.fixture(scope="module")
def estimates():
    """FD-infinity, its error and the plain distance of many sets of samples."""
    rows = []
    for seed in range(40):
        x = sample(seed)
        rows.append((*frechet_infinity(REFERENCE, groups_of(x)), frechet_distance(REFERENCE, gaussian_of(x))))
    return torch.tensor(rows, dtype=torch.float64)


def test_infinitely_many_samples_have_the_extrapolated_distance(estimates):
    value, _, plain = estimates.T
    bias, wrong = value.mean() - TRUE, plain.mean() - TRUE
    assert float(wrong / (plain.std() / 40**0.5)) > 5.0  # It has something to correct.
    assert abs(float(bias / (value.std() / 40**0.5))) < 3.0
    assert abs(bias) < 0.2 * wrong


def test_the_error_of_the_extrapolation_is_its_spread(estimates):
    value, error, _ = estimates.T
    assert 0.75 < float(error.square().mean().sqrt() / value.std()) < 1.5
    covered = float(((value - TRUE).abs() < 1.96 * error).double().mean())
    assert covered >= 0.85


def test_a_distance_that_is_a_line_in_1_over_n_is_extrapolated_exactly():
    """Points on the axes: every group has one covariance but for its divisor N - 1, which is the only bias."""
    axes = torch.eye(2, dtype=torch.float64).repeat(50, 1)
    groups = [moments(torch.cat((axes, -axes))).sums for _ in range(10)]
    reference = Gaussian(torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64), 100)
    value, error = frechet_infinity(reference, groups)
    # d^2 = N / (N - 1) = 1 + 1/N + 1/N^2 ...
    assert frechet_distance(reference, Moments(2, sum(groups)).gaussian()) == pytest.approx(2000 / 1999)
    assert value == pytest.approx(1.0, abs=1e-5)
    assert error < 1e-5


def test_too_few_samples_for_the_extrapolation_are_refused_with_the_number():
    require_enough_for_infinity(120, 12)
    with pytest.raises(UserError, match="12 dimensions needs at least 120 samples, there are 119"):
        require_enough_for_infinity(119, 12)
    with pytest.raises(UserError, match="at least 120 samples, there are 110"):
        frechet_infinity(REFERENCE, groups_of(sample(0, 110)))


def test_the_metric_makes_its_groups_of_the_samples_numbers():
    x, index = sample(0), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    metric, plain = FrechetInfinity(REFERENCE), FrechetDistance(REFERENCE)
    for part in index.split(170):
        metric.update(x[part], part)
        plain.update(x[part], part)
    expected = frechet_infinity(REFERENCE, [moments(x[k::10]).sums for k in range(10)])
    assert metric.compute() == pytest.approx(expected, rel=1e-9)
    assert plain.compute() == pytest.approx(frechet_distance(REFERENCE, gaussian_of(x)), rel=1e-9)
