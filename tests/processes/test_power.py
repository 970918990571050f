"""The process whose noise level is a power of time, and its laws of t, in closed form."""

import math

import pytest
import torch
from helpers.laws import wide
from scipy.integrate import solve_ivp

from lit_diffusion.errors import UserError
from lit_diffusion.objectives import Importance, LogUniform
from lit_diffusion.processes import VE, VP, Flow, PowerVE

PROCESSES = {"EDM": PowerVE(), "VE": PowerVE(0.02, 100.0, 0.5), "cubic": PowerVE(0.01, 5.0, 3.0)}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process):
    return process.t_min ** torch.linspace(1.0, 0.0, 40, dtype=torch.float64)


@each_process
def test_its_levels_are_a_power_of_time_from_sigma_min_to_sigma_max(process):
    t = times(process)
    torch.testing.assert_close(process.sigma(t), process.sigma_max * t**process.power, rtol=1e-14, atol=0)
    assert process.sigma(wide(0.0, process.t_min, 1.0)).tolist() == pytest.approx(
        [0.0, process.sigma_min, process.sigma_max], rel=1e-12
    )
    assert process.prior_std == process.sigma_max
    assert (process.t_min, process.t_max) == (process.t_min_sampling, 1.0)
    assert torch.equal(process.alpha(t), torch.ones(40).double())
    assert torch.equal(process.dalpha(t), torch.zeros(40).double())
    torch.testing.assert_close(process.t_at_log_snr(process.log_snr(t)), t, rtol=1e-11, atol=0)
    for sigma in (process.sigma_min, 0.3, process.sigma_max):
        assert float(process.sigma(wide(process.t_at_sigma(sigma)))) == pytest.approx(sigma, rel=1e-9)


@each_process
def test_its_derivative_and_its_diffusion_are_those_of_its_variance(process):
    t = times(process).requires_grad_()
    (slope,) = torch.autograd.grad(process.sigma(t).sum(), t)
    torch.testing.assert_close(process.dsigma(t), slope, rtol=1e-12, atol=0)
    t = t.detach()
    # g^2 = d sigma^2 / dt; where time is the variance it is constant.
    g2 = 2 * process.power * process.sigma_max**2 * t ** (2 * process.power - 1)
    torch.testing.assert_close(process.diffusion(t) ** 2, g2, rtol=1e-12, atol=0)
    assert torch.equal(process.drift(t), torch.zeros(40).double())
    ends = (process.t_min, 1.0)
    found = solve_ivp(lambda u, v: [float(process.diffusion(wide(u))) ** 2], ends, [process.sigma_min**2], rtol=1e-10)
    assert found.y[0, -1] == pytest.approx(process.sigma_max**2, rel=1e-7)


def test_the_exponents_of_the_papers_columns():
    """EDM: sigma(t) = t; VE: sigma(t) = sqrt(t). Their time is this one times that of sigma_max."""
    t = times(PROCESSES["EDM"])
    torch.testing.assert_close(PROCESSES["EDM"].sigma(t), 80.0 * t)
    torch.testing.assert_close(PROCESSES["VE"].sigma(t), (100.0**2 * t).sqrt())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sigma_min": 0.0}, ["sigma_min 0 and sigma_max 80", "0 < sigma_min < sigma_max"]),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, ["sigma_min 2 and sigma_max 1"]),
        ({"sigma_max": math.inf}, ["sigma_max inf"]),
        ({"power": 0.0}, ["power is 0", "positive"]),
        ({"power": math.nan}, ["power is nan"]),
        ({"power": 0.1}, ["power is 0.1", "raise power"]),
    ],
)
def test_what_it_cannot_be_is_refused_in_one_line(keys, words):
    with pytest.raises(UserError) as caught:
        PowerVE(**keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("process", [*PROCESSES.values(), VE(0.01, 5.0), VP()], ids=[*PROCESSES, "VE, log", "VP"])
def test_a_log_uniform_law_is_uniform_in_the_log_snr_and_makes_up_for_nothing(process):
    u = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    t, density = LogUniform().draw(u, process)
    steps = process.log_snr(t).diff()
    assert density is None
    assert (float(t[0]), float(t[-1])) == (pytest.approx(process.t_min, rel=1e-9), pytest.approx(1.0, rel=1e-9))
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-7, atol=0)
    LogUniform().check(process)
    assert torch.equal(t, Importance().draw(u, process)[0])


def test_a_log_uniform_law_needs_finite_levels():
    with pytest.raises(UserError, match=r"log_uniform .* infinite at the end of time of Flow: set its t_max"):
        LogUniform().check(Flow())
    LogUniform().check(Flow(t_max=0.99))
