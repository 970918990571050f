"""DPM-Solver and DPM-Solver++: the papers' formulae, their orders, the SDE's law, and other implementations."""

import math

import pytest
import torch
from helpers.laws import GAUSSIAN, MIXTURE, as_azulas, noise_of, order, wide
from helpers.solvers import SMOOTH, X, against, error_of, flowed, law_of_run, order_of
from scipy.integrate import quad

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, linear_betas
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    Ancestral,
    DPMSolver1,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Move,
    Run,
    SDEDPMSolverPP2M,
    UniPC,
)
from lit_diffusion.samplers.exponential import Evaluation, Interval, phi

each_process = pytest.mark.parametrize("name", SMOOTH)
SINGLESTEP = {DPMSolver1: 1, DPMSolver2: 2, DPMSolver3: 3, DPMSolverPP2S: 2}
MULTISTEP = {DPMSolverPP2M: 2, DPMSolverPP3M: 3}
ALL = [*SINGLESTEP, *MULTISTEP, SDEDPMSolverPP2M]


# The formulae


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    for z in (-30.0, -3.0, -1.0001, -0.9999, -1e-3, 0.0, 1e-9, 0.5, 0.9999, 1.0, 8.0):
        integral = quad(lambda u, z=z: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 0, 1)[0]
        assert float(phi(k, wide(z))) == pytest.approx(integral, rel=1e-10)


def test_a_polynomial_is_integrated_exactly_through_any_points():
    """A cubic of lambda is its own interpolation: the step is the integral of the solution's formula."""
    process = SMOOTH["VP"]

    def cubic(time):
        return 0.3 - 1.1 * time + 0.7 * time**2 + 0.2 * time**3

    for integrand in ("data", "noise"):
        at = Interval(process, wide(0.5), wide(0.3), integrand)
        start, h = float(at.start), float(at.h)
        nodes = [start, start + h, start - 0.4, start - 1.1]
        points = [Evaluation(at.t, wide(node), wide(cubic(node))[None], wide(cubic(node))[None]) for node in nodes]
        x = wide(0.8)[None]
        if integrand == "noise":  # The datum that belongs to this noise.
            x0 = (x - process.sigma(at.t) * cubic(start)) / process.alpha(at.t)
            points[0] = Evaluation(at.t, wide(start), x0, points[0].value)
        found = float(at.reached(x, points[0], *at.interpolated(points)))
        (alpha_t, alpha_s), (sigma_t, sigma_s) = process.alpha(wide(0.5, 0.3)), process.sigma(wide(0.5, 0.3))
        if integrand == "data":
            integral = quad(lambda u: math.exp(u - h) * cubic(start + u), 0, h, epsrel=1e-12)[0]  # noqa: B023
            expected = sigma_s / sigma_t * 0.8 + alpha_s * integral
        else:
            integral = quad(lambda u: math.exp(h - u) * cubic(start + u), 0, h, epsrel=1e-12)[0]  # noqa: B023
            expected = alpha_s / alpha_t * 0.8 - sigma_s * integral
        assert found == pytest.approx(float(expected), rel=1e-12)


@each_process
def test_steps_follow_the_papers_algorithms(name):
    """Written as there, in alpha, sigma, lambda and e^h."""
    process, t, s = SMOOTH[name], 0.6, 0.45
    denoiser = ExactDenoiser(MIXTURE, process)

    def at(u):
        return process.alpha(wide(u)), process.sigma(wide(u)), 0.5 * process.log_snr(wide(u))

    def views(x, u):
        made = denoiser(x, wide(u).expand(len(x)))
        return made.x0, made.eps

    (alpha_t, sigma_t, start), (alpha_s, sigma_s, end) = at(t), at(s)
    h, (x0, eps) = end - start, views(X, t)
    between = {share: float(process.t_at_log_snr(2 * (start + share * h))) for share in (1 / 3, 1 / 2, 2 / 3)}
    first = alpha_s / alpha_t * X - sigma_s * torch.expm1(h) * eps
    alpha, sigma, _ = at(between[1 / 2])
    u = alpha / alpha_t * X - sigma * torch.expm1(h / 2) * eps
    second = alpha_s / alpha_t * X - sigma_s * torch.expm1(h) * views(u, between[1 / 2])[1]
    u = sigma / sigma_t * X - alpha * torch.expm1(-h / 2) * x0
    data = sigma_s / sigma_t * X - alpha_s * torch.expm1(-h) * views(u, between[1 / 2])[0]
    alpha, sigma, _ = at(between[1 / 3])
    D1 = views(alpha / alpha_t * X - sigma * torch.expm1(h / 3) * eps, between[1 / 3])[1] - eps
    (alpha, sigma, _), r = at(between[2 / 3]), 2 * h / 3
    u = alpha / alpha_t * X - sigma * torch.expm1(r) * eps - 2 * sigma * (torch.expm1(r) / r - 1) * D1
    D2 = views(u, between[2 / 3])[1] - eps
    third = first - 1.5 * sigma_s * (torch.expm1(h) / h - 1) * D2
    for sampler, expected in ((DPMSolver1, first), (DPMSolver2, second), (DPMSolver3, third), (DPMSolverPP2S, data)):
        found = sampler().step(Run(denoiser, noise_of(len(X))), X, Move(t, s))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    # Of unequal steps.
    run, moves = Run(denoiser, noise_of(len(X))), [Move(0.9, 0.6), Move(0.6, 0.45)]
    sampler = DPMSolverPP2M()
    x = sampler.step(run, X, moves[0])
    r0 = (start - at(0.9)[2]) / h
    D = (1 + 1 / (2 * r0)) * views(x, t)[0] - 1 / (2 * r0) * views(X, 0.9)[0]
    expected = sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * D
    torch.testing.assert_close(sampler.step(run, x, moves[1]), expected, rtol=1e-9, atol=1e-9)


@each_process
def test_of_order_1_it_is_ddim(name):
    process = SMOOTH[name]
    denoiser, times = ExactDenoiser(MIXTURE, process), DPMSolver1(9).plan(process)
    spacing = [*(move.t for move in times), times[-1].s]
    ddim = DDIM(None, spacing=spacing).sample(denoiser, None, start=X).x
    found = DPMSolver1(9, denoise=True).sample(denoiser, None, start=X).x
    torch.testing.assert_close(found, ddim, rtol=1e-12, atol=1e-12)


# Orders


@pytest.mark.parametrize("make", SINGLESTEP)
@each_process
def test_a_singlestep_solver_has_its_order(name, make):
    assert order_of(make, name, 24) == pytest.approx(SINGLESTEP[make], abs=0.25)


@pytest.mark.parametrize("make", MULTISTEP)
@each_process
def test_a_multistep_solver_has_its_order_with_an_exact_start_of_its_history(name, make):
    assert order_of(make, name, 40, exact=MULTISTEP[make] - 1) >= MULTISTEP[make] - 0.25


@pytest.mark.parametrize("make", MULTISTEP)
@each_process
def test_a_multistep_solver_with_its_own_first_steps_has_order_2(name, make):
    """The first step is of order 1: its error alone is that of order 2 at the end."""
    assert order_of(make, name, 40) >= 2 - 0.25


@pytest.mark.parametrize("spacing", ["karras:3", "quadratic"])
def test_the_order_does_not_depend_on_equal_steps(spacing):
    for make, p in ((DPMSolverPP2M, 2), (DPMSolverPP3M, 3), (DPMSolver3, 3)):
        exact = 0 if make is DPMSolver3 else p - 1
        assert order_of(lambda steps, make=make: make(steps, spacing), "VP", 40, exact) >= p - 0.25


def test_higher_orders_are_nearer_at_as_many_evaluations():
    for name in SMOOTH:
        first, second, third = (error_of(make(24), name) for make in (DPMSolver1, DPMSolverPP2M, DPMSolverPP3M))
        assert first > 5 * second
        assert third < second
        assert error_of(DPMSolver3(8), name) < 0.1 * first


# The SDE


@each_process
def test_the_law_of_the_sde_converges(name):
    """Mean and covariance, from a start that is not the marginal, to those of the reverse SDE."""
    process, errors = SMOOTH[name], []
    mean, covariance = GAUSSIAN.marginal(process, process.t_max)
    start = (mean + 0.5, 1.3 * covariance)
    goal = GAUSSIAN.reversed(process, start, process.t_max, process.t_min_sampling)
    for steps in (30, 60):
        found = law_of_run(SDEDPMSolverPP2M(steps), process, start)
        errors.append(float((found[0] - goal[0]).norm() + (found[1] - goal[1]).norm()))
    assert order(*errors) > 1.0 - 0.1
    assert errors[1] < 0.1
    ancestral = law_of_run(ancestral_on_log_snr(60, process), process, start)
    assert errors[1] < float((ancestral[0] - goal[0]).norm() + (ancestral[1] - goal[1]).norm())


def ancestral_on_log_snr(steps, process):
    """Order 1, on the same times."""
    plan = SDEDPMSolverPP2M(steps).plan(process)
    sampler = Ancestral(None, "beta_tilde", [float(move.t) for move in plan])
    sampler.plan = lambda process: plan
    return sampler


def test_samples_of_the_sde_have_the_datas_law():
    process = VP()
    x = SDEDPMSolverPP2M(60).sample(ExactDenoiser(GAUSSIAN, process), noise_of(4000)).x.double()
    assert float((x.mean(0) - GAUSSIAN.m).norm()) < 0.1
    assert float((torch.cov(x.T) - GAUSSIAN.C).norm()) < 0.1


# The ends


@pytest.mark.parametrize("make", ALL)
def test_out_of_pure_noise_the_first_step_is_of_order_1(make):
    """At t = 1 of the straight line lambda is infinite; what is known there counts for nothing later."""
    process = Flow(1e-4, 1e-4)
    denoiser, x = ExactDenoiser(GAUSSIAN, process), noise_of(20, dtype=torch.float64).normal()
    sampler, states = make(40), []
    sampler.sample(denoiser, noise_of(20, dtype=torch.float64), start=x, on_step=lambda p: states.append(p.x))
    assert all(bool(state.isfinite().all()) for state in states)
    if make is not SDEDPMSolverPP2M:
        s = float(sampler.plan(process)[0].s)
        expected = s * x + (1 - s) * denoiser(x, wide(1.0).expand(20)).x0
        torch.testing.assert_close(states[0], expected, rtol=1e-12, atol=1e-12)
        exact = GAUSSIAN.flow(process, x, 1.0, process.t_min_sampling)
        assert float((states[-1] - exact).norm(dim=1).max()) < (0.5 if make is DPMSolver1 else 0.1)


def test_of_few_steps_the_last_are_of_lower_order():
    process = SMOOTH["VP"]
    denoiser, orders = ExactDenoiser(MIXTURE, process), []

    class Counted(DPMSolverPP3M):
        def extrapolated(self, run, x, at, points):
            orders.append(len(points))
            return super().extrapolated(run, x, at, points)

    for steps, keys, expected in (
        (6, {}, [1, 2, 3, 3, 2, 1]),
        (6, {"lower_order_final": False}, [1, 2, 3, 3, 3, 3]),
        (2, {}, [1, 1]),
        (15, {}, [1, 2, *[3] * 13]),
    ):
        orders.clear()
        Counted(steps, **keys).sample(denoiser, noise_of(2))
        assert orders == expected


@pytest.mark.parametrize("make", ALL)
def test_predicted_data_are_clipped_inside_of_the_steps(make):
    """And the noise is that of the clipped datum."""
    denoiser, clip, t = ExactDenoiser(MIXTURE, VE(0.3, 3.0)), (-0.1, 0.1), wide(0.7).expand(len(X))
    made = make(clip_x0=clip).evaluate(Run(denoiser, None), X, t)
    assert (float(made.x0.min()), float(made.x0.max())) == (-0.1, 0.1)
    if make.integrand == "noise":
        torch.testing.assert_close(made.x0 + denoiser.process.sigma(t)[:, None] * made.value, X)
    free = make(clip_x0=None).evaluate(Run(denoiser, None), X, t)
    assert torch.equal(free.x0, denoiser(X, t).x0)
    assert torch.equal(free.value, denoiser(X, t).eps if make.integrand == "noise" else free.x0)


def test_a_multistep_solver_keeps_nothing_between_two_calls():
    denoiser = ExactDenoiser(MIXTURE, VP())
    for make in (DPMSolverPP2M, DPMSolverPP3M, SDEDPMSolverPP2M):
        sampler = make(9)
        first = sampler.sample(denoiser, noise_of(4)).x
        assert vars(sampler) == vars(make(9))
        assert torch.equal(sampler.sample(denoiser, noise_of(4)).x, first)


@pytest.mark.parametrize("make", [*ALL, UniPC, DEIS, IPNDM])
def test_a_model_of_coupled_noise_is_sampled_by_its_ode_alone(make):
    denoiser = ExactDenoiser(MIXTURE, Flow())
    denoiser.predicts = "velocity"
    if make is SDEDPMSolverPP2M:
        with pytest.raises(UserError, match="SDEDPMSolverPP2M needs the score of the noised data"):
            make().check(denoiser)
    else:
        make().check(denoiser)


def test_what_cannot_be_is_refused_in_one_line():
    denoiser = ExactDenoiser(GAUSSIAN, Betas(linear_betas(40)))
    denoiser.on_grid_only = True
    for make in (DPMSolver2, DPMSolver3, DPMSolverPP2S):
        with pytest.raises(UserError, match="a singlestep solver evaluates the network between its 40 timesteps"):
            make(8).check(denoiser)
    DPMSolverPP3M(8).check(denoiser)
    for ask, words in (
        (lambda: DPMSolverPP2M(0), "steps is 0"),
        (lambda: DPMSolver2(spacing="karas"), "did you mean 'karras'"),
        (lambda: DPMSolverPP3M(3, spacing=[1.0, 0.2]), "the times of 1 steps and steps is 3"),
        (lambda: DPMSolver1(clip_x0=(1.0, 0.0)), r"clip_x0 is \[1, 0\]"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            ask()
        assert "\n" not in str(caught.value)


# Other implementations


def multistep(name="DPMSolverMultistepScheduler", **keys):
    module = pytest.importorskip("diffusers.schedulers")
    return getattr(module, name)(1000, 1e-4, 0.02, final_sigmas_type="sigma_min", **keys)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("make", [DPMSolverPP2M, SDEDPMSolverPP2M])
def test_diffusers_agrees_on_2m(make, steps):
    scheduler = multistep(algorithm_type="sde-dpmsolver++" if make is SDEDPMSolverPP2M else "dpmsolver++")
    assert against(scheduler, make(steps, clip_x0=None), steps) < 1e-4


class HalvedSecondDerivative(DPMSolverPP3M):
    """Diffusers' 3M: of ``h^3 phi_3 f''`` it has half, since its D2 is the second divided difference, f'' / 2."""

    def extrapolated(self, run, x, at, points):
        if len(points) < 3:
            return super().extrapolated(run, x, at, points)
        terms = at.interpolated(points)
        return at.reached(x, points[0], *terms, (-at.phi(3), terms[-1][1]))


@pytest.mark.parametrize("steps", [8, 20])
def test_diffusers_agrees_on_3m_but_for_half_of_the_second_derivative(steps):
    assert against(multistep(solver_order=3), HalvedSecondDerivative(steps, clip_x0=None), steps) < 1e-4
    assert against(multistep(solver_order=3), DPMSolverPP3M(steps, clip_x0=None), steps) > 1e-4
    # Which costs it an order.
    assert order_of(HalvedSecondDerivative, "VP", 40, exact=2) < 2.5


class Halved3(DPMSolver3):
    """Diffusers' DPM-Solver-3: its second stage has ``phi_1 / 2`` in the place of the paper's ``phi_2``."""

    def step(self, run, x, move):
        at = self.interval(run, x, move)
        first, third, thirds = self.evaluate(run, x, at.t), at.part(1 / 3), at.part(2 / 3)
        value = self.evaluate(run, third.reached(x, first), third.s).value
        second = thirds.reached(x, first, (thirds.phi(1), value - first.value))
        return at.reached(x, first, (1.5 * at.phi(2), self.evaluate(run, second, thirds.s).value - first.value))


@pytest.mark.parametrize(
    ("make", "nodes", "kind"),
    [(DPMSolver2, (0.5,), "dpmsolver"), (DPMSolverPP2S, (0.5,), "dpmsolver++"), (Halved3, (1 / 3, 2 / 3), "dpmsolver")],
)
def test_diffusers_agrees_on_singlestep_solvers(make, nodes, kind):
    """On the stages' own times; it takes those of the timesteps nearby."""
    scheduler = multistep("DPMSolverSinglestepScheduler", solver_order=len(nodes) + 1, algorithm_type=kind)
    assert against(scheduler, make(12, clip_x0=None), 12, nodes) < 1e-4


class InterpolatedStart(DPMSolverPP3M):
    """Also the second step by ``phi_2``, in which azula's differs from the paper's 2M."""

    def extrapolated(self, run, x, at, points):
        return at.reached(x, points[0], *at.interpolated(points))


@each_process
def test_azula_agrees(name):
    module = pytest.importorskip("azula.sample")
    process = SMOOTH[name]
    denoiser = ExactDenoiser(MIXTURE, process)
    keys = {"start": process.t_max, "stop": process.t_min_sampling, "silent": True, "dtype": torch.float64, "steps": 20}
    for theirs, ours in (
        (module.EulerSampler(as_azulas(denoiser), **keys), DPMSolver1(20, "uniform")),
        (module.xEABSampler(as_azulas(denoiser), order=3, **keys), InterpolatedStart(20, "uniform")),
    ):
        found = ours.sample(denoiser, None, start=process.prior_std * X).x
        torch.testing.assert_close(found, theirs(process.prior_std * X), rtol=1e-6, atol=1e-6)


def test_the_reference_is_the_flows():
    """Of Gaussian data it is known: the adaptive solver that the orders are measured by is right."""
    assert float((flowed("VP", (1.0, 0.05))[0] - X).abs().max()) == 0.0
    process = SMOOTH["VP"]
    denoiser = ExactDenoiser(GAUSSIAN, process)
    errors = [
        float((DPMSolver3(steps).sample(denoiser, None, start=X).x - GAUSSIAN.flow(process, X, 1.0, 0.05)).norm())
        for steps in (24, 48)
    ]
    assert order(*errors) == pytest.approx(3.0, abs=0.25)
