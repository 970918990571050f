import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.laws import (
    GAUSSIAN,
    GENTLE,
    MIXTURE,
    PAPERS,
    Network,
    as_azulas,
    assert_law,
    assert_mixture,
    bias,
    law_of,
    noise_of,
    on_their_table,
    order,
    weak_error,
    wide,
)

from lit_diffusion.denoisers import Denoiser, InterpolatedVariance, NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, linear_betas
from lit_diffusion.samplers import Ancestral, Move, Run

VARIANCES = ["beta", "beta_tilde"]
each_variance = pytest.mark.parametrize("variance", VARIANCES)
each_paper = pytest.mark.parametrize("process", PAPERS.values(), ids=PAPERS)


# The formulae


def exact_score(x, process, t):
    alpha, sigma = process.alpha(wide(t)), process.sigma(wide(t))
    _, score = MIXTURE.log_prob_and_score(x, alpha.expand(len(x)), sigma.expand(len(x)))
    return score, float(sigma)


def one_step(sampler, process, x, move):
    return sampler.step(Run(ExactDenoiser(MIXTURE, process), noise_of(len(x), 9, dtype=x.dtype)), x, move)


@pytest.mark.parametrize("i", [2, 5, 10])
def test_a_step_on_ncsns_levels_is_equation_47_of_song_et_al(i):
    process = VE(0.01, 1.0, num_timesteps=10)
    sigma = [0.0, *(0.01 * 100 ** (k / 9) for k in range(10))]
    x = noise_of(6, dtype=torch.float64).normal()
    z = noise_of(6, 9, dtype=torch.float64).normal()
    score, _ = exact_score(x, process, i / 10)
    new = sigma[i] ** 2 - sigma[i - 1] ** 2
    mean = x + new * score
    paper = math.sqrt(sigma[i - 1] ** 2 * new / sigma[i] ** 2)
    for variance, spread in ((None, paper), ("beta_tilde", paper), ("beta", new**0.5)):
        moved = one_step(Ancestral(variance=variance), process, x, Move(i / 10, (i - 1) / 10))
        torch.testing.assert_close(moved, mean + spread * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("i", [1, 2, 500, 1000])
def test_a_step_is_algorithm_2_of_ho_et_al(i):
    process, betas = Betas(linear_betas()), linear_betas().tolist()
    kept = math.prod(1 - beta for beta in betas[:i])
    before = math.prod(1 - beta for beta in betas[: i - 1])
    beta = betas[i - 1]
    x = noise_of(6, dtype=torch.float64).normal()
    z = noise_of(6, 9, dtype=torch.float64).normal()
    score, sigma = exact_score(x, process, i / 1000)
    mean = (x + beta / math.sqrt(1 - kept) * sigma * score) / math.sqrt(1 - beta)
    for variance, square in ((None, beta), ("beta", beta), ("beta_tilde", (1 - before) / (1 - kept) * beta)):
        moved = one_step(Ancestral(variance=variance), process, x, Move(i / 1000, (i - 1) / 1000))
        expected = mean if i == 1 else mean + math.sqrt(square) * z
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


def test_the_plan_visits_every_timestep_down_to_0():
    moves = Ancestral().plan(Betas(linear_betas(50)))
    assert [(move.t, move.s) for move in moves] == [(i / 50, (i - 1) / 50) for i in range(50, 0, -1)]
    assert [move.t for move in Ancestral(5).plan(Betas(linear_betas(50)))] == [1.0, 0.8, 0.6, 0.4, 0.2]
    quadratic = Ancestral(5, spacing="quadratic").plan(Betas(linear_betas(50)))
    assert [move.t for move in quadratic] == [1.0, 0.64, 0.36, 0.16, 0.04]
    assert len(Ancestral().plan(VP())) == 1000


def test_the_clipped_prediction_stays_in_its_range():
    process, x = VP(), 3.0 * noise_of(50).normal()
    for low, high in ((-0.2, 0.3), (0.0, 1.0)):
        last = one_step(Ancestral(clip_x0=(low, high)), process, x, Move(0.3, 0.0))
        assert float(last.min()) == pytest.approx(low)
        assert float(last.max()) == pytest.approx(high)
    assert float(one_step(Ancestral(), process, x, Move(0.3, 0.0)).max()) > 1.0


class Shard(Denoiser):
    """The exact denoiser, which says a share of the learned variance."""

    learned_variance = True

    def __init__(self, process, share):
        super().__init__()
        self.process, self.share, self.exact = process, share, ExactDenoiser(MIXTURE, process)

    def forward(self, x_t, t, cond=None, began=None):
        return replace(self.exact(x_t, t), reverse_log_variance=InterpolatedVariance(torch.full_like(x_t, self.share)))


def test_a_learned_variance_lies_between_the_two_in_its_logarithm():
    process, x = Betas(linear_betas()), noise_of(6, dtype=torch.float64).normal()
    z = noise_of(6, 9, dtype=torch.float64).normal()
    for move in (Move(1.0, 0.999), Move(0.5, 0.3), Move(0.002, 0.001)):
        step = process.transition(wide(move.s), wide(move.t))
        mean = one_step(Ancestral(), process, x, move) - step.beta.sqrt() * z
        for share in (0.0, 0.3, 1.0):
            noise = noise_of(6, 9, dtype=torch.float64)
            moved = Ancestral(variance="learned").step(Run(Shard(process, share), noise), x, move)
            deviation = step.beta ** (share / 2) * step.beta_tilde ** ((1 - share) / 2)
            torch.testing.assert_close(moved, mean + deviation * z, rtol=1e-9, atol=1e-9)
            noise = noise_of(6, 9, dtype=torch.float64)
            assert torch.equal(Ancestral().step(Run(Shard(process, share), noise), x, move), moved)


def test_a_variance_that_was_not_learned_is_refused():
    with pytest.raises(UserError, match="has not learned a reverse variance; choose beta or beta_tilde"):
        Ancestral(variance="learned").sample(ExactDenoiser(MIXTURE, VP()), noise_of(2))


# Gaussian data and a mixture


@each_variance
@each_paper
def test_many_steps_have_the_law_of_the_data(process, variance):
    assert bias(Ancestral(300, variance), process) < 0.05


@each_variance
@pytest.mark.parametrize("process", GENTLE.values(), ids=GENTLE)
def test_the_law_converges_with_order_1(process, variance):
    # In equal steps the missing share of the posterior's variance sums to steps log(steps), where sigma^2 ~ t.
    samplers = (Ancestral(steps, variance, spacing="quadratic") for steps in (50, 100))
    errors = (weak_error(sampler, process, GAUSSIAN.reversed) for sampler in samplers)
    assert order(*errors) == pytest.approx(1.0, abs=0.1)


@each_paper
def test_on_gaussian_data_the_mean_is_exact_for_any_steps(process):
    """E[x_s | x_t] is linear in E[x_0 | x_t]: only the variance of a long step is not that of the data."""
    mean, covariance = GAUSSIAN.marginal(process, 1.0)
    start = (mean + 0.5, covariance)
    expected, _ = GAUSSIAN.reversed(process, start, 1.0, 0.0)
    torch.testing.assert_close(law_of(Ancestral(3), process, start)[0], expected, rtol=1e-9, atol=1e-9)


@each_variance
@each_paper
def test_samples_have_the_law_of_their_steps(process, variance):
    assert_law(Ancestral(12, variance), process)


@each_variance
@each_paper
def test_samples_of_a_mixture(process, variance):
    assert_mixture(Ancestral(200, variance), process)


# Other implementations


THEIRS = {"beta": "fixed_large", "beta_tilde": "fixed_small", "learned": "learned_range"}
WALKS = itertools.product([(100, 100), (1000, 50), (1000, 7)], THEIRS, [None, (-1.0, 1.0)])


@pytest.mark.parametrize(("walk", "variance", "clip"), [*WALKS, ((1000, 1000), "beta", None)])
def test_diffusers_agrees(walk, variance, clip, monkeypatch):
    levels, steps = walk
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = module.DDPMScheduler(
        levels, 1e-4, 0.02, variance_type=THEIRS[variance], clip_sample=clip is not None, timestep_spacing="trailing"
    )
    process = on_their_table(scheduler)
    scheduler.set_timesteps(steps)
    network = Network(variance == "learned")
    denoiser = NetworkDenoiser(network, process, "eps", "index", learned_variance=variance == "learned")
    ours, states = Ancestral(steps, variance, clip_x0=clip), []
    ours.sample(denoiser, noise_of(3, shape=(1, 4, 4), dtype=torch.float64), on_step=lambda p: states.append(p.x))
    noise = noise_of(3, shape=(1, 4, 4), dtype=torch.float64)
    x = noise.normal()
    # On a subsequence diffusers adds noise after its last step too, unless that step is to index 0.
    numbers = [noise.normal() for _ in range(steps - 1)] + [torch.zeros_like(x)]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **keys: numbers.pop(0))
    assert [round(move.t * levels) - 1 for move in ours.plan(process)] == scheduler.timesteps.tolist()
    with torch.no_grad():
        for t, state in zip(scheduler.timesteps, states, strict=True):
            x = scheduler.step(network(x, t.expand(3)), t, x).prev_sample
            assert float((state - x).norm() / x.norm()) < 1e-9


@each_paper
def test_azula_agrees(process, monkeypatch):
    sample = pytest.importorskip("azula.sample")
    exact = ExactDenoiser(MIXTURE, process)

    noise = noise_of(20, dtype=torch.float64)
    x = process.prior_std * noise.normal()
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.normal())
    theirs = sample.DDPMSampler(as_azulas(exact), steps=25, silent=True, dtype=torch.float64)(x)
    ours = Ancestral(25, "beta_tilde").sample(exact, noise_of(20, dtype=torch.float64)).x
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
