"""What a new sampler costs: a step, and for a multistep solver its state; each step for times of each row's own."""

from dataclasses import replace

import pytest
import torch
from helpers.laws import GAUSSIAN, GENTLE, MIXTURE, noise_of, order, wide

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, expand_like, linear_betas
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
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
    Move,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Run,
    Sampler,
    SDEDPMSolverPP2M,
    UniPC,
)
from lit_diffusion.samplers.base import EndsAtZero, at_time
from lit_diffusion.samplers.sde import EndsAtTMin

# A multistep solver


class AdamsBashforth(EndsAtTMin):
    """The two-step Adams-Bashforth method on the probability-flow ODE; the first step is Euler's."""

    def begin(self, run):
        run.state = None

    def step(self, run, x, move):
        t, s = at_time(x, move.t), at_time(x, move.s)
        velocity, h = run.predict(x, t).velocity, s - t
        slope = velocity
        if run.state is not None:
            velocity_before, h_before = run.state
            slope = velocity + expand_like(0.5 * h / h_before, x) * (velocity - velocity_before)
        run.state = velocity, h
        return x + expand_like(h, x) * slope


def ode_error(sampler, process):
    """Of the solution of the probability-flow ODE on Gaussian data, over 50 points."""
    x = process.prior_std * noise_of(50, dtype=torch.float64).normal()
    made = sampler.sample(ExactDenoiser(GAUSSIAN, process), None, start=x)
    exact = GAUSSIAN.flow(process, x, process.t_max, process.t_min_sampling)
    return float((made.x - exact).norm(dim=1).max())


@pytest.mark.parametrize("spacing", ["uniform", "karras:2"])
@pytest.mark.parametrize("process", [GENTLE["VE"], GENTLE["VP"]], ids=["VE", "VP"])
def test_a_multistep_solver_has_its_order_at_one_evaluation_a_step(process, spacing):
    keys = {"denoise": False, "spacing": spacing}
    errors = [ode_error(AdamsBashforth(steps, **keys), process) for steps in (80, 160)]
    assert order(*errors) == pytest.approx(2.0, abs=0.25)
    assert errors[1] < 0.1 * ode_error(Euler(160, spacing=spacing), process)
    made = AdamsBashforth(20, large_steps="allow", **keys).sample(ExactDenoiser(GAUSSIAN, process), noise_of(2))
    assert made.evaluations == 20


def test_a_multistep_solver_keeps_nothing_between_two_calls():
    sampler, denoiser = AdamsBashforth(9, large_steps="allow"), ExactDenoiser(MIXTURE, VP())
    first = sampler.sample(denoiser, noise_of(4)).x
    assert vars(sampler) == vars(AdamsBashforth(9, large_steps="allow"))
    assert torch.equal(sampler.sample(denoiser, noise_of(4)).x, first)


# A step alone


class Renoised(EndsAtZero):
    """Predict the datum, and noise it anew to the next level."""

    def step(self, run, x, move):
        s = at_time(x, move.s)
        return run.process.perturb(run.predict(x, move.t).x0, s, run.noise.normal())


def test_a_sampler_without_memory_is_its_step():
    made = Renoised(4).sample(ExactDenoiser(MIXTURE, VP()), noise_of(500))
    assert made.evaluations == 4
    assert float((made.x.mean(0) - MIXTURE.mean()).abs().max()) < 0.3
    assert bool((made.farthest == 0.0).all())


# What a denoiser receives


class Told(ExactDenoiser):
    """Notes at which times it is asked, and when the step began."""

    def __init__(self, process):
        super().__init__(MIXTURE, process)
        self.asked = []

    def forward(self, x_t, t, cond=None, began=None):
        self.asked.append((float(t[0]), None if began is None else float(began[0])))
        return super().forward(x_t, t, cond)


@pytest.mark.parametrize("sampler", [Heun, lambda *keys: PredictorCorrector(ReverseDiffusion(*keys))])
def test_the_denoiser_receives_the_time_at_which_the_step_began(sampler):
    denoiser = Told(VP(t_min_sampling=0.2))
    sampler(2, True, "data", "allow").sample(denoiser, noise_of(2))
    times, began = zip(*denoiser.asked, strict=True)
    assert times == pytest.approx([1.0, 0.6, 0.6, 0.2, 0.2])
    assert began[:-1] == pytest.approx([1.0, 1.0, 0.6, 0.6])
    assert began[-1] is None  # The end is no step: its own time.


def test_an_adaptive_solver_tells_each_evaluations_own_time():
    denoiser = Told(VP())
    ProbabilityFlow(1e-2, 1e-2).sample(denoiser, noise_of(2))
    assert all(t == began for t, began in denoiser.asked)


class Ends(ExactDenoiser):
    """As a consistency model's."""

    predicts = "end_point"


@pytest.mark.parametrize("sampler", [DDIM(4), Ancestral(4), Heun(4), ProbabilityFlow(), PredictorCorrector()])
def test_a_model_of_end_points_is_refused_before_its_first_evaluation(sampler):
    denoiser = Ends(MIXTURE, VP())
    for ask in (lambda: sampler.check(denoiser), lambda: sampler.sample(denoiser, noise_of(2))):
        with pytest.raises(UserError, match="needs posterior means, and this model predicts end points"):
            ask()


# Times of each row's own

STEPS = {
    "ancestral": Ancestral(),
    "churned_heun": ChurnedHeun(None, spacing="uniform", large_steps="allow"),
    "ddim": DDIM(None),
    "ddim, noisy": DDIM(None, eta=0.6),
    "dpm_solver_1": DPMSolver1(None),
    "dpm_solver_2": DPMSolver2(None),
    "dpm_solver_3": DPMSolver3(None),
    "dpmpp_2s": DPMSolverPP2S(None),
    "euler": Euler(),
    "heun": Heun(),
    "euler_maruyama": EulerMaruyama(),
    "reverse_diffusion": ReverseDiffusion(),
    "corrected": PredictorCorrector(),
    "corrected, to zero": PredictorCorrector(Ancestral(), corrector_steps=2),
}

MULTISTEP = [DPMSolverPP2M(None), DPMSolverPP3M(None), SDEDPMSolverPP2M(None), UniPC(None), DEIS(None), IPNDM(None)]


@pytest.mark.parametrize(
    "process", [VE(0.3, 3.0, num_timesteps=8), Betas(linear_betas(8, 0.01, 0.4))], ids=["VE", "Betas"]
)
@pytest.mark.parametrize("name", STEPS)
def test_each_row_may_have_times_of_its_own(name, process):
    sampler, denoiser, x = STEPS[name], ExactDenoiser(MIXTURE, process), noise_of(3, seed=4).normal()
    last = 0.0 if name in ("ancestral", "ddim", "ddim, noisy", "corrected, to zero") else 0.125
    t, s = wide(1.0, 0.5, 0.25), wide(0.75, 0.375, last)
    together = sampler.step(Run(denoiser, noise_of(3)), x, Move(t, s))
    for row in range(3):
        run = Run(denoiser, noise_of(1, first=row))
        alone = sampler.step(run, x[row : row + 1], Move(float(t[row]), float(s[row])))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_each_row_of_langevin_dynamics_may_have_a_level_of_its_own():
    process = VE(0.3, 3.0, num_timesteps=8)
    denoiser, x = ExactDenoiser(MIXTURE, process), noise_of(2, seed=4).normal()
    for sampler in (AnnealedLangevin(eta=1e-3), Langevin(eta=1e-3, metropolis=True)):
        move = sampler.plan(process)[0]
        moves = [replace(move, t=t, s=t, eta=eta) for t, eta in ((1.0, 0.01), (0.5, 1.5))]
        own = replace(move, t=wide(1.0, 0.5), s=wide(1.0, 0.5), eta=wide(0.01, 1.5))
        together = sampler.step(Run(denoiser, noise_of(2)), x, own)
        for row, move in enumerate(moves):
            alone = sampler.step(Run(denoiser, noise_of(1, first=row)), x[row : row + 1], move)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


# A sampler around any other


class Constrained(Sampler):
    """Inpainting: after every step the known coordinate is the given one, noised to where the step ended."""

    def __init__(self, sampler, known, value):
        self.sampler, self.known, self.value = sampler, known, value

    def plan(self, process):
        return self.sampler.plan(process)

    def require_fit(self, denoiser, plan):
        self.sampler.require_fit(denoiser, plan)

    def start(self, process, noise):
        return self.sampler.start(process, noise)

    def begin(self, run):
        self.sampler.begin(run)

    def step(self, run, x, move):
        x = self.sampler.step(run, x, move)
        given = run.process.perturb(torch.full_like(x, self.value), at_time(x, move.s), run.noise.normal())
        return torch.where(self.known, given, x)

    def finish(self, run, x):
        return self.sampler.finish(run, x)


@pytest.mark.parametrize(
    "inner", [*STEPS.values(), AdamsBashforth(denoise=False), *MULTISTEP, AnnealedLangevin(2, eta=1e-6)]
)
def test_any_sampler_of_fixed_steps_can_be_constrained(inner):
    process = VE(0.001, 3.0, num_timesteps=40)
    sampler = Constrained(inner, torch.tensor([True, False, False]), 0.7)
    made = sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(30))
    assert float((made.x[:, 0] - 0.7).abs().max()) < 0.01
    assert float(made.x[:, 1:].std()) > 0.1
