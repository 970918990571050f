"""EDM's stochastic sampler: the paper's algorithm, its law on Gaussian data, and Heun's method without noise."""

import math

import pytest
import torch
from helpers.laws import GAUSSIAN, MIXTURE, assert_law, bias, law_of, noise_of, order, wide

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, PowerVE, linear_betas
from lit_diffusion.samplers import ChurnedHeun, Heun

EDM = PowerVE()
GENTLE = {"EDM": PowerVE(0.2, 3.0), "VE": PowerVE(0.3, 2.0, 0.5), "VP": VP(1.0, 6.0, t_min_sampling=0.05)}
each_gentle = pytest.mark.parametrize("process", GENTLE.values(), ids=GENTLE)
EVERYWHERE = {"s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


def algorithm_2(denoise, x, levels, s_churn, s_tmin, s_tmax, s_noise, noise):
    """Karras et al. 2022, transcribed; ``levels`` are t_0 .. t_{N-1}, after which t_N is 0."""
    levels = [*levels, 0.0]
    for i in range(len(levels) - 1):
        t, following = levels[i], levels[i + 1]
        gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        raised = t + gamma * t
        x = x + math.sqrt(raised**2 - t**2) * s_noise * noise.normal()
        slope = (x - denoise(x, raised)) / raised
        moved = x + (following - raised) * slope
        if following != 0.0:
            moved = x + (following - raised) * 0.5 * (slope + (moved - denoise(moved, following)) / following)
        x = moved
    return x


@pytest.mark.parametrize(
    ("steps", "s_churn", "s_tmin", "s_tmax", "s_noise"),
    [(17, 40.0, 0.05, 50.0, 1.003), (17, 3.0, 0.01, 1.0, 1.007), (39, 10.0, 0.0, 60.0, 1.0), (17, 0.0, 0.0, 60.0, 1.0)],
)
def test_it_is_algorithm_2(steps, s_churn, s_tmin, s_tmax, s_noise):
    def denoise(x, sigma):
        return MIXTURE.posterior(x, wide(1.0).expand(len(x)), wide(sigma).expand(len(x)))[2]

    sampler = ChurnedHeun(steps, s_churn, s_tmin, s_tmax, s_noise, large_steps="allow")
    start = 80.0 * noise_of(30, dtype=torch.float64).normal()
    ramp = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    levels = (80.0 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
    expected = algorithm_2(
        denoise, start, levels.tolist(), s_churn, s_tmin, s_tmax, s_noise, noise_of(30, 4, dtype=torch.float64)
    )
    found = sampler.sample(ExactDenoiser(MIXTURE, EDM), noise_of(30, 4, dtype=torch.float64), start=start)
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-6)
    assert found.evaluations == 2 * steps + 1
    heun = Heun(steps, denoise=True, spacing="karras:7").sample(ExactDenoiser(MIXTURE, EDM), None, start=start).x
    assert torch.equal(found.x, heun) == (s_churn == 0.0)


@each_gentle
def test_raising_adds_just_the_noise_of_the_process(process):
    """States with the law of t have that of the raised time."""
    sampler = ChurnedHeun(9, s_churn=2.0, **EVERYWHERE)
    t = torch.linspace(process.t_min_sampling, 0.5, 7, dtype=torch.float64)
    raised = sampler.raised(process, t, 9)
    ratio = torch.exp(-0.5 * process.log_snr(raised) + 0.5 * process.log_snr(t))
    torch.testing.assert_close(ratio, torch.full((7,), 1.2, dtype=torch.float64), rtol=1e-9, atol=0)
    step = process.transition(t, raised)
    for row in range(7):
        mean, covariance = GAUSSIAN.marginal(process, float(t[row]))
        goal = GAUSSIAN.marginal(process, float(raised[row]))
        torch.testing.assert_close(step.scale[row] * mean, goal[0])
        torch.testing.assert_close(step.scale[row] ** 2 * covariance + step.beta[row] * torch.eye(3).double(), goal[1])


def exact_law(sampler, process, law):
    """Of the sampler, were each step of Heun's method the solution of the ODE."""
    for move in sampler.plan(process):
        raised = float(sampler.raised(process, wide(move.t), sampler.steps))
        step = process.transition(wide(move.t), wide(raised))
        noise = sampler.s_noise**2 * step.beta * torch.eye(3).double()
        law = GAUSSIAN.flowed(process, (step.scale * law[0], step.scale**2 * law[1] + noise), raised, move.s)
    return law


@each_gentle
def test_its_law_converges_at_order_2(process):
    """From a start that is not the marginal, and with more noise than fits."""
    mean, covariance = GAUSSIAN.marginal(process, 1.0)
    start, errors = (mean + 0.5, 1.3 * covariance), []
    for steps in (100, 200):
        sampler = ChurnedHeun(steps, 1.5, 0.0, math.inf, 1.01, denoise=False, spacing="log_snr")
        found, exact = law_of(sampler, process, start), exact_law(sampler, process, start)
        errors.append(float((found[0] - exact[0]).norm() + (found[1] - exact[1]).norm()))
    assert order(*errors) == pytest.approx(2.0, abs=0.2)


@each_gentle
def test_its_law_is_that_of_the_data_at_order_2(process):
    keys = {**EVERYWHERE, "denoise": False, "spacing": "log_snr"}
    errors = [bias(ChurnedHeun(steps, 1.5, **keys), process) for steps in (100, 200)]
    # At the last steps below the largest time: there nothing is above it, and no noise is added.
    assert order(*errors) == pytest.approx(2.0, abs=0.3)


def test_noise_corrects_a_wrong_start_where_the_ode_keeps_it():
    mean, covariance = GAUSSIAN.marginal(EDM, 1.0)
    start = (mean + 40.0, 2.0 * covariance)
    keys = {"denoise": False, "spacing": "karras:7"}
    kept = bias(Heun(100, **keys), EDM, start)
    corrected = bias(ChurnedHeun(100, 40.0, 0.05, 50.0, 1.0, **keys), EDM, start)
    assert kept > 0.5
    assert corrected < 0.05


@pytest.mark.parametrize("process", [EDM, VP(), Flow(1e-4, 1e-4)], ids=["EDM", "VP", "Flow"])
def test_samples_have_the_law_of_their_steps(process):
    sampler = ChurnedHeun(60, 20.0, s_tmax=3.0)
    if isinstance(process, Flow):  # Where the prior is the law of pure noise: the data's own law is found.
        x = sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(4000)).x.double()
        assert float((x.mean(0) - GAUSSIAN.m).norm()) < 0.1
        assert float((torch.cov(x.T) - GAUSSIAN.C).norm()) < 0.1
        return
    assert_law(sampler, process, 4000)


def test_noise_is_added_between_s_tmin_and_s_tmax_and_never_above_the_largest_level():
    sampler = ChurnedHeun(4, s_churn=1.0, s_tmin=0.5, s_tmax=10.0)
    sigma = wide(0.1, 0.49, 0.51, 9.9, 10.1, 79.0)
    raised = EDM.sigma(sampler.raised(EDM, sigma / 80.0, 4))
    assert raised.tolist() == pytest.approx([0.1, 0.49, 0.51 * 1.2, 9.9 * 1.2, 10.1, 79.0], rel=1e-12)
    wild = ChurnedHeun(4, s_churn=100.0, **EVERYWHERE)
    assert EDM.sigma(wild.raised(EDM, wide(1.0, 0.9, 0.1), 4)).tolist() == pytest.approx([80, 80, 8 * math.sqrt(2)])
    for process in (VP(), Flow(), Betas(linear_betas())):
        assert float(wild.raised(process, wide(1.0), 4)) == 1.0


def test_steps_are_measured_from_the_raised_times():
    """From the paper's 18 levels they are short enough, and from those raised by 41 % they are not."""
    denoiser = ExactDenoiser(GAUSSIAN, EDM)
    ChurnedHeun().check(denoiser)
    Heun(17, spacing="karras:7").check(denoiser)
    with pytest.raises(UserError, match=r"ChurnedHeun in 17 steps .* set steps to 23, or"):
        ChurnedHeun(17).check(denoiser)
    ChurnedHeun(23).check(denoiser)
    ChurnedHeun(17, large_steps="allow").check(denoiser)


def test_a_network_that_knows_its_levels_alone_is_refused():
    denoiser = ExactDenoiser(GAUSSIAN, VE(0.3, 3.0, num_timesteps=40))
    ChurnedHeun(8, large_steps="allow").check(denoiser)
    denoiser.on_grid_only = True
    with pytest.raises(UserError, match="adding noise on the way evaluates the network between its 40 timesteps"):
        ChurnedHeun(8, large_steps="allow").check(denoiser)
    ChurnedHeun(8, 0.0, large_steps="allow").check(denoiser)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"s_churn": -1.0}, ["s_churn is -1", "0 adds no noise"]),
        ({"s_churn": math.inf}, ["s_churn is inf"]),
        ({"s_tmin": 2.0, "s_tmax": 1.0}, ["s_tmin 2 and s_tmax 1"]),
        ({"s_tmin": -1.0}, ["s_tmin -1"]),
        ({"s_noise": -0.1}, ["s_noise is -0.1"]),
        ({"steps": 0}, ["steps is 0"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(keys, words):
    with pytest.raises(UserError) as caught:
        ChurnedHeun(**keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
