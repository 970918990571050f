import numpy as np
import pytest
import torch
from scipy import stats

from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.processes import VE, VP, Betas, cosine_betas
from lit_diffusion.randomness import keyed_normal, keyed_uniform

PROCESSES = {"VE": VE(0.05, 5.0), "VP": VP(), "cosine": Betas(cosine_betas(50))}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def mixture_of(count, dimension, seed=0):
    """A mixture of skewed Gaussians, and its parts as NumPy sees them."""
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.2, 1.0, count)
    means = 2 * generator.standard_normal((count, dimension))
    roots = generator.standard_normal((count, dimension, dimension))
    covariances = roots @ roots.transpose(0, 2, 1) / dimension + 0.05 * np.eye(dimension)
    mixture = GaussianMixture(torch.from_numpy(weights), torch.from_numpy(means), torch.from_numpy(covariances))
    return mixture, (weights / weights.sum(), means, covariances)


def times_and_points(process, dimension, count=40):
    t = torch.linspace(0.02, 1.0, count, dtype=torch.float64)
    x = process.sigma(t)[:, None] * keyed_normal(0, "x", torch.arange(count), (dimension,), dtype=torch.float64)
    return t, x + 2 * keyed_normal(1, "x", torch.arange(count), (dimension,), dtype=torch.float64)


def smoothed(parts, alpha, sigma):
    """``sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)`` as (weight, SciPy's Gaussian)."""
    identity = np.eye(parts[1].shape[1])
    return [
        (w, stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * identity))
        for w, m, c in zip(*parts, strict=True)
    ]


@every_process
@pytest.mark.parametrize(("count", "dimension"), [(1, 2), (3, 3), (5, 1)])
def test_log_density_is_scipys(process, count, dimension):
    mixture, parts = mixture_of(count, dimension)
    t, x = times_and_points(process, dimension)
    alpha, sigma = process.alpha(t), process.sigma(t)
    log_prob, _ = mixture.log_prob_and_score(x, alpha, sigma)
    expected = [
        np.log(sum(w * g.pdf(point) for w, g in smoothed(parts, a, s)))
        for point, a, s in zip(x.numpy(), alpha.tolist(), sigma.tolist(), strict=True)
    ]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9, atol=1e-9)


@every_process
def test_score_is_the_gradient_of_the_log_density(process):
    mixture, _ = mixture_of(3, 3)
    t, x = times_and_points(process, 3)
    x.requires_grad_()
    log_prob, score = mixture.log_prob_and_score(x, process.alpha(t), process.sigma(t))
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)


@every_process
def test_tweedie_is_the_posterior_mean_of_a_gaussian(process):
    mixture, (_, (mean,), (covariance,)) = mixture_of(1, 3)
    t, x = times_and_points(process, 3)
    prediction = ExactDenoiser(mixture, process)(x, t)
    for n, (a, s) in enumerate(zip(process.alpha(t).tolist(), process.sigma(t).tolist(), strict=True)):
        gain = a * covariance @ np.linalg.inv(a**2 * covariance + s**2 * np.eye(3))
        expected = mean + gain @ (x[n].numpy() - a * mean)
        np.testing.assert_allclose(prediction.x0[n], expected, rtol=1e-6, atol=1e-8)


@every_process
def test_tweedie_is_the_posterior_mean_of_a_mixture(process):
    mixture, parts = mixture_of(3, 2)
    t, x = times_and_points(process, 2)
    prediction = ExactDenoiser(mixture, process)(x, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    for n, (a, s) in enumerate(zip(alpha.tolist(), sigma.tolist(), strict=True)):
        point, total, mean = x[n].numpy(), 0.0, np.zeros(2)
        for (w, gaussian), m, c in zip(smoothed(parts, a, s), parts[1], parts[2], strict=True):
            share = w * gaussian.pdf(point)
            mean += share * (m + a * c @ np.linalg.inv(a**2 * c + s**2 * np.eye(2)) @ (point - a * m))
            total += share
        np.testing.assert_allclose(prediction.x0[n], mean / total, rtol=1e-6, atol=1e-7)
    # The other views are those of the same truth.
    torch.testing.assert_close(alpha[:, None] * prediction.x0 + sigma[:, None] * prediction.eps, x)
    _, score = mixture.log_prob_and_score(x, alpha, sigma)
    torch.testing.assert_close(prediction.score, score)


@every_process
def test_the_gradient_of_the_energy_is_minus_the_score(process):
    mixture, _ = mixture_of(3, 2)
    t, x = times_and_points(process, 2)
    x.requires_grad_()
    prediction = ExactDenoiser(mixture, process)(x, t)
    assert prediction.energy.shape == (40,)
    (gradient,) = torch.autograd.grad(prediction.energy.sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, -prediction.score, rtol=1e-8, atol=1e-8)


def test_samples_have_the_moments_and_the_density():
    mixture, (weights, means, covariances) = mixture_of(3, 2)
    count = 200_000
    index = torch.arange(count)
    x = mixture.sample(keyed_normal(0, "s", index, (2,)), keyed_uniform(0, "c", index)).numpy()
    mean = weights @ means
    second = np.einsum("k,kij->ij", weights, covariances + means[:, :, None] * means[:, None, :])
    np.testing.assert_allclose(mixture.mean(), mean, rtol=1e-12)
    np.testing.assert_allclose(mixture.covariance(), second - np.outer(mean, mean), rtol=1e-12)
    assert mixture.dimension == 2
    deviation = np.sqrt(np.diag(second - np.outer(mean, mean)))
    assert (np.abs(x.mean(0) - mean) < 4 * deviation / count**0.5).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert (np.abs(products.mean(0) - mixture.covariance().numpy()) < 4 * products.std(0) / count**0.5).all()
    # Along a line the law is the mixture of the projections.
    line = np.array([0.6, -0.8])

    def distribution(value):
        spread = np.sqrt(np.einsum("i,kij,j->k", line, covariances, line))
        return (weights * stats.norm.cdf((value[:, None] - means @ line) / spread)).sum(1)

    assert stats.kstest((x @ line)[:20_000], distribution).pvalue > 0.01


def test_samples_choose_components_by_weight():
    points = torch.tensor([[0.0], [1.0], [2.0]])
    mixture = GaussianMixture(torch.tensor([1.0, 3.0, 6.0]), points, torch.zeros(3, 1, 1))
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.3999, 0.4001, 0.9999999])
    assert mixture.weights.tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert mixture.sample(torch.ones(6, 1), u)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_likeliest_component():
    mixture, parts = mixture_of(4, 3)
    x = 3 * keyed_normal(0, "x", torch.arange(500), (3,))
    density = np.stack([w * g.pdf(x.double().numpy()) for w, g in smoothed(parts, 1.0, 0.0)])
    np.testing.assert_array_equal(mixture.component_of(x), density.argmax(0))
    assert len(set(density.argmax(0))) == 4


def test_components_may_be_points():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    mixture = GaussianMixture(torch.tensor([0.5, 0.5]), points, torch.zeros(2, 2, 2))
    assert mixture.component_of(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.4, 0.4], [0.7, 0.6]])).tolist() == [0, 1, 0, 1]
    # Between two points the score of the smoothed density is known: (p1 - p0)/2 tanh pulls, here at the middle.
    _, score = mixture.log_prob_and_score(torch.tensor([[0.5, 0.5]]), torch.ones(1), torch.full((1,), 0.1))
    torch.testing.assert_close(score, torch.zeros(1, 2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_state_keeps_its_type_and_shape():
    mixture, _ = mixture_of(2, 12)
    x = keyed_normal(0, "x", torch.arange(5), (3, 2, 2))
    t = torch.linspace(0.1, 1.0, 5)
    prediction = ExactDenoiser(mixture, PROCESSES["VP"])(x, t)
    flat = ExactDenoiser(mixture, PROCESSES["VP"])(x.flatten(1).double(), t.double())
    for view in ("x0", "eps", "score", "velocity"):
        assert getattr(prediction, view).dtype == torch.float32
        assert getattr(prediction, view).shape == x.shape
        torch.testing.assert_close(
            getattr(prediction, view).flatten(1).double(), getattr(flat, view), rtol=1e-4, atol=1e-4
        )


def test_it_computes_where_the_points_are():
    # The device "meta" holds no numbers, and refuses to be mixed with another as a GPU does.
    mixture, _ = mixture_of(3, 2)
    x = torch.empty(5, 2, device="meta")
    t = torch.empty(5, dtype=torch.float64, device="meta")
    prediction = ExactDenoiser(mixture, PROCESSES["VE"])(x, t)
    assert prediction.score.device.type == prediction.energy.device.type == "meta"
    assert mixture.component_of(x).device.type == "meta"
    assert mixture.sample(x, t).device.type == "meta"
