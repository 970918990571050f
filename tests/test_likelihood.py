"""Likelihoods of models whose densities are known."""

import copy
import math

import pytest
import torch

from lit_diffusion.data_spec import DataSpec, GreyLevels
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.errors import UserError
from lit_diffusion.likelihood import bits_per_dimension, dequantized, flow_log_prob, variational_bound
from lit_diffusion.processes import VE, VP, Betas, Flow, SubVP, linear_betas
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.reverse import ReverseChain
from lit_diffusion.samplers.times import timesteps_to_zero

PROCESSES = {"VE": VE(0.01, 20.0), "VP": VP(), "SubVP": SubVP(), "DDPM": Betas(linear_betas())}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)

FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [-0.3, 0.2, 0.5]]).double()
GAUSSIAN = GaussianMixture(torch.ones(1), torch.tensor([[0.5, -0.2, 0.1]]), (FACTOR @ FACTOR.T)[None])
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]),
    torch.tensor([[-1.0, 0.0, 0.5], [1.0, 0.5, -0.5]]),
    torch.stack((FACTOR @ FACTOR.T, 0.2 * torch.eye(3).double())),
)


def noise_of(count, dimension=3, seed=0):
    return SampleNoise(seed, torch.arange(count), (dimension,), dtype=torch.float64)


def draws(distribution, count, seed=0):
    noise = noise_of(count, distribution.dimension, seed)
    return distribution.sample(noise.normal(), noise.uniform(()))


def marginal(distribution, process, t):
    level = process.coefficients(torch.tensor([t], dtype=torch.float64))

    def log_prob(x):
        alpha, sigma = level.alpha.expand(len(x)), level.sigma.expand(len(x))
        return distribution.log_prob_and_score(x, alpha, sigma)[0]

    return log_prob


def with_exact_end(distribution, process):
    """The best denoiser there is, on a process whose prior is what the data have become."""
    process = copy.deepcopy(process)
    process.prior_log_prob = marginal(distribution, process, 1.0)
    return ExactDenoiser(distribution, process)


# By the ODE


@every_process
@pytest.mark.parametrize("distribution", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_with_the_exact_end_it_is_the_density_at_the_smallest_time(process, distribution):
    x = draws(distribution, 200)
    found = flow_log_prob(with_exact_end(distribution, process), x, noise_of(200), trace="exact")
    truth = marginal(distribution, process, process.t_min)(x)
    assert float((found.log_prob - truth).abs().max()) / 3 < 1e-3
    assert found.log_prob.dtype == torch.float64


@every_process
def test_another_smallest_time_is_another_density(process):
    if process.num_timesteps is not None:
        return
    x = draws(MIXTURE, 50)
    found = flow_log_prob(with_exact_end(MIXTURE, process), x, noise_of(50), trace="exact", t_min=0.2)
    assert float((found.log_prob - marginal(MIXTURE, process, 0.2)(x)).abs().max()) / 3 < 1e-3
    assert float((found.log_prob - marginal(MIXTURE, process, process.t_min)(x)).abs().max()) > 0.03


@every_process
def test_the_prior_changes_it_by_what_the_prior_is_wrong(process):
    x, denoiser = draws(MIXTURE, 50), ExactDenoiser(MIXTURE, process)
    end = marginal(MIXTURE, process, 1.0)
    exact = flow_log_prob(with_exact_end(MIXTURE, process), x, noise_of(50), trace="exact")
    prior = flow_log_prob(denoiser, x, noise_of(50), trace="exact")
    assert torch.equal(exact.x_1, prior.x_1)
    wrong = end(exact.x_1) - process.prior_log_prob(exact.x_1)
    torch.testing.assert_close(exact.log_prob - prior.log_prob, wrong, rtol=0, atol=1e-10)
    torch.testing.assert_close(prior.log_prob, prior.terminal + prior.trace, rtol=0, atol=1e-12)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_is_unbiased(probe):
    process, count = VP(), 2000
    x, denoiser = draws(GAUSSIAN, count), with_exact_end(GAUSSIAN, process)
    keys = {"rtol": 1e-4, "atol": 1e-4}
    exact = flow_log_prob(denoiser, x, noise_of(count), trace="exact", **keys).log_prob
    one = flow_log_prob(denoiser, x, noise_of(count), probe=probe, **keys).log_prob - exact
    assert abs(float(one.mean())) < 3 * float(one.std()) / math.sqrt(count)
    four = flow_log_prob(denoiser, x, noise_of(count), probe=probe, probes=4, **keys).log_prob - exact
    assert float(four.var() / one.var()) == pytest.approx(0.25, rel=0.2)
    # Var e' J e: the Gaussian's has the diagonal, the Rademacher's has not.
    assert float(one.std()) > 0.05


def test_rademacher_probes_vary_less():
    process, count = VP(), 500
    x, denoiser = draws(GAUSSIAN, count), ExactDenoiser(GAUSSIAN, process)
    spread = {}
    exact = flow_log_prob(denoiser, x, noise_of(count), trace="exact", rtol=1e-4, atol=1e-4).log_prob
    for probe in ("rademacher", "gaussian"):
        found = flow_log_prob(denoiser, x, noise_of(count), probe=probe, rtol=1e-4, atol=1e-4)
        spread[probe] = float((found.log_prob - exact).var())
    assert spread["rademacher"] < 0.8 * spread["gaussian"]


def test_a_datum_does_not_depend_on_its_company():
    denoiser, x = ExactDenoiser(MIXTURE, VP()), draws(MIXTURE, 8)
    together = flow_log_prob(denoiser, x, noise_of(8)).log_prob
    alone = [
        flow_log_prob(denoiser, x[k : k + 1], SampleNoise(0, torch.tensor([k]), (3,), torch.float64)).log_prob
        for k in range(8)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-3)


def test_what_cannot_be_is_refused():
    one_level = ExactDenoiser(GAUSSIAN, VE(1.0, 1.0, num_timesteps=1))
    with pytest.raises(UserError, match="one noise level"):
        flow_log_prob(one_level, draws(GAUSSIAN, 2), noise_of(2))
    with pytest.raises(UserError, match="one noise level"):
        variational_bound(one_level, draws(GAUSSIAN, 2), noise_of(2), ReverseChain("beta"))
    denoiser = ExactDenoiser(GAUSSIAN, VP())
    with pytest.raises(UserError, match="learned"):
        variational_bound(denoiser, draws(GAUSSIAN, 2), noise_of(2), ReverseChain("learned"))
    with pytest.raises(UserError, match="must be positive"):
        flow_log_prob(denoiser, draws(GAUSSIAN, 2), noise_of(2), rtol=0.0)
    wide = GaussianMixture(torch.ones(1), torch.zeros(1, 300), torch.eye(300)[None])
    with pytest.raises(UserError, match="300 backward passes"):
        flow_log_prob(ExactDenoiser(wide, VP()), torch.zeros(1, 300), noise_of(1, 300), trace="exact")


# By the bound


def expected_bound(process, c, steps, variance):
    """Of data N(0, c) in one dimension under the exact model: all terms are Gaussian integrals."""
    nodes = torch.arange(0, steps + 1, dtype=torch.float64) / steps
    s, t = nodes[:-1], nodes[1:]
    if process.num_timesteps is None:
        t = t.clamp(min=process.t_min_sampling)
        s = torch.cat((s[:1], t[:-1]))
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    alpha_t, sigma_t = process.alpha(t), process.sigma(t)
    posterior = c * sigma_t**2 / (alpha_t**2 * c + sigma_t**2)  # of x_0 given x_t
    beta = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
    tilde = beta * sigma_s**2 / sigma_t**2
    v = beta if variance == "beta" else tilde
    x0_coefficient = alpha_s * beta / sigma_t**2
    kl = 0.5 * (tilde / v - 1 - (tilde / v).log() + x0_coefficient**2 * posterior / v)
    last = beta[0] if variance == "beta" else sigma_t[0] ** 2 * beta[1] / sigma_t[1] ** 2
    decoder = 0.5 * (math.log(2 * math.pi) + last.log() + posterior[0] / last)
    one, p = torch.ones(1).double(), process.prior_std**2
    end, spread = process.sigma(one) ** 2, process.alpha(one) ** 2 * c
    prior = 0.5 * (end / p - 1 - (end / p).log() + spread / p)
    return float(prior + kl[1:].sum() + decoder)


@pytest.mark.parametrize("process", [*PROCESSES.values(), Flow()], ids=[*PROCESSES, "Flow"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_bound_of_the_exact_model_is_its_closed_form(process, variance):
    c, count, steps = 0.7, 1500, 100
    distribution = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.tensor([[[c]]]))
    x = draws(distribution, count)
    denoiser = ExactDenoiser(distribution, process)
    bound = variational_bound(denoiser, x, noise_of(count, 1, seed=1), ReverseChain(variance), steps=steps)
    error = float(bound.total.std()) / math.sqrt(count)
    assert abs(float(bound.total.mean()) - expected_bound(process, c, steps, variance)) < 4 * error
    torch.testing.assert_close(bound.prior + bound.kl + bound.decoder, bound.total)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_the_decoder_has_the_variance_of_its_own_chains_second_step(spacing):
    process, c, count = Betas(linear_betas(1000)), 0.7, 2000
    distribution = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.tensor([[[c]]]))
    x, denoiser = draws(distribution, count), ExactDenoiser(distribution, process)
    chain = ReverseChain("beta_tilde")
    bound = variational_bound(denoiser, x, noise_of(count, 1, seed=1), chain, steps=10, spacing=spacing)
    first, second = (torch.tensor([t], dtype=torch.float64) for t in timesteps_to_zero(process, 10, spacing)[:-3:-1])
    assert float(second / first) == (2.0 if spacing == "uniform" else 4.0)
    variance = float(process.transition(first, second).beta_tilde)
    noise, signal = float(process.sigma(first) ** 2), float(process.alpha(first) ** 2) * c
    uncertain = c * noise / (signal + noise)
    expected = 0.5 * (math.log(2 * math.pi * variance) + uncertain / variance)
    error = float(bound.decoder.std()) / math.sqrt(count)
    assert abs(float(bound.decoder.mean()) - expected) < 4 * error < 0.1


@pytest.mark.parametrize("name", ["VP", "SubVP", "DDPM"])
def test_the_gap_to_the_entropy_closes_with_the_steps(name):
    process, c = PROCESSES[name], 0.7
    entropy = 0.5 * math.log(2 * math.pi * math.e * c)
    gaps = [expected_bound(process, c, steps, "beta") - entropy for steps in (10, 100, 1000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.15


def test_a_few_terms_at_random_have_the_same_expectation():
    process, count = Betas(linear_betas(50, 1e-3, 0.2)), 4000
    x, denoiser = draws(GAUSSIAN, count), ExactDenoiser(GAUSSIAN, process)
    whole = variational_bound(denoiser, x, noise_of(count, seed=1), ReverseChain("beta"))
    few = variational_bound(denoiser, x, noise_of(count, seed=2), ReverseChain("beta"), sampled=7)
    assert int((few.steps != 0).sum(1).max()) == 8
    by_level = (whole.steps - few.steps).mean(0)
    error = torch.sqrt((whole.steps.var(0) + few.steps.var(0)) / count)
    assert bool((by_level.abs() < 4.5 * error).all())
    together = math.sqrt(float(whole.total.var() + few.total.var()) / count)
    assert abs(float(whole.total.mean() - few.total.mean())) < 4 * together
    assert float(few.total.var()) > float(whole.total.var())


@pytest.mark.slow
def test_grey_levels_cost_at_least_their_entropy_and_hardly_more_with_many_steps():
    """Data on 17 levels and the exact model of them: the bound is one of probabilities."""
    levels, count = 17, 600
    grey = GreyLevels(-1.0, 1.0, 2.0 / (levels - 1))
    weights = torch.arange(1.0, levels + 1).double()
    values = torch.linspace(-1.0, 1.0, levels).double()[:, None]
    distribution = GaussianMixture(weights, values, torch.zeros(levels, 1, 1))
    x = draws(distribution, count)
    log_probability = distribution.weights[distribution.component_of(x)].log()
    gaps = []
    for steps in (500, 1000, 4000):
        denoiser = ExactDenoiser(distribution, Betas(linear_betas(steps, 0.1 / steps, 20.0 / steps)))
        bound = variational_bound(denoiser, x, noise_of(count, 1, seed=3), ReverseChain("beta_tilde"), grey)
        gap = bound.total + log_probability
        gaps.append((float(gap.mean()), float(gap.std()) / math.sqrt(count)))
    assert all(gap > 3 * error for gap, error in gaps[:2])
    assert gaps[0][0] > gaps[1][0] > gaps[2][0] > -3 * gaps[2][1]
    assert gaps[2][0] < 0.06
    assert gaps[2][0] < 0.5 * gaps[1][0]


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_chain_of_one_step_has_a_decoder(variance):
    """There is no next step whose variance could stand in: beta does, for either variance."""
    x, denoiser = draws(GAUSSIAN, 10), ExactDenoiser(GAUSSIAN, PROCESSES["DDPM"])
    one = variational_bound(denoiser, x, noise_of(10), ReverseChain(variance), steps=1)
    torch.testing.assert_close(
        one.total, variational_bound(denoiser, x, noise_of(10), ReverseChain("beta"), steps=1).total
    )
    assert bool(torch.isfinite(one.total).all())


# Units


def test_a_uniform_density_costs_the_logarithm_of_the_number_of_levels():
    for dequantize in (False, True):
        data_spec = DataSpec("x", (1, 2, 3), 17, (-1.0, 1.0), None, dequantize)
        grey = data_spec.grey_levels
        # The bins fill the range, or reach half a level beyond it.
        volume = 17 * grey.width
        log_prob = torch.full((4,), -6 * math.log(volume)).double()
        torch.testing.assert_close(bits_per_dimension(log_prob, 6, grey), torch.full((4,), math.log2(17)).double())
        assert grey.high - grey.low == pytest.approx(16 * grey.width)


def test_dequantised_values_fill_their_bins():
    grey = GreyLevels(0.0, 1.0, 1.0 / 16)
    x = torch.full((4000, 3), 5.0 / 16, dtype=torch.float64)
    spread = (dequantized(x, noise_of(4000), grey) - x) / grey.width
    assert -0.5 < float(spread.min()) < -0.49
    assert 0.49 < float(spread.max()) < 0.5
    assert float(spread.mean()) == pytest.approx(0.0, abs=0.01)
    assert torch.equal(dequantized(x, noise_of(4000), None), x)
