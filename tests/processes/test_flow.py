"""A process whose alpha is 0 at its largest time: every limit is finite or infinite, and none is NaN."""

import math

import pytest
import torch
from helpers.laws import GAUSSIAN, MIXTURE, noise_of, wide

from lit_diffusion.denoisers import Prediction
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Flow
from lit_diffusion.reverse import ReverseChain

FLOW = Flow()
T = torch.cat((wide(FLOW.t_min, 1e-3, 0.02), torch.linspace(0.1, 1.0, 10).double()))
VIEWS = ("x0", "eps", "score", "velocity")


def test_it_is_azulas():
    noise = pytest.importorskip("azula.noise")
    alpha, sigma = noise.RectifiedSchedule(alpha_min=1e-9, sigma_min=1e-9)(T)
    torch.testing.assert_close(FLOW.alpha(T), alpha, rtol=0, atol=1e-8)
    torch.testing.assert_close(FLOW.sigma(T), sigma, rtol=0, atol=1e-8)


def test_its_sde_and_its_log_snr_are_infinite_at_1_and_right_below():
    below = T[:-1]
    torch.testing.assert_close(FLOW.drift(below), -1 / (1 - below), rtol=1e-12, atol=0)
    torch.testing.assert_close(FLOW.diffusion(below), (2 * below / (1 - below)).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(FLOW.log_snr(below), 2 * torch.log((1 - below) / below), rtol=1e-12, atol=1e-12)
    one = wide(1.0)
    assert float(FLOW.log_alpha(one)) == float(FLOW.log_snr(one)) == float(FLOW.drift(one)) == -math.inf
    assert float(FLOW.diffusion(one)) == math.inf
    assert FLOW.t_at_log_snr(wide(-math.inf, math.inf)).tolist() == [1.0, 0.0]
    assert FLOW.t_at_sigma(math.inf) == 1.0
    assert FLOW.t_at_sigma(3.0) == pytest.approx(0.75, rel=1e-12)
    with pytest.raises(UserError, match=r"levels run from 1\.00001e-05 \(at its smallest time\) to inf"):
        FLOW.t_at_sigma(1e-6)


@pytest.mark.parametrize("s", [0.0, 1e-5, 0.3, 0.999])
def test_a_step_from_1_begins_anew(s):
    step = FLOW.transition(wide(s), wide(1.0))
    expected = {"scale": 0.0, "beta": 1.0, "x0_coefficient": 1.0 - s, "xt_coefficient": 0.0, "beta_tilde": s**2}
    assert {name: float(value) for name, value in vars(step).items()} == pytest.approx(expected, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("distribution", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_view_is_right_from_the_smallest_time_to_1(distribution, dtype):
    z = noise_of(len(T), dtype=torch.float64)
    x0 = distribution.sample(z.normal(), z.uniform(()))
    x_t = FLOW.perturb(x0, T, z.normal()).to(dtype)
    found = ExactDenoiser(distribution, FLOW)(x_t, T)
    _, score, mean = distribution.posterior(x_t, FLOW.alpha(T), FLOW.sigma(T))
    eps = -T[:, None] * score
    truth = {"x0": mean, "eps": eps, "score": score, "velocity": eps - mean}
    for view, value in truth.items():
        error = (getattr(found, view).double() - value).abs().amax(1) / value.abs().amax(1)
        assert float(error.max()) < (1e-5 if dtype == torch.float32 else 1e-10), view
    # Of pure noise nothing is known but the law of the data.
    torch.testing.assert_close(found.x0[-1].double(), distribution.mean(), rtol=1e-6, atol=1e-6)
    if distribution is GAUSSIAN:
        for row, t in enumerate(T.tolist()):
            expected = GAUSSIAN.posterior_mean(FLOW, x_t[row : row + 1].double(), t)[0]
            torch.testing.assert_close(mean[row], expected, rtol=1e-9, atol=1e-9)


def test_the_first_order_step_is_the_straight_line_also_from_1():
    x_t, x0 = noise_of(len(T), dtype=torch.float64).normal(), noise_of(len(T), 1, dtype=torch.float64).normal()
    s = 0.4 * T
    prediction = Prediction.from_x0(x_t, FLOW.coefficients(T), x0)
    moved = FLOW.first_order_step(x_t, x0, T, s)
    torch.testing.assert_close(moved, x_t + (s - T)[:, None] * prediction.velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved[-1], 0.4 * x_t[-1] + 0.6 * x0[-1])


@pytest.mark.parametrize("process", [Flow(), VP(), VE(0.3, 2.0)], ids=["Flow", "VP", "VE"])
def test_first_order_steps_converge_to_the_ode_at_order_1(process):
    x = noise_of(5, dtype=torch.float64).normal()
    goal, denoiser, errors = GAUSSIAN.flow(process, x, 1.0, 0.1), ExactDenoiser(GAUSSIAN, process), []
    for steps in (64, 128):
        state, times = x, torch.linspace(1.0, 0.1, steps + 1).double()
        for t, s in zip(times[:-1].expand(5, -1).T, times[1:].expand(5, -1).T, strict=True):
            state = process.first_order_step(state, denoiser(state, t).x0, t, s)
        errors.append(float((state - goal).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_reverse_chain_begins_at_1_and_ends_at_the_data(variance):
    x_t, denoiser = noise_of(3, dtype=torch.float64).normal(), ExactDenoiser(MIXTURE, FLOW)
    t, s = wide(1.0, 0.5, 1.0), wide(0.5, 0.0, 0.0)
    prediction, step, chain = denoiser(x_t, t), FLOW.transition(s, t), ReverseChain(variance, None)
    mean = chain.mean(prediction, denoiser, step)
    expected = torch.stack((0.5 * prediction.x0[0], prediction.x0[1], prediction.x0[2]))
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    found = chain.log_variance(prediction, denoiser, step, s).exp().flatten().tolist()
    # The decoder of a chain of two steps has the first step's own; that of a chain of one step has beta.
    assert found == pytest.approx([1.0, 0.25, 1.0] if variance == "beta" else [0.25, 0.25, 1.0], rel=1e-9)


def test_a_largest_time_below_1_leaves_some_signal():
    process = Flow(t_max=0.99)
    assert process.prior_std == 0.99
    assert process.t_at_sigma(99.0) == pytest.approx(0.99, rel=1e-9)
    with pytest.raises(UserError, match=r"to 99$"):
        process.t_at_sigma(100.0)
    process.require_time("t_end", 0.9)
    with pytest.raises(UserError, match=r"from 1e-05, to 0\.99: give one of them below 0\.99"):
        process.require_time("t_end", 0.995)
    level = process.coefficients(wide(0.99))
    prediction = Prediction.from_eps(torch.ones(1, 2).double(), level, torch.zeros(1, 2).double())
    assert all(bool(getattr(prediction, view).isfinite().all()) for view in VIEWS)
