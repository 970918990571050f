import math

import numpy as np
import pytest
import torch
from torch import nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers import C_NOISE, PARAMETRIZATIONS, NetworkDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VE, VP, Betas, Flow, SubVP, cosine_betas, linear_betas

PROCESSES = {
    "VE": VE(0.01, 50.0),
    "VE10": VE(0.01, 1.0, num_timesteps=10),
    "VP": VP(),
    "SubVP": SubVP(),
    "linear": Betas(linear_betas()),
    "cosine": Betas(cosine_betas()),
}
SIGMA_DATA = 0.7


class Answer(Backbone):
    """Whatever it is asked, it gives the answer it was made with, and remembers the question."""

    def __init__(self, answer, dtype=torch.float64):
        super().__init__()
        self.answer = answer
        self.parameter = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x, c_noise, cond=None):
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return self.answer


# The design's table, x0 = c_skip x_t + c_out F: (c_skip, c_out) from alpha, sigma and their derivatives.
TABLE = {
    "eps": lambda a, s, da, ds: (1 / a, -s / a),
    "score": lambda a, s, da, ds: (1 / a, s / a),
    "raw_score": lambda a, s, da, ds: (1 / a, s**2 / a),
    "x0": lambda a, s, da, ds: (0 * a, 1 + 0 * a),
    "v": lambda a, s, da, ds: (a / (a**2 + s**2), -s / (a**2 + s**2)),
    "velocity": lambda a, s, da, ds: (ds / (ds * a - s * da), -s / (ds * a - s * da)),
    "edm": lambda a, s, da, ds: (
        a * SIGMA_DATA**2 / (a**2 * SIGMA_DATA**2 + s**2),
        s * SIGMA_DATA / np.sqrt(a**2 * SIGMA_DATA**2 + s**2),
    ),
}


def mean_row(betas):
    """``mean`` on DDPM's grid, for every i = 1 .. T."""
    alphas = 1 - betas
    abar = np.cumprod(alphas)
    before = np.concatenate(([1.0], abar[:-1]))
    return -np.sqrt(alphas) * (1 - before) / (np.sqrt(before) * betas), (1 - abar) / (np.sqrt(before) * betas)


CASES = [(name, PROCESSES[process]) for name in TABLE for process in PROCESSES]
CASES += [("mean", PROCESSES["linear"]), ("mean", PROCESSES["cosine"])]
CASES += [(name, Flow()) for name in ("x0", "v", "velocity", "edm")]  # At t = 1, where alpha is 0, too.


def situation(name, process):
    """Known data and noise at every level, the output F that means them, and the truth of each view, float64."""
    if process.num_timesteps is None:
        t = torch.cat(
            (tensor(process.t_min), torch.logspace(-4.9, -1, 30).double(), torch.linspace(0.11, 1, 60).double())
        )
    else:
        t = process.grid()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(t), 6, generator=generator, dtype=torch.float64).numpy()
    x0 = SIGMA_DATA * x0
    a, s = process.alpha(t).numpy()[:, None], process.sigma(t).numpy()[:, None]
    da, ds = process.dalpha(t).numpy()[:, None], process.dsigma(t).numpy()[:, None]
    x_t = a * x0 + s * eps
    if name == "mean":
        betas = (linear_betas() if process is PROCESSES["linear"] else cosine_betas()).numpy()
        c_skip, c_out = (column[:, None] for column in mean_row(betas))
    else:
        c_skip, c_out = TABLE[name](a, s, da, ds)
    truth = {"x0": x0, "eps": eps, "score": -eps / s, "velocity": da * x0 + ds * eps}
    return t, x_t, (x0 - c_skip * x_t) / c_out, truth, (a, s)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def worst(value, truth):
    """The largest error of any level, relative to the largest value there."""
    value, truth = np.asarray(value, dtype=np.float64), np.asarray(truth)
    return (np.abs(value - truth).max(1) / np.abs(truth).max(1)).max()


def denoiser_for(answer, process, name, **options):
    options = {"c_noise": "time", "sigma_data": SIGMA_DATA, **options}
    return NetworkDenoiser(Answer(answer, answer.dtype), process, name, **options)


@pytest.mark.parametrize(("name", "process"), CASES)
def test_every_view_is_the_truth_at_every_level(name, process):
    t, x_t, raw, truth, (a, s) = situation(name, process)
    prediction = denoiser_for(torch.from_numpy(raw), process, name)(torch.from_numpy(x_t), t)
    for view, value in truth.items():
        assert getattr(prediction, view).dtype == torch.float64
        assert worst(getattr(prediction, view), value) < 1e-5, view
    # What is predicted explains what was seen.
    assert worst(a * prediction.x0.numpy() + s * prediction.eps.numpy(), x_t) < 1e-9
    assert prediction.energy is None


@pytest.mark.parametrize(("name", "process"), CASES)
def test_c_skip_and_c_out_are_those_of_the_design(name, process):
    t, x_t, raw, _, (a, s) = situation(name, process)
    prediction = denoiser_for(torch.from_numpy(raw), process, name)(torch.from_numpy(x_t), t)
    if name == "mean":
        c_skip, c_out = mean_row((linear_betas() if process is PROCESSES["linear"] else cosine_betas()).numpy())
    else:
        da, ds = process.dalpha(t).numpy(), process.dsigma(t).numpy()
        c_skip, c_out = TABLE[name](a[:, 0], s[:, 0], da, ds)
    np.testing.assert_allclose(prediction.c_skip, c_skip, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(prediction.c_out, c_out, rtol=1e-6, atol=1e-12)


def test_what_says_nothing_where_alpha_is_0_is_refused():
    for name in ("eps", "score", "raw_score"):
        with pytest.raises(UserError, match=f"parametrization '{name}' does not determine .* t_max below 1") as caught:
            denoiser_for(torch.zeros(1), Flow(), name)
        assert "\n" not in str(caught.value)
        denoiser_for(torch.zeros(1), Flow(t_max=0.999), name)
    for name in ("log_sigma", "quarter_log_sigma"):
        with pytest.raises(UserError, match=f"c_noise '{name}' is infinite .* time or time_999"):
            denoiser_for(torch.zeros(1), Flow(), "velocity", c_noise=name)
        denoiser_for(torch.zeros(1), Flow(t_max=0.999), "velocity", c_noise=name)


def test_the_table_has_every_parametrization():
    assert set(PARAMETRIZATIONS) == {*TABLE, "mean"}


@pytest.mark.parametrize("process", ["linear", "cosine", "VE10"])
def test_mean_is_the_posterior_mean_of_the_level_below(process):
    """By the product of two Gaussians, ``q(x_s | x_0)`` and ``q(x_t | x_s)``, in any process with levels."""
    process = PROCESSES[process]
    t = process.grid()
    alpha, sigma = process.alpha(t).numpy(), process.sigma(t).numpy()
    alpha_s, sigma_s = np.concatenate(([1.0], alpha[:-1])), np.concatenate(([0.0], sigma[:-1]))
    step = alpha / alpha_s
    variance = sigma**2 - step**2 * sigma_s**2
    x0, eps = np.random.default_rng(0).standard_normal((2, len(t)))
    x_t = alpha * x0 + sigma * eps
    mean = np.empty(len(t))
    mean[0] = x0[0]  # There is no noise at t = 0.
    precision = step[1:] ** 2 / variance[1:] + 1 / sigma_s[1:] ** 2
    mean[1:] = (step * x_t / variance)[1:] / precision + (alpha_s * x0)[1:] / sigma_s[1:] ** 2 / precision
    raw = torch.from_numpy(mean)[:, None]
    prediction = denoiser_for(raw, process, "mean")(torch.from_numpy(x_t)[:, None], t)
    np.testing.assert_allclose(prediction.x0[:, 0], x0, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(prediction.eps[:, 0], eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["eps", "score", "raw_score", "v", "velocity", "edm"])
@pytest.mark.parametrize("process", ["VE", "VP", "SubVP", "cosine"])
def test_in_float32_the_noise_keeps_its_digits_at_small_levels(name, process):
    t, x_t, raw, truth, (a, s) = situation(name, PROCESSES[process])
    x_t, raw = torch.from_numpy(x_t).float(), torch.from_numpy(raw).float()
    prediction = denoiser_for(raw, PROCESSES[process], name)(x_t, t)
    for view in ("eps", "score"):
        assert getattr(prediction, view).dtype == torch.float32
        assert worst(getattr(prediction, view), truth[view]) < 1e-5, view
    assert worst(prediction.x0[s[:, 0] < a[:, 0]], truth["x0"][s[:, 0] < a[:, 0]]) < 1e-5


def test_through_a_rounded_x0_the_noise_would_be_lost():
    # Why the views are direct maps; without this the test above would prove nothing.
    t, x_t, raw, truth, (a, s) = situation("eps", PROCESSES["SubVP"])
    x_t, raw = torch.from_numpy(x_t).float(), torch.from_numpy(raw).float()
    x0 = denoiser_for(raw, PROCESSES["SubVP"], "eps")(x_t, t).x0
    assert worst((x_t - torch.from_numpy(a).float() * x0) / torch.from_numpy(s).float(), truth["eps"]) > 0.01


@pytest.mark.parametrize("process", PROCESSES)
def test_edm_and_unit_variance_give_the_network_unit_variance(process):
    process = PROCESSES[process]
    t, x_t, raw, truth, (a, s) = situation("score", process)
    x_t, raw = torch.from_numpy(x_t), torch.from_numpy(raw)
    expected = x_t.numpy() / np.sqrt((a * SIGMA_DATA) ** 2 + s**2)
    for name, options in (("edm", {}), ("score", {"c_in": "unit_variance"})):
        denoiser = denoiser_for(raw, process, name, **options)
        prediction = denoiser(x_t, t)
        np.testing.assert_allclose(denoiser.backbone.x, expected, rtol=1e-12)
        assert prediction.x_t is x_t
    assert worst(prediction.eps, truth["eps"]) < 1e-5
    for name in PARAMETRIZATIONS:
        if name != "edm" and not (name == "mean" and process.num_timesteps is None):
            denoiser = denoiser_for(raw, process, name)
            denoiser(x_t, t)
            assert torch.equal(denoiser.backbone.x, x_t), name


def test_the_network_receives_c_noise():
    def received(process, c_noise, t):
        denoiser = denoiser_for(torch.zeros(len(t), 2), process, "eps", c_noise=c_noise)
        denoiser(torch.zeros(len(t), 2), t)
        assert denoiser.backbone.c_noise.dtype == torch.float32
        return denoiser.backbone.c_noise.double()

    grid = PROCESSES["linear"].grid()
    assert received(PROCESSES["linear"], "index", grid).tolist() == list(range(1000))
    assert received(PROCESSES["VE10"], "index", PROCESSES["VE10"].grid()).tolist() == list(range(10))
    t = torch.linspace(0.01, 1, 30).double()
    log_sigma = math.log(0.01) + t * math.log(5000)
    torch.testing.assert_close(received(PROCESSES["VE"], "log_sigma", t), log_sigma, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(received(PROCESSES["VE"], "quarter_log_sigma", t), log_sigma / 4, rtol=1e-6, atol=1e-6)
    halved = log_sigma - math.log(2.0)
    torch.testing.assert_close(received(PROCESSES["VE"], "log_half_sigma", t), halved, rtol=1e-6, atol=1e-6)
    # EDM's sigma is the ratio of noise to signal, whatever the scale.
    kept = torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
    ratio = ((1 - kept) / kept).sqrt().log()
    torch.testing.assert_close(received(PROCESSES["VP"], "quarter_log_sigma", t), ratio / 4, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received(PROCESSES["VP"], "time", t), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(received(PROCESSES["VP"], "time_999", t), 999 * t, rtol=1e-6, atol=0)
    assert set(C_NOISE) == {"index", "log_sigma", "log_half_sigma", "quarter_log_sigma", "time", "time_999"}


def test_the_condition_reaches_the_network():
    denoiser = denoiser_for(torch.zeros(2, 1), PROCESSES["VP"], "eps")
    condition = Condition(label=torch.tensor([1, 2]))
    denoiser(torch.zeros(2, 1), tensor(0.1, 0.2), condition)
    assert denoiser.backbone.cond is condition


class Linear(Backbone):
    """One layer that says in what it ran."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(12, 12)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(12, 12, generator=generator))

    def forward(self, x, c_noise, cond=None):
        self.seen = {"x": x.dtype, "c_noise": c_noise.dtype, "autocast": torch.is_autocast_enabled("cpu")}
        return self.layer(x.flatten(1)).view_as(x)


@pytest.mark.parametrize("name", ["eps", "v", "edm", "x0"])
def test_autocast_touches_the_backbone_alone(name):
    process = PROCESSES["VP"]
    denoiser = NetworkDenoiser(Linear(), process, name, "time", sigma_data=SIGMA_DATA)
    x_t = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.01, 1, 5).double()
    full = denoiser(x_t, t)
    assert full.raw.dtype == torch.float32
    assert denoiser.backbone.seen == {"x": torch.float32, "c_noise": torch.float32, "autocast": False}

    denoiser.backbone.autocast_dtype = torch.bfloat16
    half = denoiser(x_t, t)
    assert denoiser.backbone.seen == {"x": torch.float32, "c_noise": torch.float32, "autocast": True}
    assert half.raw.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(half.u, full.u)
    assert torch.equal(half.v, full.v)
    assert half.coefficients.sigma.dtype == torch.float64
    # The views are those of the rounded output, computed in float32.
    again = denoiser_for(half.raw.float(), process, name)(x_t, t)
    for view in ("x0", "eps", "score", "velocity"):
        assert getattr(half, view).dtype == torch.float32
        assert torch.equal(getattr(half, view), getattr(again, view))
    # An autocast that someone else opened does not get in.
    denoiser.backbone.autocast_dtype = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = denoiser(x_t, t)
        assert torch.equal(inside.raw, full.raw)
        assert torch.equal(inside.eps, full.eps)
    assert denoiser.backbone.seen["autocast"] is False


def test_a_backbone_in_half_precision_is_fed_its_own_type():
    denoiser = NetworkDenoiser(Linear().to(torch.bfloat16), PROCESSES["VP"], "eps", "time")
    prediction = denoiser(torch.zeros(2, 3, 2, 2), tensor(0.1, 0.5))
    assert denoiser.backbone.seen["x"] == torch.bfloat16
    assert prediction.eps.dtype == prediction.x_t.dtype == torch.float32


def test_gradients_reach_the_network_and_the_input():
    denoiser = NetworkDenoiser(Linear(), PROCESSES["VP"], "edm", "time")
    x_t = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    denoiser(x_t, tensor(0.1, 0.5)).score.sum().backward()
    assert float(x_t.grad.abs().min()) > 0
    assert float(denoiser.backbone.layer.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("parametrization", "epsilon"), ("c_noise", "sigma"), ("c_in", "unit"), ("parametrization", None)],
)
def test_an_unknown_name_is_refused_with_the_known_ones(key, value):
    options = {"parametrization": "eps", "c_noise": "time", "c_in": "none", key: value}
    with pytest.raises(UserError) as caught:
        NetworkDenoiser(Linear(), PROCESSES["VP"], **options)
    message = str(caught.value)
    known = {"parametrization": "raw_score", "c_noise": "quarter_log_sigma", "c_in": "unit_variance"}[key]
    assert message.startswith(f"{key} is {value!r}")
    assert known in message
    assert "\n" not in message


def test_what_needs_a_grid_is_refused_without_one():
    x, t = torch.zeros(2, 3, 2, 2), tensor(0.1, 0.5)
    with pytest.raises(UserError, match="parametrization 'mean'"):
        NetworkDenoiser(Linear(), PROCESSES["VP"], "mean", "time")(x, t)
    with pytest.raises(UserError, match="c_noise 'index'"):
        NetworkDenoiser(Linear(), PROCESSES["VP"], "eps", "index")(x, t)
