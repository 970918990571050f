"""The reverse chain and its bound, against the papers' tables and against integrals taken numerically."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate
from torch.distributions import Normal, kl_divergence

from lit_diffusion.backbones import MLP
from lit_diffusion.data_spec import DataSpec, GreyLevels
from lit_diffusion.denoisers import InterpolatedVariance, NetworkDenoiser, Prediction
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, SubVP, linear_betas
from lit_diffusion.reverse import ReverseChain, bound_term, discretised_log_prob, gaussian_kl, posterior_mean

T = 6
BETAS = np.linspace(0.02, 0.5, T)


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def grey_levels(count, value_range=(-1.0, 1.0), dequantized=False):
    return DataSpec("x", (1, 2, 2), count, value_range, None, dequantized).grey_levels


def tables(betas=BETAS):
    """``beta``, ``alpha``, ``abar`` and ``beta~`` of t = 1 .. T at 0 .. T - 1, as DDPM has them."""
    alpha = 1.0 - betas
    abar = np.cumprod(alpha)
    before = np.concatenate(([1.0], abar[:-1]))
    return betas, alpha, abar, betas * (1.0 - before) / (1.0 - abar)


@cache
def network(learned=True, dimension=4):
    """One random network that predicts the noise of points, and the variance."""
    torch.manual_seed(0)
    backbone = MLP((dimension,), width=16, depth=1, out_channels=2 * dimension if learned else None)
    return NetworkDenoiser(backbone, Betas(torch.tensor(BETAS)), "eps", "index", learned_variance=learned).double()


def at_level(level, x0, eps, learned=True):
    """What the network says of images at level t = 1 .. T."""
    denoiser = network(learned, x0.shape[1])
    t = torch.full((len(x0),), level / T, dtype=torch.float64)
    with torch.no_grad():
        return denoiser(denoiser.process.perturb(x0, t, eps), t)


def images(count=3, levels=17):
    """Grey levels in [-1, 1], the outermost among them, and noise."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, levels, (count, 4))
    grey[0, :2] = 0, levels - 1
    x0 = torch.tensor(2.0 * grey / (levels - 1) - 1.0)
    return x0, torch.tensor(rng.standard_normal((count, 4)))


# ---- mean and variance of a step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(1, T + 1))
def test_the_mean_is_the_papers(level):
    """``(x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha)``, and with the true x0 the posterior's of eq. 7."""
    x0, eps = images()
    prediction = at_level(level, x0, eps)
    beta, alpha, abar, _ = (table[level - 1] for table in tables())
    before = abar / alpha
    step = network().process.transition(wide((level - 1) / T).expand(3), prediction.coefficients.t)
    guess = prediction.raw
    expected = (prediction.x_t - beta / math.sqrt(1 - abar) * guess) / math.sqrt(alpha)
    torch.testing.assert_close(ReverseChain().mean(prediction, network(), step), expected, rtol=1e-10, atol=1e-12)
    posterior = math.sqrt(before) * beta * x0 + math.sqrt(alpha) * (1 - before) * prediction.x_t
    torch.testing.assert_close(posterior_mean(x0, prediction.x_t, step), posterior / (1 - abar), rtol=1e-10, atol=1e-12)


def log_variance(prediction, level, variance, of_grey_levels=False):
    s = torch.full((len(prediction.x_t),), (level - 1) / T, dtype=torch.float64)
    step = network().process.transition(s, prediction.coefficients.t)
    return ReverseChain(variance).log_variance(prediction, network(), step, s, of_grey_levels)


@pytest.mark.parametrize("level", range(1, T + 1))
def test_the_variances_are_the_papers(level):
    """At t = 1, where beta~ is 0, the one of t = 2 stands in: ``posterior_log_variance_clipped`` of both codes.

    For beta it stands in where grey levels are decoded: ``concat([posterior_variance[1:2], betas[1:]])`` of both.
    """
    prediction = at_level(level, *images())
    beta, _, _, beta_tilde = tables()
    low, high = math.log(beta_tilde[max(level - 1, 1)]), math.log(beta[level - 1])
    first = low if level == 1 else high
    for variance, of_grey_levels, expected in (
        ("beta", False, high),
        ("beta", True, first),
        ("beta_tilde", False, low),
        ("beta_tilde", True, low),
    ):
        found = log_variance(prediction, level, variance, of_grey_levels)
        assert (found.shape, found.dtype) == ((3, 1), torch.float64)
        assert found.flatten().tolist() == pytest.approx([expected] * 3, rel=1e-10)
    share = 0.5 * (network().backbone(prediction.x_t, torch.full((3,), level - 1.0))[:, 4:] + 1.0)
    found = log_variance(prediction, level, "learned")
    assert torch.equal(found, log_variance(prediction, level, "learned", True))
    assert (found.shape, found.dtype) == ((3, 4), torch.float64)
    torch.testing.assert_close(found, share * high + (1.0 - share) * low, rtol=1e-9, atol=1e-9)
    assert float(share.detach().std()) > 0.01


@pytest.mark.parametrize(
    "process", [VE(0.1, 5.0, num_timesteps=8), VP(), Betas(linear_betas(8))], ids=["VE", "VP", "Betas"]
)
def test_each_row_has_its_own_step_and_only_a_last_one_a_stand_in(process):
    s, t = wide(0.0, 0.25, 0.0, 0.5), wide(0.25, 0.75, 0.75, 0.625)
    x = torch.zeros(4, 1, 2, 2)
    prediction = Prediction(x, x, process.coefficients(t), torch.zeros(4), torch.ones(4))
    step, denoiser = process.transition(s, t), SimpleNamespace(process=process)
    found = ReverseChain("beta_tilde").log_variance(prediction, denoiser, step, s)
    assert found.shape == (4, 1, 1, 1)
    level = {
        time: (float(process.alpha(wide(time))), float(process.sigma(wide(time))))
        for time in (0.25, 0.5, 0.625, 0.75, 1.0)
    }
    for row, (below, above) in enumerate([(0.25, 0.5), (0.25, 0.75), (0.75, 1.0), (0.5, 0.625)]):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = level[below], level[above]
        beta = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        assert float(found[row]) == pytest.approx(math.log(beta * sigma_s**2 / sigma_t**2), rel=1e-9)
    betas = ReverseChain("beta").log_variance(prediction, denoiser, step, s).flatten()
    assert float(betas[0]) == pytest.approx(2 * math.log(level[0.25][1]), rel=1e-9)  # of all the noise


def test_a_learned_variance_must_have_been_learned():
    ReverseChain("learned").check(network(learned=True))
    ReverseChain("beta").check(network(learned=False))
    with pytest.raises(UserError, match="choose beta or beta_tilde") as caught:
        ReverseChain("learned").check(network(learned=False))
    assert "\n" not in str(caught.value)
    x0, eps = images()
    assert at_level(1, x0, eps, learned=False).reverse_log_variance is None


# ---- Kullback and Leibler ----------------------------------------------------------------------------------------


def test_the_divergence_of_gaussians_is_torchs():
    generator = torch.Generator().manual_seed(0)
    mean, other_mean, lv, olv = (3 * torch.randn(500, generator=generator, dtype=torch.float64) for _ in range(4))
    expected = kl_divergence(Normal(mean, (0.5 * lv).exp()), Normal(other_mean, (0.5 * olv).exp()))
    torch.testing.assert_close(gaussian_kl(mean, lv, other_mean, olv), expected, rtol=1e-10, atol=1e-12)


def test_the_divergence_of_equal_gaussians_is_0_and_keeps_its_digits_near_it():
    zero = wide(0.0)
    assert float(gaussian_kl(zero, wide(-9.0), zero, wide(-9.0))) == 0.0
    for d in (1e-3, 1e-6, 1e-9):
        # Half of e^d - 1 - d.
        assert float(gaussian_kl(zero, wide(d), zero, zero)) == pytest.approx(d**2 / 4, rel=1e-3, abs=1e-20)
        assert float(gaussian_kl(wide(d), zero, zero, zero)) == pytest.approx(d**2 / 2, rel=1e-9)


# ---- the probability of a grey level -----------------------------------------------------------------------------


def log_mass(low, high, mean, deviation):
    """``log`` of the integral of ``N(mean, deviation^2)`` from low to high, its largest value taken out first."""
    peak = min(max(mean, low), high)
    fall = deviation if peak == mean else min(deviation, deviation**2 / abs(peak - mean))

    def density(y):
        return math.exp(((peak - mean) ** 2 - (y - mean) ** 2) / (2 * deviation**2))

    low, high = max(low, peak - 50 * fall), min(high, peak + 50 * fall)
    edges = [low, *(peak + k * fall for k in (-20, -8, -3, -1, 0, 1, 3, 8, 20) if low < peak + k * fall < high), high]
    mass = sum(integrate.quad(density, a, b, epsabs=0.0, epsrel=1e-12)[0] for a, b in pairwise(edges))
    return math.log(mass) - (peak - mean) ** 2 / (2 * deviation**2) - 0.5 * math.log(2 * math.pi * deviation**2)


def of_a_level(k, levels, mean, deviation):
    low, high, width = levels.low, levels.high, levels.width
    count = round((high - low) / width) + 1
    x = low + k * width
    return log_mass(
        -math.inf if k == 0 else x - width / 2, math.inf if k == count - 1 else x + width / 2, mean, deviation
    )


@pytest.mark.parametrize("count", [17, 256])
@pytest.mark.parametrize("deviation", [0.004, 0.05, 0.7, 20.0])
@pytest.mark.parametrize("mean", [-1.0, 0.3, 1.02, -7.0, 3.0])
def test_the_probability_of_a_grey_level_is_the_integral_over_its_bin(mean, deviation, count):
    """Near and far, down to ``e^-1000000``, and beyond the outermost levels."""
    levels = grey_levels(count)
    ks = [0, 1, count // 2, count - 2, count - 1]
    x = wide(*(levels.low + k * levels.width for k in ks))
    log_variance = wide(2 * math.log(deviation)).expand(5)
    found = discretised_log_prob(x, wide(mean).expand(5), log_variance, levels.width, levels.low, levels.high)
    expected = [of_a_level(k, levels, mean, deviation) for k in ks]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("count", [2, 17, 256])
def test_the_probabilities_of_all_grey_levels_add_up_to_1(count, value_range, dequantized):
    levels = grey_levels(count, value_range, dequantized)
    mean = wide(-4.0, -1.0, -0.3, 0.0, 0.51, 1.0, 9.0)[:, None, None]
    log_variance = 2 * wide(1e-3, 0.03, 0.5, 30.0).log()[:, None]
    # As float32, which images are, the edges of neighbouring bins differ in the last digit.
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x = levels.low + levels.width * torch.arange(count, dtype=dtype)
        log_prob = discretised_log_prob(x, mean, log_variance, levels.width, levels.low, levels.high)
        torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(7, 4).double(), rtol=tolerance, atol=0)


def test_the_probability_of_a_grey_level_has_a_gradient_everywhere():
    levels = grey_levels(17)
    x = levels.low + levels.width * torch.arange(17, dtype=torch.float64)
    mean = wide(-40.0, -1.0, 0.0, 1.0, 40.0)[:, None].requires_grad_()
    log_variance = wide(-14.0, -6.0, 0.0, 3.0)[:, None, None].requires_grad_()
    log_prob = discretised_log_prob(x, mean, log_variance, levels.width, levels.low, levels.high)
    assert bool(torch.isfinite(log_prob).all())
    gradients = torch.autograd.grad(log_prob.sum(), (mean, log_variance))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def middle(m, lv):
        return discretised_log_prob(x[[0, 3, 16]], m, lv, levels.width, levels.low, levels.high)

    assert torch.autograd.gradcheck(middle, (wide(0.4).requires_grad_(), wide(-3.0).requires_grad_()))


# ---- the bound ---------------------------------------------------------------------------------------------------


def divergence(mean, variance, other_mean, other_variance):
    """``KL(N || N)`` by integration."""

    def log_density(y, m, v):
        return -0.5 * (y - m) ** 2 / v - 0.5 * math.log(2 * math.pi * v)

    def integrand(y):
        log_q = log_density(y, mean, variance)
        return math.exp(log_q) * (log_q - log_density(y, other_mean, other_variance))

    spread = 12 * math.sqrt(variance)
    return integrate.quad(integrand, mean - spread, mean + spread, epsabs=1e-13, epsrel=1e-11, limit=200)[0]


def by_hand(level, x0, eps, variance, levels, clip=math.inf):
    """What the step from level t to t - 1 adds, pixel by pixel, from DDPM's tables and the network's raw output."""
    beta, alpha, abar, beta_tilde = tables()
    k = level - 1
    x_t = math.sqrt(abar[k]) * x0 + math.sqrt(1 - abar[k]) * eps
    with torch.no_grad():
        out = network().backbone(x_t, torch.full((len(x0),), float(k)))
    guess, told = out[:, :4].numpy(), out[:, 4:].numpy()
    mean = (x_t.numpy() - beta[k] / math.sqrt(1 - abar[k]) * guess) / math.sqrt(alpha[k])
    guessed_x0 = (x_t.numpy() - math.sqrt(1 - abar[k]) * guess) / math.sqrt(abar[k])
    before = abar[k] / alpha[k]
    mean -= math.sqrt(before) * beta[k] / (1 - abar[k]) * (guessed_x0 - guessed_x0.clip(-clip, clip))
    low, share = beta_tilde[max(k, 1)], (told + 1) / 2
    fixed = {"beta": beta[k] if k else low, "beta_tilde": low, "learned": beta[k] ** share * low ** (1 - share)}
    variances = np.broadcast_to(fixed[variance], mean.shape)
    terms = np.zeros(mean.shape)
    for place in np.ndindex(*mean.shape):
        clean, m, v = float(x0[place]), mean[place], variances[place]
        if level == 1:
            grey = round((clean - levels.low) / levels.width)
            terms[place] = -of_a_level(grey, levels, m, math.sqrt(v))
        else:
            x0_coefficient = math.sqrt(abar[k - 1]) * beta[k] / (1 - abar[k])
            xt_coefficient = math.sqrt(alpha[k]) * (1 - abar[k - 1]) / (1 - abar[k])
            terms[place] = divergence(x0_coefficient * clean + xt_coefficient * float(x_t[place]), beta_tilde[k], m, v)
    return terms.sum(1)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
def test_every_term_of_the_bound_is_the_integral(variance):
    x0, eps = images()
    levels = grey_levels(17)
    for level in range(1, T + 1):
        s = torch.full((3,), (level - 1) / T, dtype=torch.float64)
        found = bound_term(at_level(level, x0, eps), network(), x0, s, ReverseChain(variance), levels)
        assert (found.shape, found.dtype) == ((3,), torch.float64)
        assert found.tolist() == pytest.approx(by_hand(level, x0, eps, variance, levels).tolist(), rel=1e-7)


def test_the_bound_is_of_the_clipped_prediction(monkeypatch):
    """As the sampler's chain is; in the range of the data, or in a given one."""
    x0, eps = images()
    eps, levels = 3.0 * eps, grey_levels(17)
    for level in (1, 2, T):
        s, prediction = torch.full((3,), (level - 1) / T, dtype=torch.float64), at_level(level, x0, eps)
        expected = by_hand(level, x0, eps, "beta", levels, clip=1.0)
        given = bound_term(prediction, network(), x0, s, ReverseChain("beta", (-1.0, 1.0)), levels)
        assert given.tolist() == pytest.approx(expected.tolist(), rel=1e-7)
        monkeypatch.setattr(network(), "data_range", (-1.0, 1.0))
        for clip, same in (("data", True), (None, False)):
            found = bound_term(prediction, network(), x0, s, ReverseChain("beta", clip), levels)
            assert torch.equal(found, given) is same
        monkeypatch.undo()


def test_the_variance_is_the_papers_own_unless_it_is_given():
    """Ho et al. 2020 take beta, Song et al. 2021, eq. 47, beta~, Nichol and Dhariwal 2021 what was learned."""
    for process, learned, expected in (
        (Betas(linear_betas(8)), False, "beta"),
        (VP(), False, "beta"),
        (SubVP(), False, "beta"),
        (VE(0.1, 5.0, num_timesteps=8), False, "beta_tilde"),
        (VE(0.1, 5.0), False, "beta_tilde"),
        (Flow(), False, "beta_tilde"),
        (Betas(linear_betas(8)), True, "learned"),
    ):
        denoiser = SimpleNamespace(process=process, learned_variance=learned, data_range=(0.0, 1.0))
        assert ReverseChain().variance_of(denoiser) == expected
        assert ReverseChain("beta").variance_of(denoiser) == "beta"
        assert ReverseChain().describe(denoiser, True)["variance"] == expected
    said = ReverseChain("beta").describe(denoiser, True)
    assert said == {"variance": "beta", "first_variance": "beta_tilde of the second step", "clip_x0": "data [0, 1]"}
    assert ReverseChain("beta", None).describe(denoiser, False)["first_variance"] == "beta"


def test_rows_at_different_levels_do_not_mix():
    x0, eps = images(T)
    process, levels = network().process, grey_levels(17)
    t = process.grid()
    s = t - 1 / T
    s[0] = 0.0
    with torch.no_grad():
        together = network()(process.perturb(x0, t, eps), t)
    found = bound_term(together, network(), x0, s, ReverseChain("learned"), levels)
    for row in range(T):
        alone = at_level(row + 1, x0[row : row + 1], eps[row : row + 1])
        expected = bound_term(alone, network(), x0[row : row + 1], s[row : row + 1], ReverseChain("learned"), levels)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_with_a_fixed_variance_it_is_the_papers_weighted_loss(variance):
    """``beta^2 / (2 sigma^2 alpha (1 - abar)) |eps - eps_theta|^2`` and what the variances alone cost (eq. 12)."""
    x0, eps = images()
    for level in range(2, T + 1):
        beta, alpha, abar, beta_tilde = (table[level - 1] for table in tables())
        prediction = at_level(level, x0, eps)
        s = torch.full((3,), (level - 1) / T, dtype=torch.float64)
        found = bound_term(prediction, network(), x0, s, ReverseChain(variance), grey_levels(17))
        sigma2 = {"beta": beta, "beta_tilde": beta_tilde}[variance]
        weighted = beta**2 / (2 * sigma2 * alpha * (1 - abar)) * (eps - prediction.raw).square().sum(1)
        ratio = beta_tilde / sigma2
        constant = 4 * 0.5 * (ratio - 1 - math.log(ratio))
        assert (constant == 0.0) == (variance == "beta_tilde")
        torch.testing.assert_close(found, weighted + constant, rtol=1e-9, atol=1e-11)


def test_the_decoder_of_points_is_their_density():
    x0, eps = images()
    prediction = at_level(1, x0, eps)
    found = bound_term(prediction, network(), x0, torch.zeros(3, dtype=torch.float64), ReverseChain("learned"), None)
    deviation = torch.exp(0.5 * log_variance(prediction, 1, "learned"))
    expected = -Normal(prediction.x0, deviation).log_prob(x0).sum(1)  # the last mean is the predicted x0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_finer_grey_levels_approach_the_density():
    """``-log P(level)`` is ``-log p - log width`` a pixel."""
    x0, eps = images(levels=4097)
    width = 2 / 4096
    grey = GreyLevels(-1.0, 1.0, width)
    x0 = grey.centre(x0.clamp(-0.99, 0.99))
    prediction = at_level(1, x0, eps)
    s = torch.zeros(3, dtype=torch.float64)
    discrete = bound_term(prediction, network(), x0, s, ReverseChain("beta_tilde"), grey)
    density = bound_term(prediction, network(), x0, s, ReverseChain("beta_tilde"), None)
    torch.testing.assert_close(discrete, density - 4 * math.log(width), rtol=1e-5, atol=1e-5)


def test_images_have_their_pixels_summed():
    """The same numbers as an image ``[1, 2, 2]`` and as a point ``[4]``, in float32 as in float64."""
    x0, eps = images()
    for level in (1, 4):
        flat = at_level(level, x0, eps)
        s = torch.full((3,), (level - 1) / T, dtype=torch.float64)
        shape = (3, 1, 2, 2)
        views = {"x_t": flat.x_t.view(shape), "raw": flat.raw.view(shape)}
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            image = Prediction(
                **{name: value.to(dtype) for name, value in views.items()},
                coefficients=flat.coefficients,
                u=flat.u,
                v=flat.v,
                reverse_log_variance=InterpolatedVariance(flat.reverse_log_variance.share.view(shape).to(dtype)),
            )
            for variance in ("beta", "learned"):
                expected = bound_term(flat, network(), x0, s, ReverseChain(variance), grey_levels(17))
                found = bound_term(
                    image, network(), x0.view(shape).to(dtype), s, ReverseChain(variance), grey_levels(17)
                )
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
