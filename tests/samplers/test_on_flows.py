"""Every sampler on the straight line from data to noise, where nothing of the data is left at t = 1."""

import pytest
import torch
from helpers.laws import GAUSSIAN, law_of, noise_of
from helpers.solvers import law_of_run

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Flow
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    SAMPLERS,
    Ancestral,
    AnnealedLangevin,
    ChurnedHeun,
    DPMSolver1,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    SDEDPMSolverPP2M,
    UniPC,
)
from lit_diffusion.samplers.times import timesteps_to_t_min

KEYS = {"large_steps": "allow", "spacing": "log_snr"}
LINEAR = {
    "ancestral": (Ancestral(400, "beta_tilde"), 0.05),
    "churned_heun": (ChurnedHeun(60, 10.0, s_noise=1.0), 0.05),
    "ddim": (DDIM(100), 0.05),
    "ddim, log_snr": (DDIM(300, spacing="log_snr"), 0.05),
    "dpm_solver_1": (DPMSolver1(300), 0.05),
    "dpm_solver_2": (DPMSolver2(60), 0.02),
    "dpm_solver_3": (DPMSolver3(20), 0.01),
    "dpmpp_2s": (DPMSolverPP2S(60), 0.02),
    "euler": (Euler(100), 0.05),
    "heun": (Heun(30), 0.01),
    "heun, karras": (Heun(30, spacing="karras"), 0.02),
    "euler_maruyama": (EulerMaruyama(400, **KEYS), 0.1),
    "reverse_diffusion": (ReverseDiffusion(400, **KEYS), 0.15),
    "predictor_corrector": (PredictorCorrector(Ancestral(200, "beta_tilde"), snr=0.05), 0.15),
}
MULTISTEP = {
    "deis": (DEIS(40, spacing="karras:7"), 0.02),
    "dpmpp_2m": (DPMSolverPP2M(40), 0.03),
    "dpmpp_3m": (DPMSolverPP3M(40), 0.02),
    "dpmpp_sde_2m": (SDEDPMSolverPP2M(60), 0.05),
    "ipndm": (IPNDM(60), 0.03),
    "unipc": (UniPC(40), 0.02),
}
PROCESSES = {"to pure noise": Flow(1e-4, 1e-4), "not quite": Flow(1e-4, 1e-4, t_max=0.9)}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def test_every_sampler_is_among_them():
    of_theirs = {type(sampler) for sampler, _ in (*LINEAR.values(), *MULTISTEP.values())}
    assert of_theirs | {ProbabilityFlow, Langevin, AnnealedLangevin} == set(SAMPLERS.values())


@each_process
@pytest.mark.parametrize("name", LINEAR)
def test_the_law_of_gaussian_data_is_found_from_the_end_of_time(process, name):
    sampler, most = LINEAR[name]
    if "corrector" in name:  # It asks for noise twice a step.
        x = sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(3000), start=start_of(process, 3000)).x.double()
        mean, covariance = x.mean(0), torch.cov(x.T)
    else:
        mean, covariance = law_of(sampler, process, GAUSSIAN.marginal(process, process.t_max))
    goal = GAUSSIAN.marginal(process, sampler.plan(process)[-1].s)
    assert float((mean - goal[0]).norm() / goal[0].norm()) < most
    assert float((covariance - goal[1]).norm() / goal[1].norm()) < most


@each_process
@pytest.mark.parametrize("name", MULTISTEP)
def test_a_run_with_a_history_finds_the_law_of_gaussian_data(process, name):
    sampler, most = MULTISTEP[name]
    mean, covariance = law_of_run(sampler, process, GAUSSIAN.marginal(process, process.t_max))
    goal = GAUSSIAN.marginal(process, sampler.plan(process)[-1].s)
    assert float((mean - goal[0]).norm() / goal[0].norm()) < most
    assert float((covariance - goal[1]).norm() / goal[1].norm()) < most


def start_of(process, count):
    mean, covariance = GAUSSIAN.marginal(process, process.t_max)
    z = noise_of(count, seed=9, dtype=torch.float64).normal()
    return (mean + z @ torch.linalg.cholesky(covariance).T).float()


@each_process
def test_the_adaptive_solver_integrates_from_the_end_of_time(process):
    x = start_of(process, 30).double()
    made = ProbabilityFlow(1e-7, 1e-7).sample(ExactDenoiser(GAUSSIAN, process), None, start=x)
    exact = GAUSSIAN.flow(process, x, process.t_max, process.t_min_sampling)
    assert float((made.x - exact).abs().max()) < 1e-4
    assert made.evaluations < 500


@each_process
def test_langevin_dynamics_are_finite_from_the_end_of_time(process):
    for sampler in (
        AnnealedLangevin(5, eta=1e-9, denoise=True, num_levels=8, initial="gaussian"),
        Langevin(5, eta=1e-9),
    ):
        assert bool(sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(4)).x.isfinite().all())


def test_the_code_of_an_image_is_found_at_pure_noise():
    process = PROCESSES["to pure noise"]
    denoiser, x = ExactDenoiser(GAUSSIAN, process), start_of(process, 20)
    sampler = DDIM(200)
    code = sampler.encode(denoiser, sampler.sample(denoiser, noise_of(20), start=x).x)
    assert float((code.x - x).abs().max()) < 0.2


def test_samples_start_at_the_end_of_time():
    process = PROCESSES["not quite"]
    assert {sampler.plan(process)[0].t for sampler, _ in LINEAR.values()} == {0.9}
    assert torch.equal(DDIM().start(process, noise_of(5)), 0.9 * noise_of(5).normal())


def test_times_in_the_log_snr_begin_near_the_end():
    times = timesteps_to_t_min(Flow(), 5, "log_snr")
    assert times[:2] == pytest.approx([1.0, 0.999])
    assert len(times) == 6
    assert times[-1] == pytest.approx(1e-5)
    assert timesteps_to_t_min(Flow(), 1, "karras") == [1.0, 1e-5]


def test_steps_of_the_sde_that_are_too_long_are_refused_and_those_of_the_ode_are_not():
    denoiser = ExactDenoiser(GAUSSIAN, Flow())
    Euler(2).check(denoiser)
    Heun(1).check(denoiser)
    with pytest.raises(UserError, match=r"EulerMaruyama in 20 steps.*g\^2 dt"):
        EulerMaruyama(20, spacing="log_snr").check(denoiser)
    EulerMaruyama(100, spacing="log_snr").check(denoiser)
