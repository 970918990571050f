import math

import pytest
import torch
from helpers.laws import (
    GAUSSIAN,
    GENTLE,
    MIXTURE,
    PAPERS,
    Gaussian,
    assert_law,
    assert_mixture,
    assert_moments,
    bias,
    law_of,
    noise_of,
    order,
    weak_error,
    wide,
)

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, SubVP, linear_betas
from lit_diffusion.samplers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Heun,
    Move,
    PredictorCorrector,
    ReverseDiffusion,
    Run,
)
from lit_diffusion.samplers.times import timesteps_to_t_min

WALKERS = {"euler_maruyama": EulerMaruyama, "reverse_diffusion": ReverseDiffusion}
each_walker = pytest.mark.parametrize("walker", WALKERS.values(), ids=WALKERS)
each_paper = pytest.mark.parametrize("process", PAPERS.values(), ids=PAPERS)


def score_of(x, process, t, distribution=MIXTURE):
    alpha, sigma = process.alpha(wide(t)), process.sigma(wide(t))
    return distribution.log_prob_and_score(x, alpha.expand(len(x)), sigma.expand(len(x)))[1]


def one_step(sampler, process, x, move, distribution=MIXTURE):
    noise = noise_of(len(x), 9, x.shape[1:], dtype=x.dtype)
    return sampler.step(Run(ExactDenoiser(distribution, process), noise), x, move)


X, Z = (noise_of(6, seed, dtype=torch.float64).normal() for seed in (0, 9))


# The formulae


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.4, 0.38), (0.01, 0.001)])
def test_euler_maruyama_is_a_step_of_equation_6_of_song_et_al(t, s):
    beta = 0.1 + 19.9 * t
    kept = math.exp(-(0.1 * t + 19.9 * t**2 / 2))
    log_ratio = math.log(5000)
    squares = {
        VE(0.01, 50.0): (0.0, 2 * log_ratio * (0.01 * 5000**t) ** 2),
        VP(): (-beta / 2, beta),
        SubVP(): (-beta / 2, beta * (1 - kept**2)),
    }
    for process, (f, g2) in squares.items():
        drift = f * X - g2 * score_of(X, process, t)
        expected = X - drift * (t - s) + math.sqrt(g2 * (t - s)) * Z
        moved = one_step(EulerMaruyama(), process, X, Move(t, s))
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("i", [2, 5, 10])
def test_reverse_diffusion_is_equation_46_of_song_et_al_where_the_variance_explodes(i):
    process = VE(0.01, 1.0, num_timesteps=10)
    new = (0.01 * 100 ** ((i - 1) / 9)) ** 2 - (0.01 * 100 ** ((i - 2) / 9)) ** 2
    expected = X + new * score_of(X, process, i / 10) + math.sqrt(new) * Z
    moved = one_step(ReverseDiffusion(), process, X, Move(i / 10, (i - 1) / 10))
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("i", [2, 500, 1000])
def test_reverse_diffusion_is_that_of_song_et_al_where_the_variance_is_preserved(i):
    process, beta = Betas(linear_betas()), float(linear_betas()[i - 1])
    score = score_of(X, process, i / 1000)
    expected = (2 - math.sqrt(1 - beta)) * X + beta * score + math.sqrt(beta) * Z
    moved = one_step(ReverseDiffusion(), process, X, Move(i / 1000, (i - 1) / 1000))
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [VE(0.01, 50.0, num_timesteps=100), Betas(linear_betas(100))], ids=["VE", "Betas"])
@pytest.mark.parametrize("predictor", [None, Ancestral(variance="beta_tilde"), Heun()])
def test_the_corrector_is_algorithms_4_and_5_after_the_predictor(process, predictor):
    """Of Song et al., with the norms that are expected at the level."""
    move, r = Move(0.5, 0.49), 0.07
    z = noise_of(6, 9, dtype=torch.float64)
    denoiser = ExactDenoiser(MIXTURE, process)
    x = (ReverseDiffusion() if predictor is None else predictor).step(Run(denoiser, z), X, move)
    kept = 1.0 if isinstance(process, VE) else 1 - float(linear_betas(100)[49])
    for _ in range(2):
        epsilon = 2 * kept * (r * float(process.sigma(wide(0.49)))) ** 2
        x = x + epsilon * score_of(x, process, 0.49) + math.sqrt(2 * epsilon) * z.normal()
    moved = one_step(PredictorCorrector(predictor, snr=r, corrector_steps=2), process, X, move)
    torch.testing.assert_close(moved, x, rtol=1e-9, atol=1e-9)


def test_the_corrector_s_step_is_the_same_for_every_state():
    """Also at the maximum of the density, where the score is 0: x moves by the noise alone."""
    process, distribution = VE(0.01, 50.0), Gaussian(torch.zeros(3), torch.eye(3))
    x = torch.zeros(6, 3, dtype=torch.float64)
    stay = Ancestral()
    stay.step = lambda run, x, move: x
    moved = one_step(PredictorCorrector(stay, snr=0.1), process, x, Move(0.5, 0.4), distribution)
    sigma = 0.01 * 5000**0.4
    torch.testing.assert_close(moved, math.sqrt(2 * 2 * 0.1**2) * sigma * Z, rtol=1e-9, atol=1e-9)


def centred(dimension):
    """N(0, 0.25 I)."""
    return Gaussian(torch.zeros(dimension).double(), 0.25 * torch.eye(dimension).double())


def propagated_variance(process, steps, r, c=0.25):
    """Of a predictor-corrector's samples of N(0, c) by reverse diffusion, without drawing a number."""
    times = torch.tensor(timesteps_to_t_min(process, steps), dtype=torch.float64)
    t, s = times[:-1], times[1:]
    wide_t, wide_s = (process.alpha(u) ** 2 * c + process.sigma(u) ** 2 for u in (t, s))
    scale = process.alpha(t) / process.alpha(s)
    beta = process.sigma(t) ** 2 - scale**2 * process.sigma(s) ** 2
    epsilon = 2 * (scale * r * process.sigma(s)) ** 2
    variance = process.prior_std**2
    for row in torch.stack((2 - scale - beta / wide_t, beta, 1 - epsilon / wide_s, 2 * epsilon), dim=1).tolist():
        variance = row[0] ** 2 * variance + row[1]
        variance = row[2] ** 2 * variance + row[3]
    return variance * float(process.alpha(s[-1]) * c / wide_s[-1]) ** 2


@pytest.mark.parametrize("name", ["VE", "VP", "SubVP"])
def test_the_predictor_corrector_of_the_papers_has_the_variance_of_the_data(name):
    """The corrector's step is constant at a level, so the variance is that of one dimension, however many there are."""
    process = PAPERS[name]
    assert 0.24 < propagated_variance(process, 1000, 0.16) < 0.265
    sampler = PredictorCorrector(ReverseDiffusion(40), snr=0.3)
    expected = propagated_variance(process, 40, 0.3)
    for dimension in (1, 2, 8, 64):
        rows = 6400 // dimension
        x = sampler.sample(ExactDenoiser(centred(dimension), process), noise_of(rows, shape=(dimension,))).x
        assert float(x.double().square().mean()) == pytest.approx(expected, rel=4.5 * math.sqrt(2 / 6400))


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [1, 2, 8])
def test_twenty_thousand_samples_of_the_predictor_corrector_have_the_variance_of_the_data(dimension):
    sampler = PredictorCorrector(ReverseDiffusion(1000), snr=0.16)
    x = sampler.sample(ExactDenoiser(centred(dimension), VP()), noise_of(20_000, shape=(dimension,))).x
    assert 0.24 < float(x.double().square().mean()) < 0.265


def test_at_0_there_is_nothing_to_correct():
    process = VP()
    for predictor in (Ancestral(), DDIM()):
        moved = one_step(PredictorCorrector(predictor), process, X, Move(0.1, 0.0))
        assert torch.equal(moved, one_step(predictor, process, X, Move(0.1, 0.0)))


@each_walker
@each_paper
def test_the_last_noise_is_taken_off_by_tweedies_formula(process, walker):
    denoiser = ExactDenoiser(GAUSSIAN, process)
    noises = [noise_of(20, dtype=torch.float64) for _ in range(2)]
    noisy = walker(25, denoise=False).sample(denoiser, noises[0]).x
    clean = walker(25).sample(denoiser, noises[1]).x
    expected = GAUSSIAN.posterior_mean(process, noisy, process.t_min_sampling)
    torch.testing.assert_close(clean, expected, rtol=1e-9, atol=1e-9)
    assert float((clean - noisy).abs().max()) > 1e-4


@each_walker
def test_the_plan_visits_every_timestep_and_ends_at_the_first(walker):
    moves = walker().plan(Betas(linear_betas(50)))
    assert [(move.t, move.s) for move in moves] == [(i / 50, (i - 1) / 50) for i in range(50, 1, -1)]
    moves = walker(4).plan(VP(t_min_sampling=0.2))
    assert [move.t for move in moves] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert moves[-1].s == pytest.approx(0.2)
    assert len(walker().plan(VP())) == 1000


# Gaussian data and a mixture


@each_walker
@each_paper
def test_many_steps_have_the_law_of_the_data(process, walker):
    assert bias(walker(300), process) < 0.05


@each_walker
@pytest.mark.parametrize("process", GENTLE.values(), ids=GENTLE)
def test_the_law_converges_with_order_1(process, walker):
    errors = (weak_error(walker(steps), process, GAUSSIAN.reversed) for steps in (50, 100))
    assert order(*errors) == pytest.approx(1.0, abs=0.1)


@each_walker
@each_paper
def test_samples_have_the_law_of_their_steps(process, walker):
    assert_law(walker(25), process)


@each_walker
@each_paper
def test_samples_of_a_mixture(process, walker):
    assert_mixture(walker(200), process)


# The corrector

WIDE = Gaussian(torch.linspace(-1.0, 1.0, 128), torch.diag(torch.linspace(0.3, 1.5, 128)))
"""128 axes: the variance averaged over them is precise with few samples."""


def relative_variance(sampler, process, count=64):
    """Of samples about the true mean, averaged over the axes; its standard error is 0.016."""
    x = sampler.sample(ExactDenoiser(WIDE, process), noise_of(count, shape=(128,))).x.double()
    offset = (x.mean(0) - WIDE.m) / (WIDE.C.diagonal() / count).sqrt()
    assert float(offset.abs().max()) < 5
    return float(((x - WIDE.m) ** 2 / WIDE.C.diagonal()).mean())


@each_paper
def test_the_corrector_repairs_a_predictor_that_is_too_coarse(process):
    predictor = Ancestral(25, "beta_tilde")
    assert relative_variance(predictor, process) < 0.8
    corrected = PredictorCorrector(predictor, snr=0.7, corrector_steps=20)
    assert relative_variance(corrected, process) == pytest.approx(1.0, abs=0.07)


@each_paper
def test_a_corrector_does_not_spoil_a_fine_predictor(process):
    sampler = PredictorCorrector(Ancestral(200), snr=0.1)
    assert relative_variance(sampler, process) == pytest.approx(1.0, abs=0.08)


# Annealed Langevin dynamics on a grid of DDPM


def test_annealed_langevin_on_ddpms_levels():
    """S10: a score model of one kind serves the sampler of the other."""
    process = PAPERS["DDPM"]
    first = 1 / 1000
    sampler = AnnealedLangevin(20, eta=0.2 * float(process.sigma(wide(first))) ** 2, num_levels=40, initial="gaussian")
    start = (torch.zeros(3).double(), torch.eye(3).double())
    law = law_of(sampler, process, start)
    goal = GAUSSIAN.marginal(process, first)
    x = sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(1000)).x
    assert_moments(x, *law)
    assert float((law[0] - goal[0]).abs().max()) < 0.04
    assert float((law[1] - goal[1]).norm() / goal[1].norm()) < 0.06


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EulerMaruyama(0), ["steps is 0"]),
        (lambda: ReverseDiffusion(-3), ["steps is -3"]),
        (lambda: PredictorCorrector(snr=0.0), ["snr is 0", "0.16"]),
        (lambda: PredictorCorrector(snr=float("nan")), ["snr is nan"]),
        (lambda: PredictorCorrector(snr=1.0), ["snr is 1", "diverges"]),
        (lambda: EulerMaruyama(large_steps="warn"), ["large_steps is 'warn'", "allow"]),
        (lambda: PredictorCorrector(corrector_steps=0), ["corrector_steps is 0"]),
        (lambda: PredictorCorrector(PredictorCorrector()), ["predictor", "inside it"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
