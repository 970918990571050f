import math

import pytest
import torch
from helpers.laws import (
    GAUSSIAN,
    GENTLE,
    MIXTURE,
    PAPERS,
    assert_law,
    assert_mixture,
    assert_moments,
    bias,
    noise_of,
    order,
    weak_error,
    wide,
)
from scipy.integrate import RK45, solve_ivp

from lit_diffusion.denoisers import Denoiser, Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, SubVP, linear_betas
from lit_diffusion.samplers import DDIM, Euler, Heun, Move, ProbabilityFlow, Run
from lit_diffusion.samplers.ode import ERROR, NODES, STAGES, integrate

WALKERS = {"euler": Euler, "heun": Heun}
each_walker = pytest.mark.parametrize("walker", WALKERS.values(), ids=WALKERS)
each_paper = pytest.mark.parametrize("process", PAPERS.values(), ids=PAPERS)
each_gentle = pytest.mark.parametrize("process", GENTLE.values(), ids=GENTLE)

X = noise_of(50, dtype=torch.float64).normal()


def largest_error(sampler, process, end=None):
    """Of the map that is the probability-flow ODE's, over 50 points."""
    x = process.prior_std * X
    moved = sampler.sample(ExactDenoiser(GAUSSIAN, process), None, start=x).x
    return float((moved - GAUSSIAN.flow(process, x, 1.0, end or process.t_min_sampling)).norm(dim=1).max())


# The formulae


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.4, 0.38), (0.01, 0.001)])
def test_steps_follow_equation_13_of_song_et_al(t, s):
    rate = 2 * math.log(5000)

    def velocity(process, x, u):
        alpha, sigma = process.alpha(wide(u)), process.sigma(wide(u))
        score = MIXTURE.log_prob_and_score(x, alpha.expand(len(x)), sigma.expand(len(x)))[1]
        beta = 0.1 + 19.9 * u
        if isinstance(process, VE):
            return -0.5 * rate * (0.01 * 5000**u) ** 2 * score
        share = 1.0 if not isinstance(process, SubVP) else 1 - math.exp(-2 * (0.1 * u + 19.9 * u**2 / 2))
        return -0.5 * beta * x - 0.5 * beta * share * score

    for process in (VE(0.01, 50.0), VP(), SubVP()):
        first = velocity(process, X, t)
        euler = X + (s - t) * first
        heun = X + (s - t) * (first + velocity(process, euler, s)) / 2
        for walker, expected in ((Euler(), euler), (Heun(), heun)):
            moved = walker.step(Run(ExactDenoiser(MIXTURE, process), None), X, Move(t, s))
            torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-8)


@each_walker
def test_the_plan_visits_every_timestep_and_ends_at_the_first(walker):
    moves = walker().plan(Betas(linear_betas(50)))
    assert [(move.t, move.s) for move in moves] == [(i / 50, (i - 1) / 50) for i in range(50, 1, -1)]
    moves = walker(4).plan(VP(t_min_sampling=0.2))
    assert [move.t for move in moves] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert moves[-1].s == pytest.approx(0.2)


@pytest.mark.parametrize("make", [Euler, Heun, ProbabilityFlow])
@each_paper
def test_the_last_noise_is_taken_off_by_tweedies_formula_where_asked(process, make):
    keys = {} if make is ProbabilityFlow else {"steps": 30}
    denoiser, start = ExactDenoiser(GAUSSIAN, process), process.prior_std * X
    noisy = make(**keys).sample(denoiser, None, start=start).x
    clean = make(denoise=True, **keys).sample(denoiser, None, start=start).x
    expected = GAUSSIAN.posterior_mean(process, noisy, process.t_min_sampling)
    torch.testing.assert_close(clean, expected, rtol=1e-9, atol=1e-9)
    assert float((clean - noisy).abs().max()) > 1e-4


# Gaussian data: the map is known


@each_gentle
def test_eulers_error_is_of_order_1(process):
    errors = [largest_error(Euler(steps), process) for steps in (50, 100)]
    assert order(*errors) == pytest.approx(1.0, abs=0.1)
    errors = (weak_error(Euler(steps), process, GAUSSIAN.flowed) for steps in (50, 100))
    assert order(*errors) == pytest.approx(1.0, abs=0.1)


@each_gentle
def test_heuns_error_is_of_order_2(process):
    errors = [largest_error(Heun(steps), process) for steps in (50, 100)]
    assert order(*errors) == pytest.approx(2.0, abs=0.2)
    assert errors[-1] < 0.06 * largest_error(Euler(100), process)


@each_paper
def test_many_steps_have_the_law_of_the_data(process):
    assert bias(Euler(800 if isinstance(process, VE) else 200), process) < 0.06
    assert bias(Heun(100), process) < 0.01


@each_paper
def test_the_adaptive_solvers_error_falls_with_its_tolerance(process):
    tolerances = (1e-4, 1e-6, 1e-8)
    errors = [largest_error(ProbabilityFlow(tolerance, tolerance), process) for tolerance in tolerances]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert max(error / tolerance for error, tolerance in zip(errors, tolerances, strict=True)) < 100


@each_paper
def test_the_adaptive_solver_asks_a_hundred_times_for_a_precision_that_no_image_shows(process):
    sampler = ProbabilityFlow(1e-5, 1e-5)
    assert largest_error(sampler, process) < 0.1 / 255
    made = sampler.sample(ExactDenoiser(GAUSSIAN, process), None, start=process.prior_std * X)
    assert 50 < made.evaluations < 130


def test_on_all_of_ddpms_levels_euler_errs_by_less_than_a_grey_level_and_heun_hardly():
    """The rate of its noise jumps at each of the 1000 levels; a step of Heun's stays on its own side of each."""
    assert largest_error(Euler(), PAPERS["DDPM"]) < 2 / 255
    assert largest_error(Heun(), PAPERS["DDPM"]) < 0.02 / 255


@each_paper
def test_a_batch_is_solved_as_precisely_as_its_hardest_sample_asks_for(process):
    """A thousand samples that move along the mean are no excuse for imprecision in another."""
    denoiser, sampler = ExactDenoiser(GAUSSIAN, process), ProbabilityFlow(1e-4, 1e-4)
    hard = process.prior_std * X[:1]
    mean, _ = GAUSSIAN.marginal(process, 1.0)
    alone = sampler.sample(denoiser, None, start=hard).x
    in_company = sampler.sample(denoiser, None, start=torch.cat((hard, mean.expand(1000, 3)))).x[:1]
    expected = GAUSSIAN.flow(process, hard, 1.0, process.t_min_sampling)
    assert float((in_company - expected).norm()) < 2 * float((alone - expected).norm())


def test_the_adaptive_solver_stops_at_t_end():
    process = PAPERS["VP"]
    assert largest_error(ProbabilityFlow(1e-7, 1e-7, t_end=0.3), process, end=0.3) < 1e-5
    x = process.prior_std * X
    denoised = (
        ProbabilityFlow(1e-7, 1e-7, denoise=True, t_end=0.3).sample(ExactDenoiser(GAUSSIAN, process), None, start=x).x
    )
    expected = GAUSSIAN.posterior_mean(process, GAUSSIAN.flow(process, x, 1.0, 0.3), 0.3)
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)


def test_one_move_of_the_adaptive_solver_is_the_whole_way():
    process, sampler = PAPERS["VP"], ProbabilityFlow()
    denoiser = ExactDenoiser(MIXTURE, process)
    (move,) = sampler.plan(process)
    whole = sampler.sample(denoiser, None, start=X).x
    assert torch.equal(sampler.step(Run(denoiser, None), X, move), whole)


@pytest.mark.parametrize("process", [VE(0.01, 50.0), VP(), SubVP()], ids=["VE", "VP", "SubVP"])
def test_the_solver_integrates_both_ways(process):
    """dx/dt = -x^2 has the solution 1 / (t + 1)."""
    there, back = (0.1, 0.35, 1.0), (1.0, 0.5, 0.1)
    for times in (there, back):
        start = torch.full((2, 3), 1 / (times[0] + 1), dtype=torch.float64)
        found = integrate(process, lambda t, x: -(x**2), start, times, 1e-9, 1e-9)
        expected = (1 / (wide(*times) + 1))[:, None, None].expand(3, 2, 3)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("times", [(1.0, 0.01), (0.01, 1.0)])
@each_paper
def test_the_solver_asks_for_no_time_beyond_its_ends(process, times):
    asked = []

    def velocity(t, x):
        asked.append(t)
        return -x * t

    integrate(process, velocity, torch.ones(1, 1, dtype=torch.float64), times, 1e-3, 1e-3)
    assert min(asked) >= 0.01
    assert max(asked) <= 1.0


@pytest.mark.parametrize("process", [VE(0.01, 50.0), VP(), SubVP()], ids=["VE", "VP", "SubVP"])
def test_each_row_is_solved_as_scipy_solves_it_alone(process):
    """A pendulum: at the same tolerance two methods of order 5 of one family are about as far from the truth."""

    def velocity(t, y):
        return torch.stack((y[:, 1], -((4 + 3 * t) ** 2) * torch.sin(y[:, 0])), dim=1)

    start, times = wide(3.1, 0.0, 0.02, 0.0, -1.0, 2.0).view(3, 2), (0.05, 0.4, 1.0)
    found = integrate(process, velocity, start, times, 1e-8, 1e-8)
    alone = torch.cat([integrate(process, velocity, row[None], times, 1e-8, 1e-8) for row in start], dim=1)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0], start)
    for k, row in enumerate(start):
        exact = solve_ivp(
            lambda t, y: velocity(t, torch.from_numpy(y)[None])[0].numpy(),
            (times[0], times[-1]),
            row.numpy(),
            t_eval=times,
            rtol=1e-12,
            atol=1e-12,
        )
        torch.testing.assert_close(found[:, k], torch.from_numpy(exact.y.T.copy()), rtol=0, atol=2e-6)


def test_the_method_is_the_published_one():
    """Dormand and Prince's, as scipy has it, with its conditions of order 5 for quadrature."""
    for mine, theirs in zip(STAGES[:5], RK45.A[1:], strict=True):
        assert list(mine) == pytest.approx(theirs[: len(mine)].tolist(), rel=1e-15)
    assert list(NODES) == pytest.approx([*RK45.C[1:], 1.0], rel=1e-15)
    assert list(STAGES[5]) == pytest.approx(RK45.B.tolist(), rel=1e-15)
    assert list(ERROR) == pytest.approx((-RK45.E).tolist(), rel=1e-12)
    for power in range(5):
        moments = [w * node**power for w, node in zip(STAGES[5], (0.0, *NODES[:-1]), strict=True)]
        assert sum(moments) == pytest.approx(1 / (power + 1), rel=1e-14)


def test_an_easy_row_arrives_early_and_stays_where_it_is():
    seen, process = [], VP()

    def velocity(t, x):
        seen.append(t.clone())
        return torch.where(torch.tensor([[True], [False]]), -x, 60 * torch.sin(60 * t)[:, None])

    start = torch.ones(2, 1, dtype=torch.float64)
    found = integrate(process, velocity, start, (0.1, 1.0), 1e-6, 1e-6)[-1]
    assert float(found[0]) == pytest.approx(math.exp(-0.9), rel=1e-6)
    assert float(found[1]) == pytest.approx(1 + math.cos(6) - math.cos(60), abs=1e-4)
    assert torch.equal(found[:1], integrate(process, lambda t, x: -x, start[:1], (0.1, 1.0), 1e-6, 1e-6)[-1])
    assert len([t for t in seen if float(t[0]) > 1.0 - 1e-9]) > len(seen) / 2


class Broken(Denoiser):
    """Gives NaN below half of the way."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, cond=None, began=None):
        level = self.process.coefficients(t)
        raw = torch.where(t[:, None] < 0.5, math.nan, x_t)
        return Prediction(x_t, raw, level, torch.zeros_like(t), torch.ones_like(t))


def test_a_solver_that_gives_up_says_why():
    with pytest.raises(UserError, match="not finite, or the tolerances rtol 1e-05 and atol 1e-05") as caught:
        ProbabilityFlow().sample(Broken(VP()), noise_of(2))
    assert "\n" not in str(caught.value)


# Samples


@each_walker
@each_paper
def test_samples_have_the_law_of_their_steps(process, walker):
    assert_law(walker(50), process)


@each_paper
def test_samples_of_a_mixture(process):
    assert_mixture(Euler(800 if isinstance(process, VE) else 200), process)
    assert_mixture(Heun(100), process)
    assert_mixture(ProbabilityFlow(), process)


@each_paper
def test_the_adaptive_solvers_samples_have_the_law_of_the_flow(process):
    start = (torch.zeros(3).double(), process.prior_std**2 * torch.eye(3).double())
    x = ProbabilityFlow().sample(ExactDenoiser(GAUSSIAN, process), noise_of(5000, seed=1)).x
    assert_moments(x, *GAUSSIAN.flowed(process, start, 1.0, process.t_min_sampling))


@each_paper
def test_all_deterministic_samplers_go_to_the_same_images(process):
    denoiser, start = ExactDenoiser(MIXTURE, process), process.prior_std * X
    exact = ProbabilityFlow(denoise=True).sample(denoiser, None, start=start).x
    for sampler in (Heun(200, denoise=True), DDIM(400)):
        assert float((sampler.sample(denoiser, None, start=start).x - exact).norm(dim=1).mean()) < 0.02


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Euler(0), ["steps is 0"]),
        (lambda: Heun(-1), ["steps is -1"]),
        (lambda: ProbabilityFlow(rtol=0.0), ["rtol 0", "positive"]),
        (lambda: ProbabilityFlow(atol=-1e-5), ["atol -1e-05", "positive"]),
        (lambda: ProbabilityFlow(atol=math.nan), ["atol nan"]),
        (lambda: ProbabilityFlow(t_end=0.0), ["t_end is 0"]),
        (lambda: ProbabilityFlow(t_end=1.0), ["t_end is 1"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
