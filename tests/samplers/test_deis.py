"""DEIS-tAB and iPNDM: their formulae by quadrature and by hand, their orders, and other implementations."""

import math
from functools import partial

import pytest
import torch
from helpers.laws import MIXTURE, as_azulas, noise_of, wide
from helpers.solvers import SMOOTH, X, against, order_of
from scipy.integrate import quad

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import Flow
from lit_diffusion.samplers import DEIS, IPNDM, DPMSolver1, Run

each_process = pytest.mark.parametrize("name", SMOOTH)


def steps_by_hand(sampler, name):
    """The states after each of the first moves, the noises at their beginnings, and the moves."""
    process = SMOOTH[name]
    plan, run, x = sampler.plan(process)[:5], Run(ExactDenoiser(MIXTURE, process), None), X
    states, noises = [X], []
    for move in plan:
        noises.append(run.denoiser(x, wide(move.t).expand(len(x))).eps)
        x = sampler.step(run, x, move)
        states.append(x)
    return states, noises, plan


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@each_process
def test_deis_integrates_lagranges_polynomials_in_time(name, order):
    """``C_j = alpha_s int (d rho / d tau) L_j d tau``, in tau itself."""
    process = SMOOTH[name]
    states, noises, plan = steps_by_hand(DEIS(16, order), name)

    def slope(tau):
        at = process.coefficients(wide(tau))
        rho = float(at.sigma / at.alpha)
        return rho * float(at.dsigma / at.sigma - at.dalpha / at.alpha)

    for n, move in enumerate(plan):
        times = [plan[n - j].t for j in range(min(order, n + 1))]
        alpha_t, alpha_s = process.alpha(wide(move.t, move.s))
        expected = alpha_s / alpha_t * states[n]
        for j, t_j in enumerate(times):
            others = [t for i, t in enumerate(times) if i != j]

            def basis(tau, t_j=t_j, others=others):
                return slope(tau) * math.prod((tau - t) / (t_j - t) for t in others)

            expected = expected + alpha_s * quad(basis, move.t, move.s, epsrel=1e-11)[0] * noises[n - j]
        torch.testing.assert_close(states[n + 1], expected, rtol=1e-8, atol=1e-8)


@each_process
def test_ipndm_is_ddim_with_adams_and_bashforths_noise(name):
    process = SMOOTH[name]
    states, e, plan = steps_by_hand(IPNDM(16), name)
    mixed = [
        e[0],
        (3 * e[1] - e[0]) / 2,
        (23 * e[2] - 16 * e[1] + 5 * e[0]) / 12,
        (55 * e[3] - 59 * e[2] + 37 * e[1] - 9 * e[0]) / 24,
        (55 * e[4] - 59 * e[3] + 37 * e[2] - 9 * e[1]) / 24,
    ]
    for n, move in enumerate(plan):
        (alpha_t, alpha_s), (sigma_t, sigma_s) = (
            process.alpha(wide(move.t, move.s)),
            process.sigma(wide(move.t, move.s)),
        )
        expected = alpha_s * (states[n] / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * mixed[n])
        torch.testing.assert_close(states[n + 1], expected, rtol=1e-10, atol=1e-10)


# Orders


@pytest.mark.parametrize("order", [2, 3, 4])
@each_process
def test_deis_has_its_order_with_an_exact_start_of_its_history(name, order):
    steps = 160 if order == 4 else 60
    assert order_of(partial(DEIS, order=order), name, steps, exact=order - 1) >= order - 0.25
    # With its own first steps, the first of which is of order 1:
    assert order_of(partial(DEIS, order=order), name, 60) >= 2 - 0.25


@pytest.mark.parametrize("order", [2, 4])
def test_ipndm_has_its_order_on_equal_steps_of_the_ratio_and_order_2_on_others(order):
    equal = partial(IPNDM, order=order, spacing="karras:1")
    for name, steps in (("VE", 40), ("VP", 40), ("EDM", 160)):
        assert order_of(equal, name, steps, exact=order - 1) >= order - 0.25
        assert order_of(equal, name, steps) >= 2 - 0.25
        assert order_of(partial(IPNDM, order=order), name, 40, exact=order - 1) == pytest.approx(2.0, abs=0.25)


# The ends


@pytest.mark.parametrize("make", [DEIS, IPNDM])
def test_out_of_pure_noise_the_first_step_is_of_order_1(make):
    process = Flow(1e-4, 1e-4)
    denoiser, x = ExactDenoiser(MIXTURE, process), noise_of(20, dtype=torch.float64).normal()
    states = []
    made = make(60, spacing="karras:7").sample(denoiser, None, start=x, on_step=lambda p: states.append(p.x)).x
    first = DPMSolver1(60, "karras:7").plan(process)[0].s
    expected = first * x + (1 - first) * denoiser(x, wide(1.0).expand(20)).x0
    torch.testing.assert_close(states[0], expected, rtol=1e-12, atol=1e-12)
    many = make(240, spacing="karras:7").sample(denoiser, None, start=x).x
    assert float((made - many).norm(dim=1).median()) < 0.02


def test_bad_orders_are_refused_in_one_line():
    for make, name in ((DEIS, "DEIS"), (IPNDM, "iPNDM")):
        for order in (0, 5):
            with pytest.raises(UserError, match=f"order is {order}; {name} goes by 1 to 4 noises") as caught:
                make(order=order)
            assert "\n" not in str(caught.value)


# Other implementations


class InLogRho(DEIS):
    """A polynomial in log rho, which is -lambda, in the place of that in time: diffusers' and azula's."""

    def extrapolated(self, run, x, at, points):
        return at.reached(x, points[0], *at.interpolated(points))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_agrees_but_for_the_polynomials_variable(order):
    module = pytest.importorskip("diffusers.schedulers")
    for steps in (8, 20):
        scheduler = module.DEISMultistepScheduler(1000, 1e-4, 0.02, solver_order=order)
        assert against(scheduler, InLogRho(steps, order, clip_x0=None), steps) < 1e-4
    if order > 1:
        scheduler = module.DEISMultistepScheduler(1000, 1e-4, 0.02, solver_order=order)
        assert against(scheduler, DEIS(8, order, clip_x0=None), 8) > 1e-4


def test_where_time_is_linear_in_log_rho_deis_is_both():
    process = SMOOTH["VE"]
    denoiser, start = ExactDenoiser(MIXTURE, process), process.prior_std * X
    ours, other = (make(20, 3).sample(denoiser, None, start=start).x for make in (DEIS, InLogRho))
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_azula_agrees(order):
    module = pytest.importorskip("azula.sample")
    for theirs, ours, name in (
        (module.zEABSampler, DEIS(20, order, "uniform"), "VE"),  # In log rho, there linear in time.
        (module.zEABSampler, InLogRho(20, order, "uniform"), "VP"),
        (module.zABSampler, IPNDM(20, order, "uniform"), "EDM"),  # There uniform steps of time are equal ones of rho.
    ):
        process = SMOOTH[name]
        denoiser, start = ExactDenoiser(MIXTURE, process), process.prior_std * X
        keys = {"start": 1.0, "stop": process.t_min_sampling, "steps": 20, "silent": True, "dtype": torch.float64}
        expected = theirs(as_azulas(denoiser), order=order, **keys)(start)
        torch.testing.assert_close(ours.sample(denoiser, None, start=start).x, expected, rtol=1e-6, atol=1e-6)
