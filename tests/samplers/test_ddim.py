import itertools
import math

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
    assert_moments,
    bias,
    noise_of,
    on_their_table,
    order,
    weak_error,
    wide,
)

from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, cosine_betas, linear_betas
from lit_diffusion.samplers import DDIM, Ancestral, Move, Run

each_paper = pytest.mark.parametrize("process", PAPERS.values(), ids=PAPERS)
each_gentle = pytest.mark.parametrize("process", GENTLE.values(), ids=GENTLE)


# The formulae


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("i", "j"), [(1000, 999), (1000, 500), (2, 1), (10, 0)])
def test_a_step_is_equation_12_of_song_meng_and_ermon(eta, i, j):
    """Their alpha is the product of 1 - beta."""
    betas = linear_betas().tolist()
    at_i, at_j = (math.prod(1 - beta for beta in betas[:n]) for n in (i, j))
    process = Betas(linear_betas())
    x = noise_of(6, dtype=torch.float64).normal()
    z = noise_of(6, 9, dtype=torch.float64).normal()
    sampler, noise = DDIM(eta=eta), noise_of(6, 9, dtype=torch.float64)
    moved = sampler.step(Run(ExactDenoiser(MIXTURE, process), noise), x, Move(i / 1000, j / 1000))
    alpha, sigma = wide(at_i).sqrt().expand(6), wide(1 - at_i).sqrt().expand(6)
    eps = -math.sqrt(1 - at_i) * MIXTURE.log_prob_and_score(x, alpha, sigma)[1]
    deviation = eta * math.sqrt((1 - at_j) / (1 - at_i)) * math.sqrt(1 - at_i / at_j)
    x0 = (x - math.sqrt(1 - at_i) * eps) / math.sqrt(at_i)
    expected = math.sqrt(at_j) * x0 + math.sqrt(1 - at_j - deviation**2) * eps + deviation * z
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("process", "steps"),
    [
        (Betas(linear_betas(50)), None),
        (VE(0.01, 1.0, num_timesteps=10), None),
        *((process, 7) for process in PAPERS.values()),
    ],
    ids=["Betas", "NCSN", *PAPERS],
)
def test_with_eta_1_it_is_ancestral_sampling_with_the_posteriors_variance(process, steps):
    denoiser = ExactDenoiser(MIXTURE, process)
    ddim = DDIM(steps, eta=1.0).sample(denoiser, noise_of(5, dtype=torch.float64)).x
    ancestral = Ancestral(steps, "beta_tilde").sample(denoiser, noise_of(5, dtype=torch.float64)).x
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


def test_with_eta_1_it_is_the_posterior_of_the_clipped_prediction():
    """The noise is that of the clipped x0 too; with the prediction's own they are 0.15 apart."""
    denoiser = ExactDenoiser(MIXTURE, Betas(cosine_betas(50)))
    ddim = DDIM(eta=1.0, clip_x0=(-0.5, 0.5)).sample(denoiser, noise_of(50, dtype=torch.float64)).x
    ancestral = Ancestral(variance="beta_tilde", clip_x0=(-0.5, 0.5))
    expected = ancestral.sample(denoiser, noise_of(50, dtype=torch.float64)).x
    torch.testing.assert_close(ddim, expected, rtol=1e-9, atol=1e-9)
    assert float(expected.max()) == 0.5  # It is clipped.


def test_with_eta_0_all_noise_is_in_the_start():
    denoiser = ExactDenoiser(MIXTURE, VP())
    x = DDIM(5).sample(denoiser, noise_of(4)).x
    assert torch.equal(DDIM(5).sample(denoiser, None, start=noise_of(4).normal()).x, x)


def test_the_clipped_prediction_stays_in_its_range():
    denoiser, x = ExactDenoiser(MIXTURE, VP()), 3.0 * noise_of(50).normal()
    last = DDIM(clip_x0=(-0.2, 0.3)).step(Run(denoiser, noise_of(50)), x, Move(0.3, 0.0))
    assert (float(last.min()), float(last.max())) == (pytest.approx(-0.2), pytest.approx(0.3))


# Gaussian data and a mixture


@each_paper
def test_many_steps_have_the_law_of_the_data(process):
    assert bias(DDIM(300), process) < 0.03
    assert bias(DDIM(300, eta=1.0), process) < 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
@each_gentle
def test_the_law_converges_with_order_1(process, eta):
    exact = GAUSSIAN.flowed if eta == 0.0 else GAUSSIAN.reversed
    errors = (weak_error(DDIM(steps, eta, "quadratic"), process, exact) for steps in (50, 100))
    assert order(*errors) == pytest.approx(1.0, abs=0.1)


@each_gentle
def test_each_point_converges_to_the_flows_with_order_1(process):
    x = process.prior_std * noise_of(50, dtype=torch.float64).normal()
    errors = []
    for steps in (50, 100):
        sampler = DDIM(steps, spacing="quadratic")
        last = sampler.plan(process)[-1].t
        expected = GAUSSIAN.posterior_mean(process, GAUSSIAN.flow(process, x, 1.0, last), last)
        moved = sampler.sample(ExactDenoiser(GAUSSIAN, process), None, start=x).x
        errors.append(float((moved - expected).norm(dim=1).mean()))
    assert order(*errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@each_paper
def test_samples_have_the_law_of_their_steps(process, eta):
    assert_law(DDIM(12, eta), process)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@each_paper
def test_samples_of_a_mixture(process, eta):
    assert_mixture(DDIM(200, eta), process)


# Encoding


def test_encoding_follows_the_same_equation_backwards():
    """From the image, scaled and with its predicted noise at the smallest level, each step predicts where it is."""
    process, x0 = Betas(linear_betas()), noise_of(6, dtype=torch.float64).normal()

    def predicted_noise(x, t):
        alpha, sigma = process.alpha(wide(t)), process.sigma(wide(t))
        return -sigma * MIXTURE.log_prob_and_score(x, alpha.expand(6), sigma.expand(6))[1]

    levels = [process.coefficients(wide(t)) for t in (0.5, 1.0)]
    x = levels[0].alpha * x0 + levels[0].sigma * predicted_noise(levels[0].alpha * x0, 0.5)
    eps = predicted_noise(x, 0.5)
    expected = levels[1].alpha * (x - levels[0].sigma * eps) / levels[0].alpha + levels[1].sigma * eps
    torch.testing.assert_close(DDIM(2).encode(ExactDenoiser(MIXTURE, process), x0).x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [VE(1e-4, 2.0), *list(GENTLE.values())[1:]], ids=GENTLE)
def test_the_way_back_ends_nearer_to_where_it_began_the_more_steps_there_are(process):
    x0 = MIXTURE.sample(noise_of(50, dtype=torch.float64).normal(), noise_of(50, 4).uniform(()))
    denoiser, errors = ExactDenoiser(MIXTURE, process), []
    for steps in (50, 100):
        sampler = DDIM(steps, spacing="quadratic")
        code = sampler.encode(denoiser, x0).x
        errors.append(float((sampler.sample(denoiser, None, start=code).x - x0).norm(dim=1).mean()))
    assert order(*errors) == pytest.approx(1.0, abs=0.15)
    assert errors[-1] < 0.1


def test_a_clipped_trajectory_has_a_way_back_too():
    """It is the ODE of the clipped prediction, in both directions."""
    process, clip = VP(1.0, 6.0, t_min_sampling=1e-4), (-0.8, 0.8)
    x0 = MIXTURE.sample(noise_of(50, dtype=torch.float64).normal(), noise_of(50, 4).uniform(())).clamp(*clip)
    denoiser, errors = ExactDenoiser(MIXTURE, process), []
    for steps in (50, 100):
        sampler = DDIM(steps, spacing="quadratic", clip_x0=clip)
        back = sampler.sample(denoiser, None, start=sampler.encode(denoiser, x0).x).x
        errors.append(float((back - x0).norm(dim=1).mean()))
        assert float(back.abs().max()) <= 0.8
    assert order(*errors) == pytest.approx(1.0, abs=0.15)
    assert errors[-1] < 0.04


@each_paper
def test_the_code_is_the_flows(process):
    x0 = GAUSSIAN.sample(noise_of(20, dtype=torch.float64).normal(), noise_of(20).uniform(()))
    sampler, seen = DDIM(250), []
    made = sampler.encode(ExactDenoiser(GAUSSIAN, process), x0, on_step=seen.append)
    code = made.x
    expected = GAUSSIAN.flow(process, x0, 0.0, 1.0)
    assert float((code - expected).norm() / expected.norm()) < 0.02
    assert made.evaluations == 250
    assert [progress.step for progress in seen] == list(range(1, 251))
    assert seen[-1].t == 1.0
    assert torch.equal(seen[-1].x, code)


@each_paper
def test_the_codes_of_gaussian_data_are_the_priors_noise(process):
    process = VE(0.01, 500.0) if isinstance(process, VE) else process
    x0 = GAUSSIAN.sample(noise_of(5000, dtype=torch.float64).normal(), noise_of(5000).uniform(()))
    code = DDIM(200).encode(ExactDenoiser(GAUSSIAN, process), x0).x / process.prior_std
    assert_moments(code, torch.zeros(3), torch.eye(3))


def test_encoding_is_deterministic():
    with pytest.raises(UserError, match=r"set eta to 0 \(it is 0\.3\)"):
        DDIM(eta=0.3).encode(ExactDenoiser(MIXTURE, VP()), torch.zeros(2, 3))


# Other implementations


WALKS = itertools.product([(100, 100), (1000, 50), (1000, 8)], [0.0, 1.0], [None, (-1.0, 1.0)])


@pytest.mark.parametrize(("walk", "eta", "clip"), [*WALKS, ((1000, 1000), 1.0, None)])
def test_diffusers_agrees(walk, eta, clip):
    levels, steps = walk
    module = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = module.DDIMScheduler(
        levels, 1e-4, 0.02, clip_sample=clip is not None, timestep_spacing="trailing", set_alpha_to_one=True
    )
    process, network = on_their_table(scheduler), Network()
    scheduler.set_timesteps(steps)
    ours, states = DDIM(steps, eta, clip_x0=clip), []
    denoiser, noise = NetworkDenoiser(network, process, "eps", "index"), noise_of(3, 0, (1, 4, 4), dtype=torch.float64)
    ours.sample(denoiser, noise, on_step=lambda progress: states.append(progress.x))
    noise = noise_of(3, 0, (1, 4, 4), dtype=torch.float64)
    x = noise.normal()
    assert [round(move.t * levels) - 1 for move in ours.plan(process)] == scheduler.timesteps.tolist()
    with torch.no_grad():
        for t, state in zip(scheduler.timesteps, states, strict=True):
            raw = network(x, t.expand(3))
            x = scheduler.step(raw, t, x, eta, use_clipped_model_output=True, variance_noise=noise.normal()).prev_sample
            assert float((state - x).norm() / x.norm()) < 1e-9


@pytest.mark.parametrize("name", ["EulerSampler", "DDIMSampler"])
@each_paper
def test_azula_agrees(process, name):
    """Its Euler method is in sigma / alpha."""
    sample = pytest.importorskip("azula.sample")
    exact = ExactDenoiser(MIXTURE, process)

    x = process.prior_std * noise_of(20, dtype=torch.float64).normal()
    theirs = getattr(sample, name)(as_azulas(exact), steps=25, silent=True, dtype=torch.float64)(x)
    torch.testing.assert_close(DDIM(25).sample(exact, None, start=x).x, theirs, rtol=1e-9, atol=1e-9)
