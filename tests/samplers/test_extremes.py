"""No sampler amplifies the errors of a network without bound: it is bounded, or refused before any work."""

import math

import pytest
import torch
import yaml
from helpers.laws import Gaussian, noise_of, wide
from helpers.tiny import CONFIG

from lit_diffusion.__main__ import dispatch
from lit_diffusion.callbacks import Likelihood
from lit_diffusion.denoisers import C_NOISE, Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.likelihood import flow_log_prob
from lit_diffusion.processes import VE, VP, Betas, PowerVE, SubVP, cosine_betas, expand_like, linear_betas
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    Ancestral,
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

PROCESSES = {
    "VE": VE(0.01, 50.0),
    "VE, huge": VE(0.01, 1e4),
    "VE, narrow": VE(0.001, 0.5),
    "EDM": PowerVE(),
    "VP": VP(),
    "VP, fast": VP(0.1, 40.0),
    "sub-VP": SubVP(),
    "linear": Betas(linear_betas()),
    "cosine": Betas(cosine_betas()),
    "cosine, two levels": Betas(cosine_betas(2)),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)

EXPLICIT = {
    "euler": Euler,
    "heun": Heun,
    "churned_heun": lambda steps: ChurnedHeun(steps, 40.0, 0.0, math.inf, spacing="karras:3"),
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
}
SAMPLERS = {
    **EXPLICIT,
    "ancestral": lambda steps: Ancestral(steps, clip_x0=(-1.0, 1.0)),
    "ddim": lambda steps: DDIM(steps, clip_x0=(-1.0, 1.0)),
    "dpm_solver_1": lambda steps: DPMSolver1(steps, clip_x0=(-1.0, 1.0)),
    "dpm_solver_2": lambda steps: DPMSolver2(steps, clip_x0=(-1.0, 1.0)),
    "dpm_solver_3": lambda steps: DPMSolver3(steps, clip_x0=(-1.0, 1.0)),
    "deis": lambda steps: DEIS(steps, clip_x0=(-1.0, 1.0)),
    "ipndm": lambda steps: IPNDM(steps, clip_x0=(-1.0, 1.0)),
    "dpmpp_2m": lambda steps: DPMSolverPP2M(steps, clip_x0=(-1.0, 1.0)),
    "dpmpp_2s": lambda steps: DPMSolverPP2S(steps, clip_x0=(-1.0, 1.0)),
    "dpmpp_3m": lambda steps: DPMSolverPP3M(steps, clip_x0=(-1.0, 1.0)),
    "dpmpp_sde_2m": lambda steps: SDEDPMSolverPP2M(steps, clip_x0=(-1.0, 1.0)),
    "unipc, noise": lambda steps: UniPC(steps, integrand="noise", clip_x0=(-1.0, 1.0)),
    "unipc": lambda steps: UniPC(steps, clip_x0=(-1.0, 1.0)),
    "predictor_corrector": lambda steps: PredictorCorrector(ReverseDiffusion(steps), snr=0.3),
}

GAUSSIAN = Gaussian(torch.zeros(4).double(), torch.diag(wide(0.25, 0.25, 0.0, 0.0)))
"""Flat along two of its axes, as images are along most of theirs."""


class Imperfect(ExactDenoiser):
    """The exact noise, and an error of a tenth of its size that depends on the state, at the scale of the level."""

    calls = 0

    def forward(self, x_t, t, cond=None, began=None):
        self.calls += 1
        exact = super().forward(x_t, t, cond)
        scale = (1.0 + exact.coefficients.sigma**2).rsqrt()
        error = 0.1 * torch.sin(7 * expand_like(scale, x_t) * x_t)
        return Prediction.from_eps(x_t, exact.coefficients, exact.eps + error)


@each_process
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_stay_near_the_data_or_the_sampler_is_refused_before_any_work(process, name):
    for steps in (1, 4, 20):
        if process.num_timesteps is not None and steps > process.num_timesteps - 1:
            break
        denoiser, sampler, refused = Imperfect(GAUSSIAN, process), SAMPLERS[name](steps), False
        try:
            sampler.check(denoiser)
        except UserError:
            refused = True
        if refused:
            assert name in EXPLICIT or name in ("predictor_corrector", "dpm_solver_2", "dpm_solver_3", "unipc, noise")
            assert denoiser.calls == 0
        else:
            assert float(sampler.sample(denoiser, noise_of(50, shape=(4,))).x.abs().max()) < 8.0


@pytest.mark.parametrize(
    ("make", "name", "enough", "few"),
    [
        (DPMSolver2, "VP", 3, 1),
        (DPMSolver3, "EDM", 3, 1),
        (lambda steps, **keys: UniPC(steps, integrand="noise", **keys), "VE", 18, 4),
    ],
)
def test_solvers_of_the_noise_say_how_many_steps_would_do(make, name, enough, few):
    denoiser = Imperfect(GAUSSIAN, PROCESSES[name])
    with pytest.raises(
        UserError, match=rf"of the noise in {few} steps? on .*set steps to {enough}, or choose dpmpp_2m"
    ) as got:
        make(few).sample(denoiser, noise_of(2, shape=(4,)))
    assert "\n" not in str(got.value)
    assert denoiser.calls == 0
    make(enough).check(denoiser)
    with pytest.raises(UserError, match=r"large_steps: allow"):
        make(enough - 1).check(denoiser)
    far = make(few, clip_x0=(-1.0, 1.0), large_steps="allow").sample(denoiser, noise_of(50, shape=(4,)))
    assert float(far.x.abs().max()) > 8.0
    with pytest.raises(UserError, match="list times that lie closer"):
        make(None, spacing=[1.0, 0.9, PROCESSES[name].t_min_sampling]).check(denoiser)


@each_process
def test_the_adaptive_solver_stays_near_the_data(process):
    x = ProbabilityFlow(1e-2, 1e-2).sample(Imperfect(GAUSSIAN, process), noise_of(20, shape=(4,))).x
    assert float(x.abs().max()) < 8.0


@pytest.mark.parametrize(("process", "sampler"), [("cosine", Euler), ("VE, huge", EulerMaruyama), ("VE", Heun)])
def test_what_is_refused_would_be_far_away(process, sampler):
    """The worst that each would do: the key lets it."""
    steps = {"cosine": 1, "VE, huge": 4, "VE": 2}[process]
    denoiser = Imperfect(GAUSSIAN, PROCESSES[process])
    with pytest.raises(UserError, match="large_steps: allow"):
        sampler(steps).check(denoiser)
    x = sampler(steps, large_steps="allow").sample(denoiser, noise_of(50, shape=(4,))).x
    assert float(x.abs().max()) > 100.0


@pytest.mark.parametrize(
    ("process", "sampler", "words"),
    [
        ("cosine", Euler(), ["Euler in 999 steps", "up to 6.91, at t = 1,", "no number of steps"]),
        ("cosine", EulerMaruyama(50), ["EulerMaruyama in 50 steps", "up to 138", "no number of steps"]),
        ("VP", Heun(10), ["Heun in 10 steps", "up to 2, at t = 1,", "set steps to 20,"]),
        ("VP, fast", Euler(1), ["Euler in 1 step on", "up to 40,", "set steps to 40,"]),
        ("sub-VP", EulerMaruyama(10), ["up to 2,", "set steps to 20,"]),
        ("linear", Heun(20), ["up to 1.01", "set steps to 21,"]),
        ("VE", EulerMaruyama(10), ["up to 1.7", "set steps to 18,"]),
        ("VE, narrow", Euler(4), ["up to 1.55", "set steps to 7,"]),
        ("VE", ReverseDiffusion(2), ["noise", "up to 417", "set steps to 11,"]),
        ("VE", PredictorCorrector(ReverseDiffusion(2)), ["ReverseDiffusion in 2 steps"]),
        ("VP", PredictorCorrector(EulerMaruyama(10)), ["EulerMaruyama in 10 steps"]),
    ],
)
def test_steps_that_are_too_large_are_refused_in_one_line(process, sampler, words):
    denoiser = Imperfect(GAUSSIAN, PROCESSES[process])
    with pytest.raises(UserError) as caught:
        sampler.sample(denoiser, noise_of(2, shape=(4,)))
    assert denoiser.calls == 0
    assert "\n" not in str(caught.value)
    for word in (*words, "ddim, ancestral or ode", "large_steps: allow"):
        assert word in str(caught.value)
    predictor = getattr(sampler, "predictor", sampler)
    for steps in [int(word[13:-1]) for word in words if word.startswith("set steps to")]:
        type(predictor)(steps).check(denoiser)
        with pytest.raises(UserError):
            type(predictor)(steps - 1).check(denoiser)
    type(predictor)(predictor.steps, large_steps="allow").check(denoiser)


def test_the_steps_of_the_papers_and_of_the_tables_are_allowed():
    for process, sampler in (
        (Betas(linear_betas()), Heun(25)),
        (Betas(linear_betas()), Euler()),
        (VP(), EulerMaruyama(20)),
        (VE(0.01, 50.0), ReverseDiffusion()),
        (VE(0.03, 3.0, num_timesteps=12), Heun()),
        (VE(0.01, 1.0, num_timesteps=10), Euler()),
        (Betas(cosine_betas()), ReverseDiffusion(50)),
    ):
        sampler.check(ExactDenoiser(GAUSSIAN, process))


def test_reverse_diffusion_is_bounded_where_the_variance_is_preserved():
    """However few steps: its coefficients are those of an exact transition."""
    for name in ("VP", "VP, fast", "sub-VP", "linear", "cosine", "cosine, two levels"):
        ReverseDiffusion(1).check(ExactDenoiser(GAUSSIAN, PROCESSES[name]))


# Times below the first level


def test_no_time_is_given_as_an_index_outside_of_the_grid():
    process = Betas(linear_betas(10))
    coefficients = process.coefficients(torch.tensor([1e-6, 0.05, 0.1, 0.55, 1.0], dtype=torch.float64))
    assert C_NOISE["index"](process, coefficients).tolist() == pytest.approx([0.0, 0.0, 0.0, 4.5, 9.0])


@pytest.mark.parametrize("process", [Betas(linear_betas(10)), VE(0.01, 1.0, num_timesteps=10), VP(t_min=1e-3)])
def test_times_that_the_model_does_not_know_are_refused(process):
    denoiser, first = Imperfect(GAUSSIAN, process), process.t_min
    for t in (1e-9, 0.9 * first):
        for ask in (
            lambda t=t: ProbabilityFlow(t_end=t).sample(denoiser, noise_of(2, shape=(4,))).x,
            lambda t=t: flow_log_prob(denoiser, torch.zeros(2, 4), noise_of(2, shape=(4,)), t_min=t),
            lambda t=t: Likelihood(t_min=t).check_times(process),
            lambda t=t: Likelihood(smallest_times=(0.5, t)).check_times(process),
        ):
            with pytest.raises(UserError, match=r"(t_end|t_min|smallest_times) is .*model is trained on times from"):
                ask()
    with pytest.raises(UserError, match="this model is trained on times"):
        flow_log_prob(denoiser, torch.zeros(2, 4), noise_of(2, shape=(4,)), t_min=1.5)
    assert denoiser.calls == 0
    Likelihood(t_min=first, smallest_times=(first, 0.5)).check_times(process)
    ProbabilityFlow(t_end=first).check(denoiser)
    # A level below the first one, of Langevin dynamics and of the picture of the score field.
    ratio = float((process.sigma(wide(first)) / process.alpha(wide(first)))[0])
    assert process.t_at_sigma(ratio) == pytest.approx(first)
    with pytest.raises(UserError, match="outside this process"):
        Langevin(sigma=0.9 * ratio, eta=1e-9).sample(denoiser, noise_of(2, shape=(4,)))
    assert denoiser.calls == 0


def test_a_recipe_is_refused_by_doctor_and_by_fit_alike(tmp_path, capsys):
    backbone = CONFIG["model"]["init_args"]["backbone"]
    model = {"class_path": "DDPM", "init_args": {"num_timesteps": 20, "schedule": "cosine", "backbone": backbone}}
    evaluation = {"every_n_images": 64, "sampler": {"class_path": "EulerMaruyama", "init_args": {"steps": 10}}}
    likelihood = {"t_min": 0.001}
    config = {**CONFIG, "model": model, "eval": evaluation, "likelihood": likelihood}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="2 problems"):
        dispatch(["doctor", *arguments])
    said = capsys.readouterr().out
    assert "EulerMaruyama in 10 steps on this model" in said
    assert "likelihood.t_min is 0.001; this model is trained on times from 0.05, the first of its 20 timesteps" in said
    with pytest.raises(UserError, match=r"likelihood\.t_min is 0\.001"):
        dispatch(["fit", *arguments, "--eval.sampler", "null"])
