import itertools
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm

from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, SubVP, cosine_betas, expand_like, linear_betas

PROCESSES = {
    "VE": VE(0.01, 50.0),
    "VE10": VE(0.01, 1.0, num_timesteps=10),
    "VE232": VE(0.01, 50.0, num_timesteps=232),
    "VP": VP(),
    "SubVP": SubVP(),
    "Flow": Flow(),
    "linear": Betas(linear_betas()),
    "cosine": Betas(cosine_betas()),
    "few": Betas(linear_betas(20, 0.01, 0.4)),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def inside_times(process):
    """Times off the grid: a process given by betas has a kink at each of its points."""
    if process.num_timesteps is None:
        return torch.cat((torch.logspace(-5, -1, 20, dtype=torch.float64), torch.linspace(0.11, 0.999, 40).double()))
    return (torch.arange(process.num_timesteps, dtype=torch.float64) + 0.37) / process.num_timesteps


@every_process
def test_derivatives_against_central_differences(process):
    t = inside_times(process)
    h = (3e-4 * t).clamp(max=3e-7)
    for value, derivative in ((process.log_alpha, process.dlog_alpha), (process.sigma, process.dsigma)):
        difference = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), difference, rtol=2e-6, atol=1e-7)
    level = process.coefficients(t)
    assert torch.equal(level.dsigma, process.dsigma(t))
    difference = (process.alpha(t + h) - process.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(level.dalpha, difference, rtol=2e-6, atol=1e-7)


@every_process
def test_derivatives_against_autograd(process):
    t = inside_times(process).requires_grad_()
    if process.log_alpha(t).requires_grad:
        (slope,) = torch.autograd.grad(process.log_alpha(t).sum(), t)
        torch.testing.assert_close(process.dlog_alpha(t), slope, rtol=1e-10, atol=1e-12)
    else:
        assert isinstance(process, VE)
    (slope,) = torch.autograd.grad(process.sigma(t).sum(), t)
    torch.testing.assert_close(process.dsigma(t), slope, rtol=1e-9, atol=1e-12)


# In float64 (i / 41) * 41 exceeds i four times: the times of a grid are rounded to either side of its points.
@pytest.mark.parametrize("process", [*map(PROCESSES.get, ("linear", "cosine", "few")), Betas(linear_betas(41))])
def test_at_a_grid_point_of_betas_the_derivative_is_that_of_the_cell_which_ends_there(process):
    t = process.grid()
    inside = t - 0.3 / process.num_timesteps
    assert torch.allclose(process.dlog_alpha(t), process.dlog_alpha(inside), rtol=1e-12, atol=0)
    slope = (process.log_alpha(t) - process.log_alpha(inside)) / (t - inside)
    torch.testing.assert_close(process.dlog_alpha(t), slope, rtol=1e-9, atol=1e-12)


@every_process
def test_drift_and_diffusion_reproduce_the_moments(process):
    """The mean and the variance of dx = f x dt + g dw solve m' = f m and V' = 2 f V + g^2."""

    def slopes(t, state):
        time = tensor(t)
        f, g = float(process.drift(time)), float(process.diffusion(time))
        return [f * state[0], 2 * f * state[1] + g * g]

    start = 1e-12
    # VE jumps from 0 to its smallest level at 0+; the others start from the data.
    variance = float(process.sigma(tensor(start))) ** 2 if isinstance(process, VE) else 0.0
    state = [1.0, variance]
    if isinstance(process, Betas):  # Smooth within a cell only.
        knots = [0.0, *process.grid().tolist()][: 1 + min(40, process.num_timesteps)]
        start = 1e-8 / process.num_timesteps  # A time nearer to a grid point than that is the grid point.
    else:
        # f and g of a flow are infinite at 1, where alpha is 0.
        knots = [0.0, 1e-4, 0.01, 0.2, 0.5, 0.9, 0.999 if isinstance(process, Flow) else 1.0]
    for before, after in itertools.pairwise(knots):
        solution = solve_ivp(slopes, (before + start, after), state, rtol=1e-9, atol=1e-14)
        state = solution.y[:, -1].tolist()
        assert state[0] == pytest.approx(float(process.alpha(tensor(after))), rel=1e-6)
        assert math.sqrt(state[1]) == pytest.approx(float(process.sigma(tensor(after))), rel=1e-6)


def test_diffusion_is_that_of_the_papers():
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    integral = 0.1 * t + 19.9 * t**2 / 2
    torch.testing.assert_close(VP().diffusion(t), beta.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(SubVP().diffusion(t), (beta * (1 - torch.exp(-2 * integral))).sqrt(), rtol=1e-10, atol=0)
    ve = 0.01 * 5000**t * math.sqrt(2 * math.log(5000))
    torch.testing.assert_close(VE(0.01, 50.0).diffusion(t), ve, rtol=1e-10, atol=0)
    torch.testing.assert_close(VP().drift(t), -beta / 2, rtol=1e-12, atol=0)
    assert torch.equal(VE(0.01, 50.0).drift(t), torch.zeros_like(t))


def test_kernels_are_those_of_the_papers():
    t = torch.linspace(0.001, 1.0, 50, dtype=torch.float64)
    kept = torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
    for process, sigma in ((VP(), (1 - kept).sqrt()), (SubVP(), 1 - kept)):
        torch.testing.assert_close(process.alpha(t), kept.sqrt(), rtol=1e-12, atol=0)
        torch.testing.assert_close(process.sigma(t), sigma, rtol=1e-10, atol=0)
    assert bool((SubVP().sigma(t) <= VP().sigma(t)).all())


@every_process
def test_the_inverse_of_the_log_snr(process):
    t = torch.cat((torch.logspace(-9, -2, 100, dtype=torch.float64), torch.linspace(0.011, 1, 1000).double()))
    log_snr = process.log_snr(t)
    torch.testing.assert_close(log_snr, torch.log(process.alpha(t) ** 2 / process.sigma(t) ** 2), rtol=1e-6, atol=1e-6)
    assert bool((log_snr.diff() < 0).all())
    assert float((process.t_at_log_snr(log_snr) - t).abs().max()) < 1e-9
    grid = process.grid() if process.num_timesteps else inside_times(process)
    assert float((process.t_at_log_snr(process.log_snr(grid)) - grid).abs().max()) < 1e-9


@every_process
def test_t_at_sigma(process):
    for t in (process.t_min, 0.3, 1.0):
        ratio = float(process.sigma(tensor(t)) / process.alpha(tensor(t)))
        assert process.t_at_sigma(ratio) == pytest.approx(t, abs=1e-9)
        assert process.t_at_sigma(ratio) <= 1.0
    top = float(process.sigma(tensor(1.0)) / process.alpha(tensor(1.0)))
    for sigma in (1.01 * top, 1e9, 0.0, -1.0, float("nan")):
        if 0.0 < sigma <= top:  # A flow has every ratio.
            continue
        with pytest.raises(UserError, match="outside this process") as caught:
            process.t_at_sigma(sigma)
        message = str(caught.value)
        assert message.startswith(f"noise level {sigma:g} is")
        assert message.endswith(f" to {top:g}")
        assert "\n" not in message


def test_t_at_sigma_at_the_ends_of_variance_exploding():
    # In continuous time the smallest level is the limit at 0+; the time must still be one that has it.
    for low, high in ((0.01, 50.0), (0.002, 80.0), (0.1, 7.3)):
        process = VE(low, high)
        t = process.t_at_sigma(low)
        assert 0 < t < 1e-9
        assert float(process.sigma(tensor(t))) == pytest.approx(low, rel=1e-9)
        with pytest.raises(UserError, match="outside this process"):
            process.t_at_sigma(0.9 * low)
    single = VE(0.3, 0.3, num_timesteps=1)
    assert single.t_at_sigma(0.3) == 1.0
    with pytest.raises(UserError, match=r"noise level 0\.5 is outside"):
        single.t_at_sigma(0.5)


@pytest.mark.parametrize(
    ("low", "high", "levels"), [(0.01, 1.0, 10), (0.01, 50.0, 232), (0.01, 50.0, 2), (1.0, 20.0, 10)]
)
def test_the_levels_of_ncsn_are_geometric(low, high, levels):
    getcontext().prec = 50
    ratio = Decimal(high) / Decimal(low)
    process = VE(low, high, levels)
    sigma = process.sigma(process.grid())
    for i in range(1, levels + 1):
        exact = Decimal(low) * ((ratio.ln() * (i - 1)) / (levels - 1)).exp()
        assert abs(float(Decimal(sigma[i - 1].item()) / exact - 1)) < 1e-14
    assert float(sigma[-1]) == high
    assert process.t_min == 1.0 / levels
    assert process.prior_std == high


def test_continuous_variance_exploding():
    process = VE(0.01, 50.0)
    t = tensor(1e-9, 0.25, 0.5, 1.0)
    torch.testing.assert_close(process.sigma(t), 0.01 * 5000.0**t, rtol=1e-13, atol=0)
    assert float(VE(0.2, 0.2, num_timesteps=1).sigma(tensor(1.0))) == 0.2


def alpha_bar_of_numpy(name, levels):
    if name == "linear":
        betas = np.linspace(1e-4, 0.02, levels)
    else:
        f = np.cos((np.arange(levels + 1) / levels + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - (f / f[0])[1:] / (f / f[0])[:-1], 0.999)
    return betas, np.cumprod(1.0 - betas)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("levels", [1000, 4000, 37])
def test_ddpms_tables_are_exact_on_the_grid(name, levels):
    betas = {"linear": linear_betas, "cosine": cosine_betas}[name](levels)
    process = Betas(betas)
    expected_betas, alpha_bar = alpha_bar_of_numpy(name, levels)
    t = process.grid()
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas.numpy(), expected_betas, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(process.alpha(t).numpy() ** 2, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t).numpy() ** 2, 1 - alpha_bar, rtol=1e-11)
    # Multiplying and dividing by T, or dividing as float, makes no difference at a point.
    for i in range(1, levels + 1, 7):
        assert torch.equal(process.alpha(tensor(i / levels)), process.alpha(t[i - 1 : i]))
    # Between the points log alpha-bar is linear.
    middle = (t[:-1] + t[1:]) / 2
    np.testing.assert_allclose(
        2 * process.log_alpha(middle).numpy(), (np.log(alpha_bar[:-1]) + np.log(alpha_bar[1:])) / 2, rtol=1e-9
    )
    np.testing.assert_allclose(process.log_alpha(tensor(0.5 / levels)).numpy(), np.log1p(-expected_betas[:1]) / 4)


def test_the_first_and_last_betas():
    assert linear_betas()[[0, -1]].tolist() == [1e-4, 0.02]
    assert float(cosine_betas()[-1]) == 0.999
    assert float(cosine_betas()[-2]) < 0.999
    # beta_1 = 1 - cos^2(pi/2 (1/T + s)/(1 + s)) / cos^2(pi/2 s/(1 + s)), by sin(a + b) sin(a - b).
    a, b = math.pi / 2 * 0.009 / 1.008, math.pi / 2 * 0.008 / 1.008
    assert float(cosine_betas()[0]) == pytest.approx(math.sin(a + b) * math.sin(a - b) / math.cos(b) ** 2, rel=1e-10)


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_diffusers_agrees(name, theirs):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    scheduler = scheduling.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    process = PROCESSES[name]
    # Theirs is a product of a thousand numbers in float32.
    np.testing.assert_allclose(
        process.alpha(process.grid()).numpy() ** 2, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4
    )
    np.testing.assert_allclose(
        process.alpha(process.grid()).numpy()[:100] ** 2, scheduler.alphas_cumprod.double().numpy()[:100], rtol=2e-6
    )


@every_process
def test_at_time_0_there_are_the_data(process):
    zero = torch.zeros(3)
    assert process.sigma(zero).tolist() == [0.0] * 3
    assert process.alpha(zero).tolist() == [1.0] * 3
    x = torch.randn(3, 2)
    assert torch.equal(process.perturb(x, zero, torch.randn(3, 2)), x)


@every_process
def test_the_prior_is_nearly_the_law_at_time_1(process):
    assert process.prior_std == (process.sigma_max if isinstance(process, VE) else 1.0)
    # Of data with variance 1, unless the variance explodes.
    variance = process.sigma(tensor(1.0)) ** 2
    if not isinstance(process, VE):
        variance = variance + process.alpha(tensor(1.0)) ** 2
    assert process.prior_std == pytest.approx(float(variance.sqrt()), rel=1e-4)


@every_process
def test_the_priors_density_is_scipys(process):
    generator = torch.Generator().manual_seed(0)
    x = process.prior_std * torch.randn(5, 2, 3, 4, generator=generator)
    expected = norm(scale=process.prior_std).logpdf(x.double().numpy()).sum((1, 2, 3))
    log_prob = process.prior_log_prob(x)
    assert log_prob.dtype == torch.float64
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-12)


def exact_steps(betas):
    """DDPM's posterior of each step, with 1 - abar by v -> (1 - beta) v + beta, which cancels no digits."""
    betas = betas.numpy()
    kept = np.cumprod(1.0 - betas)
    before, noise = np.append(1.0, kept[:-1]), [0.0]
    for beta in betas:
        noise.append((1.0 - beta) * noise[-1] + beta)
    at_s, at_t = np.array(noise[:-1]), np.array(noise[1:])
    return {
        "scale": np.sqrt(1.0 - betas),
        "beta": betas,
        "x0_coefficient": np.sqrt(before) * betas / at_t,
        "xt_coefficient": np.sqrt(1.0 - betas) * at_s / at_t,
        "beta_tilde": at_s / at_t * betas,
    }


@pytest.mark.parametrize("betas", [linear_betas(), cosine_betas(), linear_betas(20, 0.01, 0.4)], ids=["l", "c", "few"])
def test_transitions_between_neighbours_are_ddpms_tables(betas):
    process = Betas(betas)
    t = process.grid()
    step = process.transition(torch.cat((tensor(0.0), t[:-1])), t)
    for name, expected in exact_steps(betas).items():
        np.testing.assert_allclose(getattr(step, name).numpy(), expected, rtol=1e-12, err_msg=name)


def three_times(process):
    """Times ``r < s < t``, near to each other and far."""
    if process.num_timesteps is None:
        return tensor(1e-4, 0.01, 0.3, 0.3, 0.9), tensor(0.01, 0.02, 0.3001, 0.6, 0.99), tensor(0.4, 0.9, 0.302, 0.9, 1)
    return tensor(1, 1, 7, 2, 18) / 20, tensor(2, 10, 8, 12, 19) / 20, tensor(3, 20, 9, 20, 20) / 20


@every_process
def test_two_transitions_are_the_transition_of_both(process):
    r, s, t = three_times(process)
    first, second, both = process.transition(r, s), process.transition(s, t), process.transition(r, t)
    torch.testing.assert_close(both.scale, first.scale * second.scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(both.beta, second.scale**2 * first.beta + second.beta, rtol=1e-10, atol=0)
    # q(x_r | x_t, x_0) by way of x_s.
    torch.testing.assert_close(both.xt_coefficient, first.xt_coefficient * second.xt_coefficient, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        both.x0_coefficient, first.x0_coefficient + first.xt_coefficient * second.x0_coefficient, rtol=1e-10, atol=0
    )
    beta_tilde = first.beta_tilde + first.xt_coefficient**2 * second.beta_tilde
    torch.testing.assert_close(both.beta_tilde, beta_tilde, rtol=1e-10, atol=0)


@every_process
def test_a_transition_leads_from_marginal_to_marginal(process):
    s, t, _ = three_times(process)
    step = process.transition(s, t)
    torch.testing.assert_close(step.scale * process.alpha(s), process.alpha(t), rtol=1e-12, atol=0)
    variance = step.scale**2 * process.sigma(s) ** 2 + step.beta
    torch.testing.assert_close(variance, process.sigma(t) ** 2, rtol=1e-10, atol=0)


@every_process
def test_the_posterior_of_a_transition_is_bayes(process):
    s, t, _ = three_times(process)
    step = process.transition(s, t)
    alpha, variance = process.alpha(s), process.sigma(s) ** 2
    # Precisions add: of x_s given x_0, and of x_s given x_t.
    precision = 1 / variance + step.scale**2 / step.beta
    torch.testing.assert_close(step.beta_tilde, 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.x0_coefficient, alpha / variance / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.xt_coefficient, step.scale / step.beta / precision, rtol=1e-9, atol=0)


@every_process
def test_a_transition_from_0_starts_at_the_data(process):
    t = tensor(process.t_min, 0.5, 1.0)
    step = process.transition(torch.zeros(3), t)
    torch.testing.assert_close(step.scale, process.alpha(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(step.beta, process.sigma(t) ** 2, rtol=1e-14, atol=0)
    assert step.x0_coefficient.tolist() == [1.0] * 3
    assert step.xt_coefficient.tolist() == step.beta_tilde.tolist() == [0.0] * 3
    assert {value.dtype for value in vars(step).values()} == {torch.float64}


def test_a_grid_begins_at_its_first_point():
    for process in (Betas(linear_betas(50)), VE(0.1, 1.0, num_timesteps=50, t_min=1e-3, t_min_sampling=1e-4)):
        assert process.t_min == process.t_min_sampling == 1 / 50
    process = VP(t_min=1e-4, t_min_sampling=0.01)
    assert (process.t_min, process.t_min_sampling) == (1e-4, 0.01)
    assert (SubVP().t_min, SubVP().t_min_sampling) == (1e-5, 1e-3)


@every_process
def test_coefficients_are_float64_whatever_the_time_is(process):
    single, double = torch.tensor([0.25, 0.5, 1.0]), tensor(0.25, 0.5, 1.0)
    level, exact = process.coefficients(single), process.coefficients(double)
    for name in ("t", "alpha", "sigma", "dalpha", "dsigma"):
        assert getattr(level, name).dtype == torch.float64
        assert torch.equal(getattr(level, name), getattr(exact, name))
    assert process.log_snr(single).dtype == process.diffusion(single).dtype == torch.float64


@every_process
def test_perturb_has_the_mean_and_the_deviation_of_its_row(process):
    t = tensor(process.t_min, 0.4, 1.0)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(3, 100_000, generator=generator, dtype=torch.float64)
    x0 = tensor(2.0, -3.0, 0.5)[:, None].expand(3, 100_000)
    x_t = process.perturb(x0, t, eps)
    alpha, sigma = process.alpha(t), process.sigma(t)
    standard_error = sigma / 100_000**0.5
    assert bool(((x_t.mean(1) - alpha * x0[:, 0]).abs() < 4 * standard_error).all())
    assert bool(((x_t.std(1) / sigma - 1).abs() < 4 / 200_000**0.5).all())
    assert process.perturb(x0.float(), t, eps.float()).dtype == torch.float32


def test_perturb_broadcasts_over_images():
    process = VP()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 5, generator=generator)
    t = tensor(0.1, 0.2, 0.5, 1.0)
    x_t = process.perturb(x0, t, eps)
    for n in range(4):
        kept = math.exp(-(0.1 * t[n] + 19.9 * t[n] ** 2 / 2))
        torch.testing.assert_close(x_t[n], math.sqrt(kept) * x0[n] + math.sqrt(1 - kept) * eps[n])
    assert expand_like(t, x0).shape == (4, 1, 1, 1)
    assert expand_like(t, x0).dtype == torch.float32
    assert expand_like(t, t).shape == (4,)


@every_process
def test_level_index(process):
    if process.num_timesteps is None:
        with pytest.raises(UserError, match="'index' needs a process with num_timesteps"):
            process.level_index(tensor(0.5))
        with pytest.raises(UserError, match="give the number of timesteps"):
            process.grid()
        return
    grid = process.grid()
    assert grid.dtype == torch.float64
    assert (len(grid), float(grid[-1])) == (process.num_timesteps, 1.0)
    assert bool((grid.diff() > 0).all())
    index = torch.arange(process.num_timesteps)
    for shift in (0.0, 0.4, -0.4):
        inside = (grid + shift / process.num_timesteps).clamp(max=1.0)
        assert torch.equal(process.level_index(inside), index)
    assert torch.equal(process.level_index(grid.float()), index)
    # Below the first point there is no index -1.
    assert process.level_index(tensor(1e-9, 0.3 / process.num_timesteps)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VE(0.0, 1.0), ["sigma_min 0", "sigma_max 1"]),
        (lambda: VE(-1.0, 1.0), ["sigma_min -1", "sigma_max 1"]),
        (lambda: VE(2.0, 1.0), ["sigma_min 2", "sigma_max 1"]),
        (lambda: VE(1.0, 1.0), ["sigma_min 1", "sigma_max 1"]),
        (lambda: VE(1.0, 1.0, num_timesteps=10), ["sigma_min 1", "sigma_max 1"]),
        (lambda: VE(0.01, float("nan")), ["sigma_max nan"]),
        (lambda: VE(0.1, 1.0, num_timesteps=1), ["one noise level", "sigma_min", "sigma_max"]),
        (lambda: VE(0.1, 1.0, num_timesteps=0), ["num_timesteps is 0"]),
        (lambda: VE(0.1, 1.0, t_min=0.0), ["t_min is 0"]),
        (lambda: VP(t_min=-0.1), ["t_min is -0.1"]),
        (lambda: VE(0.1, 1.0, t_min_sampling=0.0), ["t_min_sampling is 0"]),
        (lambda: VP(t_min_sampling=1.0), ["t_min_sampling is 1"]),
        (lambda: SubVP(t_min_sampling=-1e-3), ["t_min_sampling is -0.001"]),
        (lambda: VP(t_min_sampling=float("nan")), ["t_min_sampling is nan"]),
        (lambda: VP(t_min=1.0), ["t_min is 1"]),
        (lambda: Flow(t_max=0.0), ["t_max is 0"]),
        (lambda: Flow(t_max=1.5), ["t_max is 1.5"]),
        (lambda: Flow(t_max=float("nan")), ["t_max is nan"]),
        (lambda: Flow(t_min_sampling=0.5, t_max=0.4), ["t_max is 0.4", "t_min_sampling 0.5"]),
        (lambda: VP(0.0, 20.0), ["beta_min 0", "beta_max 20"]),
        (lambda: SubVP(20.0, 0.1), ["beta_min 20", "beta_max 0.1"]),
        (lambda: Betas(tensor(0.1, 1.0)), ["every beta", "between 0 and 1"]),
        (lambda: Betas(tensor(0.0, 0.1)), ["every beta", "between 0 and 1"]),
        (lambda: Betas(tensor(float("nan"))), ["every beta"]),
        (lambda: Betas(tensor()), ["num_timesteps is 0"]),
    ],
)
def test_what_is_no_process_is_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_process_has_no_state_in_checkpoints():
    # Betas' table follows from the configuration.
    assert all(not process.state_dict() for process in PROCESSES.values())
