"""A sampler on a process of its own: what a network says of one process is what it says of every other."""

import json
import math

import pytest
import torch
from helpers.laws import MIXTURE, as_azulas, noise_of, wide
from helpers.tiny import digits_data, fit, score_sde

from lit_diffusion.commands.options import choose_sampler
from lit_diffusion.denoisers import OtherProcess
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, PowerVE, cosine_betas, linear_betas
from lit_diffusion.samplers import DDIM, Ancestral, Euler, Heun, OnProcess, PredictorCorrector, ProbabilityFlow, Run
from lit_diffusion.samplers.base import Move, describe, described

TRAINED = {"VP": VP(), "VE": VE(0.001, 100.0, t_min_sampling=1e-3), "Flow": Flow(), "cosine": Betas(cosine_betas())}
each_trained = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
EDM = PowerVE(0.02, 20.0)


@each_trained
@pytest.mark.parametrize("other", [EDM, VP(0.1, 12.0), Flow(t_max=0.95)], ids=["EDM", "VP", "Flow"])
def test_a_denoiser_on_another_process_is_the_one_of_that_process(trained, other):
    t = torch.linspace(0.1, other.t_max, 12, dtype=torch.float64)
    x_t = noise_of(12, dtype=torch.float64).normal() * other.sigma(t)[:, None]
    found, truth = OtherProcess(ExactDenoiser(MIXTURE, trained), other)(x_t, t), ExactDenoiser(MIXTURE, other)(x_t, t)
    for view in ("x0", "eps", "score", "velocity"):
        torch.testing.assert_close(getattr(found, view), getattr(truth, view), rtol=1e-7, atol=1e-8)
    assert found.energy is not None
    assert found.x_t is x_t


def test_it_is_read_also_where_nothing_of_the_data_is_left():
    x_t, t = noise_of(2, dtype=torch.float64).normal(), wide(1.0, 1.0)
    found = OtherProcess(ExactDenoiser(MIXTURE, Flow(1e-4, 1e-4)), Flow())(x_t, t)
    torch.testing.assert_close(found.x0, MIXTURE.mean().expand(2, 3))
    assert bool(found.velocity.isfinite().all())


@each_trained
@pytest.mark.parametrize(
    "sampler",
    [Heun(17, denoise=True, spacing="karras:7"), DDIM(9), Ancestral(9), PredictorCorrector(DDIM(9)), ProbabilityFlow()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_its_samples_are_those_of_its_process(trained, sampler):
    """Whatever process the network was trained on; predictors, correctors and adaptive steps included."""
    seen = []
    found = OnProcess(sampler, EDM).sample(ExactDenoiser(MIXTURE, trained), noise_of(6), None, seen.append)
    expected = sampler.sample(ExactDenoiser(MIXTURE, EDM), noise_of(6))
    torch.testing.assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert found.evaluations == expected.evaluations or sampler.adaptive
    assert len(seen) == len(sampler.plan(EDM)) or sampler.adaptive
    assert OnProcess(sampler, EDM).length(trained) == sampler.length(EDM)


def test_heun_in_the_noise_level_is_azulas():
    """Their Heun steps are of sigma / alpha, whatever the schedule."""
    sample = pytest.importorskip("azula.sample")
    process, times = VP(), wide(1.0, 0.83, 0.6, 0.42, 0.2, 0.05)
    denoiser, x = ExactDenoiser(MIXTURE, process), noise_of(9, dtype=torch.float64).normal()
    theirs, sigmas = sample.HeunSampler(as_azulas(denoiser), steps=5), torch.exp(-0.5 * process.log_snr(times))
    other = PowerVE(float(sigmas[-1]), float(sigmas[0]))
    sampler, run = OnProcess(Heun(), other), Run(denoiser, None)
    sampler.begin(run)
    x_other = x / process.alpha(times[:1])
    for (t, s), (sigma_t, sigma_s) in zip(times.unfold(0, 2, 1), sigmas.unfold(0, 2, 1), strict=True):
        x = theirs.step(x, t, s)
        x_other = sampler.step(run, x_other, Move(float(sigma_t / sigmas[0]), float(sigma_s / sigmas[0])))
        torch.testing.assert_close(process.alpha(s[None]) * x_other, x, rtol=1e-5, atol=1e-5)


def test_by_default_it_is_edms_sampler():
    sampler = OnProcess()
    assert describe(sampler, ExactDenoiser(MIXTURE, VP())) == (
        "OnProcess(sampler=Heun(steps=17, denoise=True, clip_x0=data, large_steps=refuse, spacing=karras:7), "
        "process=PowerVE(sigma_min=0.002, sigma_max=80.0, power=1.0))"
    )
    sampler.check(ExactDenoiser(MIXTURE, VP()))
    assert sampler.sample(ExactDenoiser(MIXTURE, VP()), noise_of(2)).evaluations == 35


def test_it_is_configured_by_its_class_and_keeps_what_is_not_given():
    path = "lit_diffusion.samplers.OnProcess"
    process = {"class_path": "lit_diffusion.processes.PowerVE", "init_args": {"sigma_min": 0.1, "power": 0.5}}
    keys = {"sampler": "euler", "sampler.steps": "9", "process": json.dumps(process)}
    made = choose_sampler(DDIM(), path, keys)
    assert isinstance(made, OnProcess)
    assert (type(made.sampler), made.sampler.steps) == (Euler, 9)
    assert (made.process.sigma_min, made.process.sigma_max, made.process.power) == (0.1, 80.0, 0.5)
    again = choose_sampler(made, None, {"sampler.steps": "7"})
    assert (again.sampler.steps, again.process.power) == (7, 0.5)
    assert described(again)["init_args"]["process"]["init_args"] == {"sigma_min": 0.1, "sigma_max": 80.0, "power": 0.5}


def test_a_trained_network_is_sampled_so(tmp_path):
    method = score_sde(VP(), c_noise="time_999")
    fit(method, digits_data(value_range=(-1.0, 1.0)), tmp_path, 32)
    made = method.generate(torch.arange(3), 0, sampler=OnProcess())
    assert made.x.shape == (3, 1, 8, 8)
    assert bool(made.x.isfinite().all())
    whole = method.generate(torch.arange(6), 0, sampler=OnProcess()).x
    torch.testing.assert_close(whole[:3], made.x, rtol=1e-3, atol=1e-3)


def test_levels_that_the_network_does_not_know_are_refused():
    linear = ExactDenoiser(MIXTURE, Betas(linear_betas()))
    with pytest.raises(UserError, match=r"noise level 0\.002 is outside this process, whose .* run from 0\.01"):
        OnProcess().check(linear)
    with pytest.raises(UserError, match=r"noise level 200 is outside"):
        OnProcess(process=PowerVE(0.02, 200.0)).check(linear)
    OnProcess(process=PowerVE(0.02, 80.0)).check(linear)
    OnProcess(DDIM(), PowerVE(0.02, 80.0)).check(linear)  # Whose last time is 0.
    linear.on_grid_only = True
    with pytest.raises(UserError, match="a sampler on a process of its own evaluates the network between"):
        OnProcess(process=PowerVE(0.02, 80.0)).check(linear)
    with pytest.raises(UserError, match="this model has one noise level"):
        OnProcess().check(ExactDenoiser(MIXTURE, VE(1.0, 1.0, num_timesteps=1)))


def test_steps_that_are_too_long_on_its_process_are_refused():
    with pytest.raises(UserError, match="Heun in 4 steps"):
        OnProcess(Heun(4)).check(ExactDenoiser(MIXTURE, VP()))


def test_a_process_on_a_grid_is_refused():
    for process in (VE(0.01, 5.0, num_timesteps=10), Betas(linear_betas())):
        with pytest.raises(
            UserError, match=r"continuous time, and this one has \d+ timesteps: set its num_timesteps null"
        ):
            OnProcess(process=process)
    assert math.isfinite(OnProcess(process=VE(0.01, 5.0)).process.log_slope)
