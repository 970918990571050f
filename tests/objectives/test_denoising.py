import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import cumulative_simpson, quad
from torch import nn

from lit_diffusion.denoisers import PARAMETRIZATIONS, Denoiser, Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.objectives import DenoisingScoreMatching, LogitNormal, LogNormal
from lit_diffusion.processes import VE, VP, Betas, Flow, SubVP, linear_betas
from lit_diffusion.randomness import keyed_normal, keyed_uniform

COUNT = 50_000


class FunctionDenoiser(Denoiser):
    """The noise guessed by a function of (x_t, t)."""

    def __init__(self, process, function):
        super().__init__()
        self.process = process
        self.function = function

    def forward(self, x_t, t, cond=None, began=None):
        level = self.process.coefficients(t)
        u, v = PARAMETRIZATIONS["eps"](level, self.process, 1.0)
        return Prediction(x_t, self.function(x_t, t), level, u, v)


def gaussian():
    covariance = torch.tensor([[1.5, 0.6], [0.6, 0.4]], dtype=torch.float64)
    return GaussianMixture(torch.ones(1), torch.tensor([[0.5, -1.0]]), covariance[None])


def mixture():
    means = torch.tensor([[-1.5, 0.5], [1.0, -1.0], [0.5, 2.0]])
    return GaussianMixture(torch.tensor([0.2, 0.5, 0.3]), means, 0.1 * torch.eye(2).repeat(3, 1, 1))


def data(distribution, count=COUNT):
    index = torch.arange(count)
    return distribution.sample(keyed_normal(0, "x", index, (2,)), keyed_uniform(0, "c", index))


def normal(count=COUNT, dimension=2):
    return keyed_normal(0, "e", torch.arange(count), (dimension,), dtype=torch.float64)


def at(process, t, count=COUNT):
    assert 0 < t <= 1
    return torch.full((count,), t, dtype=torch.float64)


@pytest.mark.parametrize(
    ("process", "t"),
    [(VE(0.05, 5.0), 0.2), (VE(0.05, 5.0), 0.7), (VP(), 0.1), (SubVP(), 0.4), (Betas(linear_betas()), 0.3)],
    ids=["VE small", "VE large", "VP", "SubVP", "linear"],
)
def test_the_best_linear_denoiser_of_a_gaussian_is_the_exact_one(process, t):
    """Its weights solve the loss's own normal equations; the exact ones lie within the error of so many images."""
    distribution, objective = gaussian(), DenoisingScoreMatching("uniform")
    x0, eps, times = data(distribution), normal(), at(process, t)
    weights = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    linear = FunctionDenoiser(process, lambda x_t, t: x_t @ weights[:, :2].T + weights[:, 2])

    def loss(w):
        with torch.no_grad():
            weights.copy_(w.view(2, 3))
        value = objective.at(linear, x0, times, eps).per_sample.mean()
        (gradient,) = torch.autograd.grad(value, weights)
        return gradient.flatten()

    # The loss is a quadratic in the weights: its gradient is hessian @ w + gradient at 0.
    gradient = loss(torch.zeros(6, dtype=torch.float64))
    hessian = torch.stack([loss(unit) - gradient for unit in torch.eye(6, dtype=torch.float64)])
    fitted = torch.linalg.solve(hessian, -gradient).view(2, 3)
    assert float(loss(fitted.flatten()).abs().max()) < 1e-9

    alpha, sigma = float(process.alpha(times[:1])), float(process.sigma(times[:1]))
    spread = alpha**2 * distribution.covariances[0] + sigma**2 * torch.eye(2, dtype=torch.float64)
    matrix = sigma * torch.linalg.inv(spread)
    exact = torch.cat((matrix, -alpha * matrix @ distribution.means[0][:, None]), dim=1)
    # Standard errors of a least-squares fit: the residual's variance times the inverse of the design's moments.
    x_t = process.perturb(x0, times, eps)
    design = torch.cat((x_t, torch.ones(COUNT, 1, dtype=torch.float64)), dim=1)
    residual = (eps - design @ exact.T).var(0)
    error = (residual[:, None] * torch.linalg.inv(design.T @ design).diagonal()).sqrt()
    assert float(((fitted - exact) / error).abs().max()) < 4.0
    assert float((error / exact.abs().max()).max()) < 0.03  # That many images can tell.
    # And the exact denoiser is this linear one.
    closed = ExactDenoiser(distribution, process)(x_t[:100], times[:100])
    torch.testing.assert_close(closed.eps, (design @ exact.T)[:100], rtol=1e-6, atol=1e-8)


DIRECTIONS = {
    "constant": lambda x, t: torch.ones_like(x),
    "shrink": lambda x, t: x / x.std(),
    "shear": lambda x, t: x.flip(1) * torch.tensor([1.0, 0.0], dtype=x.dtype) / x.std(),
    "wave": lambda x, t: torch.sin(3 * x / x.std()),
    "far": lambda x, t: (x.norm(dim=1, keepdim=True) > x.std()).to(x.dtype) * x.sign(),
    "in time": lambda x, t: torch.cos(9 * t)[:, None] * x.flip(1) / x.std(),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weight", ["sigma2", "one", "g2"])
@pytest.mark.parametrize("distribution", [gaussian(), mixture()], ids=["gaussian", "mixture"])
def test_every_departure_from_the_true_score_costs(distribution, weight, direction):
    """Both ways along each direction, so no direction leads downhill: by its own square, as for a quadratic."""
    process = VP(t_min=0.05)
    objective = DenoisingScoreMatching("uniform", weight)
    count = 20_000
    x0, eps = data(distribution, count), normal(count)
    times = 0.05 + 0.95 * keyed_uniform(0, "t", torch.arange(count), dtype=torch.float64)
    exact, away = ExactDenoiser(distribution, process), DIRECTIONS[direction]

    def loss(step):
        denoiser = FunctionDenoiser(process, lambda x, t: exact(x, t).eps + step * away(x, t))
        return objective.at(denoiser, x0, times, eps).per_sample.mean()

    step = 0.2
    best, forth, back = loss(0.0), loss(step), loss(-step)
    assert forth > best
    assert back > best
    # (L(+) - L(-)) / 2 is the slope at the minimum: nothing but the chance of the draw.
    curvature = (forth + back) / 2 - best
    assert abs(forth - back) / 2 < 0.35 * curvature
    # From anywhere else a step towards the truth is a gain.
    assert loss(0.5) > loss(0.3) > best


def test_the_true_score_is_that_of_the_smoothed_density_not_of_the_data():
    process, distribution = VE(0.5, 5.0), gaussian()
    objective, times = DenoisingScoreMatching("uniform"), at(process, 0.1)
    sigma = process.sigma(times)
    _, sharp = distribution.log_prob_and_score(torch.zeros(1, 2), torch.ones(1), torch.zeros(1))
    assert bool(torch.isfinite(sharp).all())

    def of_the_data(x, t):
        return -sigma[:, None] * distribution.log_prob_and_score(x, torch.ones(len(x)), torch.zeros(len(x)))[1]

    x0, eps = data(distribution), normal()
    wrong = objective.at(FunctionDenoiser(process, of_the_data), x0, times, eps).per_sample.mean()
    right = objective.at(ExactDenoiser(distribution, process), x0, times, eps).per_sample.mean()
    assert wrong > 1.05 * right


@pytest.mark.parametrize(
    ("weight", "reduction"), [(w, r) for w in ("sigma2", "one", "g2") for r in ("half_sum", "mean")]
)
def test_the_loss_is_the_formula(weight, reduction):
    """Three images of two pixels by hand: lambda/2 (or /D) |s + eps/sigma|^2."""
    process = VP()
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x0 = torch.tensor([[[[1.0, -2.0]]], [[[0.5, 0.0]]], [[[3.0, 1.0]]]])
    eps = torch.tensor([[[[0.3, 0.1]]], [[[-1.0, 2.0]]], [[[0.0, 0.4]]]])
    guess = torch.tensor([[[[0.5, -0.1]]], [[[-1.5, 1.0]]], [[[0.2, 0.1]]]])
    loss = DenoisingScoreMatching("uniform", weight, reduction).at(
        FunctionDenoiser(process, lambda x, t: guess), x0, t, eps
    )
    for n, time in enumerate(t.tolist()):
        sigma2 = 1 - math.exp(-(0.1 * time + 19.9 * time**2 / 2))
        scale = {"sigma2": sigma2, "one": 1.0, "g2": 0.1 + 19.9 * time}[weight]
        squares = [
            ((-g + e) / math.sqrt(sigma2)) ** 2
            for g, e in zip(guess[n].flatten().tolist(), eps[n].flatten().tolist(), strict=True)
        ]
        expected = scale * (0.5 * sum(squares) if reduction == "half_sum" else sum(squares) / 2)
        assert float(loss.per_sample[n]) == pytest.approx(expected, rel=1e-5)
    assert (loss.per_sample.shape, loss.per_sample.dtype) == ((3,), torch.float32)
    assert torch.equal(loss.t, t)


def test_the_defaults_are_ncsns():
    objective = DenoisingScoreMatching("levels")
    assert (objective.weight, objective.reduction) == ("sigma2", "half_sum")


def test_the_network_sees_the_image_at_its_own_level():
    seen = {}

    def look(x, t):
        seen["x"], seen["t"] = x, t
        return torch.zeros_like(x)

    process = VE(0.1, 10.0)
    x0 = keyed_normal(0, "x", torch.arange(4), (3, 2, 2))
    loss = DenoisingScoreMatching("uniform")(FunctionDenoiser(process, look), x0, 7, torch.arange(4))
    eps = (seen["x"] - x0) / (0.1 * 100**loss.t).float()[:, None, None, None]
    assert torch.equal(seen["t"], loss.t)
    # With a guess of no noise the loss is half the noise's square.
    torch.testing.assert_close(loss.per_sample, 0.5 * eps.square().sum((1, 2, 3)), rtol=1e-3, atol=1e-4)
    assert float(eps.std()) == pytest.approx(1.0, abs=0.3)


def times_of(law, process, count):
    denoiser = FunctionDenoiser(process, lambda x, t: x)
    return DenoisingScoreMatching(law)(denoiser, torch.zeros(count, 1), 3, torch.arange(count)).t


@pytest.mark.parametrize("process", [VE(0.01, 1.0, num_timesteps=10), Betas(linear_betas(37))], ids=["VE", "Betas"])
def test_levels_are_drawn_alike(process):
    t = times_of("levels", process, 100_000)
    index = process.level_index(t)
    assert torch.equal(t, process.grid()[index])
    counts = torch.bincount(index, minlength=process.num_timesteps)
    assert len(counts) == process.num_timesteps
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("process", [VP(), VE(0.01, 50.0, t_min=0.2), VE(0.01, 50.0, num_timesteps=4)])
def test_times_are_uniform_from_t_min_to_1(process):
    t = times_of("uniform", process, 100_000)
    assert t.dtype == torch.float64
    assert process.t_min <= float(t.min()) <= process.t_min + 1e-3
    assert 1 - 1e-3 <= float(t.max()) <= 1
    assert stats.kstest(t.numpy(), stats.uniform(process.t_min, 1 - process.t_min).cdf).pvalue > 0.01


def test_the_loss_of_an_image_is_the_same_in_any_batch():
    process = VE(0.01, 1.0, num_timesteps=10)
    objective = DenoisingScoreMatching("levels")
    x0 = keyed_normal(0, "x", torch.arange(16), (3, 4, 4))
    index = torch.arange(100, 116)
    denoiser = FunctionDenoiser(process, lambda x, t: x / 7)
    together = objective(denoiser, x0, 5, index)
    order = torch.tensor([3, 15, 0, 7, 8, 1, 2])
    some = objective(denoiser, x0[order], 5, index[order])
    assert torch.equal(some.t, together.t[order])
    torch.testing.assert_close(some.per_sample, together.per_sample[order], rtol=1e-6, atol=0)
    for n in range(3):
        alone = objective(denoiser, x0[n : n + 1], 5, index[n : n + 1])
        torch.testing.assert_close(alone.per_sample, together.per_sample[n : n + 1], rtol=1e-6, atol=0)
    # The same image at another place of the run, or in another run, has other noise.
    for other in (objective(denoiser, x0, 5, index + 16), objective(denoiser, x0, 6, index)):
        assert bool((other.per_sample != together.per_sample).all())


def test_time_and_noise_are_independent():
    process, count = VP(), 20_000
    noise = {}
    denoiser = FunctionDenoiser(process, lambda x, t: noise.setdefault("x", x))
    t = DenoisingScoreMatching("uniform")(denoiser, torch.zeros(count, 4), 0, torch.arange(count)).t
    eps = (noise["x"].double() / process.sigma(t)[:, None]).numpy()
    assert np.abs(np.corrcoef(t.numpy(), eps.T)[0, 1:]).max() < 4.5 / count**0.5
    assert np.abs(np.corrcoef(t.numpy(), eps.T**2)[0, 1:]).max() < 4.5 / count**0.5
    assert stats.kstest(eps.ravel(), "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [("time_law", "cosine", "levels"), ("weight", "sigma", "g2"), ("reduction", "sum", "half_sum")],
)
def test_an_unknown_name_is_refused_with_the_known_ones(key, value, known):
    with pytest.raises(UserError) as caught:
        DenoisingScoreMatching(**{"time_law": "uniform", key: value})
    assert str(caught.value).startswith(f"{key} is {value!r}")
    assert known in str(caught.value)


def test_levels_need_a_process_with_levels():
    with pytest.raises(UserError, match="continuous time"):
        times_of("levels", VP(), 10)


# ---- times by importance -----------------------------------------------------------------------------------------

RATIOS = {
    "VE": (VE(0.01, 50.0), lambda t: 2 * math.log(50.0 / 0.01)),
    "VP": (VP(), lambda t: rate(t) / -math.expm1(-integral(t))),
    "SubVP": (SubVP(), lambda t: rate(t) * math.expm1(-2 * integral(t)) / -(math.expm1(-integral(t)) ** 2)),
}
"""``g^2 / sigma^2`` from the papers' appendices."""


def rate(t):
    return 0.1 + 19.9 * t


def integral(t):
    return 0.1 * t + 19.9 * t**2 / 2


@pytest.mark.parametrize("name", RATIOS)
def test_times_by_importance_have_the_density_of_g2_over_sigma2(name):
    process, ratio = RATIOS[name]
    t = times_of("importance", process, 50_000)
    assert t.dtype == torch.float64
    assert process.t_min <= float(t.min())
    assert float(t.max()) <= 1.0
    # Most of the mass is near t_min: integrate in log t.
    grid = np.geomspace(process.t_min, 1.0, 20_001)
    mass = cumulative_simpson([time * ratio(time) for time in grid], x=np.log(grid), initial=0.0)
    assert stats.kstest(np.interp(np.log(t.numpy()), np.log(grid), mass / mass[-1]), "uniform").pvalue > 0.01
    assert (stats.kstest(t.numpy(), "uniform").pvalue > 0.01) == (name == "VE")


def exact_loss(process, ratio, weight, extra):
    """The expected loss of a denoiser of N(0, diag(VARIANCES)) that is ``extra`` off the exact one, by integration.

    What is left of the noise is ``E |eps - E[eps | x_t]|^2 = sum alpha^2 c / (alpha^2 c + sigma^2)``.
    """

    def integrand(log_t):
        level = process.coefficients(torch.tensor([math.exp(log_t)]).double())
        alpha2, sigma2 = float(level.alpha) ** 2, float(level.sigma) ** 2
        left = sum(alpha2 * c / (alpha2 * c + sigma2) for c in VARIANCES) + len(VARIANCES) * extra**2
        return math.exp(log_t) * (ratio(math.exp(log_t)) if weight == "g2" else 1.0) * 0.5 * left

    start = math.log(process.t_min)
    total = sum(quad(integrand, a, b, epsrel=1e-7)[0] for a, b in pairwise(np.linspace(start, 0.0, 9)))
    return total / (1 - process.t_min)


VARIANCES = (0.25, 0.04)
"""About those of the digits' pixels."""


@pytest.mark.parametrize("extra", [0.0, 0.5], ids=["exact", "perturbed"])
@pytest.mark.parametrize("weight", ["sigma2", "g2"])
@pytest.mark.parametrize("name", RATIOS)
def test_times_by_importance_change_the_variance_of_the_loss_and_not_the_loss(name, weight, extra):
    process, ratio = RATIOS[name]
    count = 100_000
    index = torch.arange(count)
    distribution = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.diag(torch.tensor(VARIANCES))[None])
    exact = ExactDenoiser(distribution, process)
    denoiser = FunctionDenoiser(process, lambda x, t: exact(x, t).eps + extra)
    x0 = distribution.sample(keyed_normal(0, "x", index, (2,)), keyed_uniform(0, "c", index))
    uniform, importance = (
        DenoisingScoreMatching(law, weight)(denoiser, x0, 11, index).per_sample for law in ("uniform", "importance")
    )
    expected = exact_loss(process, ratio, weight, extra)
    for loss in (uniform, importance):
        assert abs(float(loss.mean()) - expected) < 4 * float(loss.std()) / count**0.5
    share = float(importance.var() / uniform.var())
    print(f"{name}, weight {weight}, off by {extra:g}: variance of importance / uniform {share:.4g}")
    if weight == "g2":
        assert float(importance.std()) / count**0.5 < 0.01 * expected  # which uniform times do not reach on VP
        assert share < (0.01 if name != "VE" else 1.1)


@pytest.mark.parametrize("weight", ["sigma2", "g2"])
def test_the_loss_at_its_level_has_no_factor_of_the_law(weight):
    process, index = VP(), torch.arange(64)
    x0 = keyed_normal(0, "x", index, (2,))
    denoiser = FunctionDenoiser(process, lambda x, t: x / 7)
    for law in ("uniform", "importance"):
        objective = DenoisingScoreMatching(law, weight)
        loss = objective(denoiser, x0, 3, index)
        at = objective.at(denoiser, x0, loss.t, keyed_normal(3, "noise", index, (2,)))
        assert torch.equal(loss.shown, at.per_sample)
        assert torch.equal(at.shown, at.per_sample)
        if law == "uniform":
            assert torch.equal(loss.per_sample, loss.shown)
            continue
        ratio = torch.tensor([rate(t) / -math.expm1(-integral(t)) for t in loss.t.tolist()])
        whole = float(process.log_snr(torch.tensor(1e-5).double()) - process.log_snr(torch.ones(()).double()))
        torch.testing.assert_close(loss.per_sample, loss.shown * whole / ratio / (1 - 1e-5), rtol=1e-4, atol=0)


# ---- laws with parameters, the loss in the network's own space ---------------------------------------------------


@pytest.mark.parametrize("process", [VE(1e-4, 1e4), VP(t_min=1e-9)], ids=["VE", "VP"])
def test_log_normal_levels_are_edms(process):
    t = times_of(LogNormal(-1.0, 0.7), process, 20_000)
    log_ratio = -0.5 * process.log_snr(t).numpy()
    assert stats.kstest(log_ratio, stats.norm(-1.0, 0.7).cdf).pvalue > 0.01


def test_logit_normal_times():
    t = times_of(LogitNormal(0.5, 0.8), Flow(), 20_000).numpy()
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.5, 0.8).cdf).pvalue > 0.01


@pytest.mark.parametrize("law", [LogNormal(5.0, 3.0), LogNormal(-9.0, 3.0), LogitNormal(0.0, 9.0), "uniform"])
@pytest.mark.parametrize("process", [VE(0.01, 50.0), Flow(t_max=0.8), Flow(), Betas(linear_betas(9))])
def test_no_time_is_outside_of_the_process(law, process):
    t = times_of(law, process, 2000)
    assert t.dtype == torch.float64
    assert process.t_min <= float(t.min()) < float(t.max()) <= process.t_max


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: LogNormal(std=0.0), "std is 0"),
        (lambda: LogitNormal(std=-1.0), "std is -1"),
        (lambda: DenoisingScoreMatching("importance").check(Flow()), "infinite at the largest time of Flow"),
        (lambda: DenoisingScoreMatching("importance").check(VE(1.0, 1.0, num_timesteps=1)), "one noise level"),
        (lambda: DenoisingScoreMatching("levels").check(VP()), "continuous time"),
    ],
)
def test_a_law_that_cannot_be_drawn_is_refused_in_one_line(ask, words):
    with pytest.raises(UserError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value)


class Answering(FunctionDenoiser):
    """A function of (x_t, t) that says what a parametrization wants."""

    def __init__(self, process, function, parametrization, sigma_data):
        super().__init__(process, function)
        self.parametrization, self.sigma_data = parametrization, sigma_data

    def forward(self, x_t, t, cond=None, began=None):
        level = self.process.coefficients(t)
        u, v = PARAMETRIZATIONS[self.parametrization](level, self.process, self.sigma_data)
        return Prediction(x_t, self.function(x_t, t), level, u, v)


@pytest.mark.parametrize("reduction", ["half_sum", "mean"])
def test_the_raw_loss_is_edms_and_flow_matchings_and_ddpms(reduction):
    x0, eps = data(mixture(), 40), normal(40)
    t = torch.linspace(0.05, 1.0, 40, dtype=torch.float64)

    def reduced(error):
        square = error.square()
        return 0.5 * square.sum(1) if reduction == "half_sum" else square.mean(1)

    def loss(parametrization, process, sd=0.6):
        denoiser = Answering(process, lambda x, t: torch.cos(3 * x), parametrization, sd)
        found = DenoisingScoreMatching("uniform", "raw", reduction).at(denoiser, x0, t, eps)
        return found.per_sample, denoiser(process.perturb(x0, t, eps), t)

    edm = VE(0.01, 20.0)
    sigma, sd = edm.sigma(t)[:, None], 0.6
    found, prediction = loss("edm", edm)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2  # Karras et al. 2022, table 1: lambda = 1 / c_out^2.
    torch.testing.assert_close(found, reduced(weight.sqrt() * (prediction.x0 - x0)), rtol=1e-8, atol=1e-10)
    found, prediction = loss("velocity", Flow())
    torch.testing.assert_close(found, reduced(prediction.raw - (eps - x0)), rtol=1e-12, atol=0)
    found, prediction = loss("eps", VP())
    torch.testing.assert_close(found, reduced(prediction.eps - eps), rtol=1e-8, atol=1e-10)


def test_an_objective_may_pair_noise_with_data():
    class Sorted(DenoisingScoreMatching):
        def couple(self, x0, eps, cond=None):
            return eps[torch.argsort(torch.argsort(x0[:, 0]))]

    x0, index = data(mixture(), 8), torch.arange(8)
    objective, denoiser = Sorted("uniform", "raw"), Answering(Flow(), lambda x, t: torch.zeros_like(x), "velocity", 1.0)
    own = objective.noise(x0, 3, index)
    assert torch.equal(DenoisingScoreMatching("uniform").couple(x0, own), own)
    paired = objective.couple(x0, own)
    assert not torch.equal(paired, own)
    whole = objective(denoiser, x0, 3, index, eps=paired)
    torch.testing.assert_close(whole.per_sample, 0.5 * (paired - x0).square().sum(1))
    parts = [objective(denoiser, x0[k], 3, index[k], eps=paired[k]).per_sample for k in index.split(3)]
    torch.testing.assert_close(torch.cat(parts), whole.per_sample)
    alone = objective(denoiser, x0, 3, index)
    assert torch.equal(alone.per_sample, objective(denoiser, x0, 3, index, eps=own).per_sample)
