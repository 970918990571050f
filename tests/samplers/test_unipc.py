"""UniPC: the paper's equations, its orders, and diffusers' scheduler."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.laws import MIXTURE, noise_of, wide
from helpers.solvers import SMOOTH, X, against, order_of

from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VP, Flow
from lit_diffusion.samplers import PredictorCorrector, UniPC
from lit_diffusion.samplers.exponential import Evaluation, Interval

each_process = pytest.mark.parametrize("name", SMOOTH)
each_order = pytest.mark.parametrize("p", [1, 2, 3])
each_variant = pytest.mark.parametrize("variant", ["bh1", "bh2"])
each_prediction = pytest.mark.parametrize("integrand", ["data", "noise"])


@each_variant
@each_prediction
@pytest.mark.parametrize("points", [2, 3, 4])
def test_the_weights_solve_the_papers_linear_equations(points, integrand, variant):
    """``sum_m a_m r_m^(n-1) B(h) = h^n n! phi_(n+1)(h)`` over h^(n-1), n = 1 .. points - 1, in its own recurrence."""
    process = SMOOTH["VP"]
    at = Interval(process, wide(0.5), wide(0.4), integrand)
    start, h = float(at.start), float(at.h)
    r = [1.0, -0.8, -1.9][: points - 1]
    values = torch.randn(points, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = [
        Evaluation(at.t, wide(start + h * each), v[None], v[None]) for each, v in zip((0, *r), values, strict=True)
    ]
    sampler = UniPC(variant=variant, integrand=integrand)
    found = sum(weight * difference[0] for weight, difference in sampler._terms(at, known))
    z = -h if integrand == "data" else h
    B = z if variant == "bh1" else float(torch.expm1(wide(z)))
    phi, rows, right = float(torch.expm1(wide(z))) / z - 1.0, [], []
    factorial = 1
    for n in range(1, points):
        rows.append([each ** (n - 1) for each in r])
        right.append(phi * factorial / B)
        factorial *= n + 1
        phi = phi / z - 1.0 / factorial
    a = [0.5] if points == 2 else torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), wide(*right)).tolist()
    expected = sum(B / z * w * (v - values[0]) / each for w, v, each in zip(a, values[1:], r, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Orders


@each_order
@each_process
def test_with_an_exact_start_of_its_history_it_has_the_correctors_order(name, p):
    """UniC adds one to UniP's, for both predictions and variants; of p = 3 so few steps show at least p."""
    least = p + 1 - 0.25 if p < 3 else p - 0.25
    assert order_of(partial(UniPC, order=p), name, 40, exact=p) >= least
    if name == "VP":
        for variant, integrand in (("bh1", "data"), ("bh1", "noise"), ("bh2", "noise")):
            make = partial(UniPC, order=p, variant=variant, integrand=integrand)
            assert order_of(make, name, 30, exact=p) >= least


@each_order
@each_process
def test_with_its_own_first_steps_it_has_order_2_at_least(name, p):
    assert order_of(partial(UniPC, order=p), name, 40) >= 2 - 0.25


# The steps


def test_a_step_takes_one_evaluation_and_the_last_is_not_corrected():
    process, orders = SMOOTH["VP"], []
    denoiser = ExactDenoiser(MIXTURE, process)

    class Noted(UniPC):
        def extrapolated(self, run, x, at, points):
            orders.append(("p", len(points)))
            return super().extrapolated(run, x, at, points)

        def corrected(self, last, now):
            orders.append(("c", last.order))
            return super().corrected(last, now)

    made = Noted(5).sample(denoiser, noise_of(2))
    assert made.evaluations == 5
    predicted = [1, 2, 3, 2, 1]
    expected = [("p", 1)]
    for before, now in pairwise(predicted):
        expected += [("c", before), ("p", now)]
    assert orders == expected


def test_what_another_sampler_does_between_the_steps_stays():
    """The correction is a difference: a shift of the state in between is in the next one whole."""
    process = SMOOTH["VP"]
    denoiser = ExactDenoiser(MIXTURE, process)
    plan, sampler = UniPC(20).plan(process), UniPC(20)
    moved = [sampler.sample(denoiser, noise_of(20, dtype=torch.float64), start=X).x]

    class Shifted(UniPC):
        def step(self, run, x, move):
            return super().step(run, x, move) + (0.5 if move.t == plan[10].t else 0.0)

    moved.append(Shifted(20).sample(denoiser, noise_of(20, dtype=torch.float64), start=X).x)
    assert float((moved[1] - moved[0]).abs().mean()) > 0.1
    corrected = PredictorCorrector(UniPC(60), snr=0.1).sample(ExactDenoiser(MIXTURE, VP()), noise_of(2000)).x.double()
    assert float((corrected.mean(0) - MIXTURE.mean()).norm()) < 0.15
    assert float((torch.cov(corrected.T) - MIXTURE.covariance()).norm() / MIXTURE.covariance().norm()) < 0.15


@each_prediction
def test_out_of_pure_noise_it_is_finite_and_near(integrand):
    process = Flow(1e-4, 1e-4)
    denoiser = ExactDenoiser(MIXTURE, process)
    x = noise_of(20, dtype=torch.float64).normal()
    few, many = (UniPC(steps, integrand=integrand).sample(denoiser, None, start=x).x for steps in (40, 160))
    assert float((few - many).norm(dim=1).median()) < 0.01


def test_bad_settings_are_refused_in_one_line():
    for keys, words in (
        ({"order": 4}, "order is 4; UniPC's is 1, 2 or 3"),
        ({"variant": "bh3"}, "variant is 'bh3'; choose one of bh1, bh2"),
        ({"integrand": "x0"}, "integrand is 'x0'; choose one of data, noise"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            UniPC(**keys)
        assert "\n" not in str(caught.value)


# Diffusers


@each_order
@each_variant
@each_prediction
def test_diffusers_agrees(p, variant, integrand):
    """It lowers the order of the last steps however many there are: in 20 steps both are asked not to."""
    module = pytest.importorskip("diffusers.schedulers")
    for steps in (8, 20):
        scheduler = module.UniPCMultistepScheduler(
            1000,
            1e-4,
            0.02,
            solver_order=p,
            predict_x0=integrand == "data",
            solver_type=variant,
            lower_order_final=steps < 15,
            final_sigmas_type="sigma_min",
        )
        assert against(scheduler, UniPC(steps, p, variant, integrand, clip_x0=None, large_steps="allow"), steps) < 1e-4
