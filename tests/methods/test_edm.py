"""EDM: every column of the paper's table 1 by configuration, its algorithm 1, and other implementations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.laws import GAUSSIAN, MIXTURE, noise_of, order, wide
from helpers.tiny import Convolutions, digits, digits_data, fit, weights
from torch import nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.config.parser import Parser
from lit_diffusion.data.moments import MEASURED, standard_deviation
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.errors import UserError
from lit_diffusion.methods import EDM, Method
from lit_diffusion.objectives import LogNormal
from lit_diffusion.processes import VP, Flow, PowerVE
from lit_diffusion.samplers import Euler, Heun, OnProcess
from lit_diffusion.samplers.base import described

SIGMA_DATA = 0.5
N, M, C_1, C_2, J_0 = 18, 1000, 0.001, 0.008, 8
RAMP = np.arange(N) / (N - 1)


# ---- table 1, as the paper writes it -----------------------------------------------------------------------------


def iddpm_levels():
    """``u_0 .. u_M``, from the largest to 0."""
    alpha_bar = np.sin(0.5 * np.pi * np.arange(M + 1) / (M * (C_2 + 1))) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    return u


U = iddpm_levels()


def vp_sigma(t):
    return np.sqrt(np.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1)


def vp_time(sigma):
    return (np.sqrt(0.1**2 + 2 * 19.9 * np.log(sigma**2 + 1)) - 0.1) / 19.9


def ndtri(u):
    return torch.special.ndtri(torch.from_numpy(u)).numpy()


def method(name, process=None, sampler=None, **keys):
    """The configuration of a method."""
    classes = {"process": process, "sampler": sampler}
    given = {key: {"class_path": value[0], "init_args": value[1]} for key, value in classes.items() if value}
    backbone = {"class_path": "MLP", "init_args": {"data_shape": [3], "width": 8, "depth": 1}}
    if name == "EDM":
        keys = {"sigma_data": SIGMA_DATA, **keys}
    return {"class_path": name, "init_args": {"backbone": backbone, **given, **keys}}


def on_process(sampler, process):
    inner = {"sampler": sampler, "process": process}
    return "OnProcess", {key: {"class_path": value[0], "init_args": value[1]} for key, value in inner.items()}


HEUN = {"steps": N - 1, "denoise": True, "spacing": "karras:7"}
EULER = {"steps": N - 1, "large_steps": "allow"}
COLUMNS = {
    "VP": {
        "model": method(
            "EDM",
            ("VP", {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, "t_min_sampling": 1e-3}),
            ("Euler", {**EULER, "spacing": "uniform"}),
            parametrization="eps",
            c_noise="time_999",
            time_law="uniform",
        ),
        "sigma_i": vp_sigma(1 + RAMP * (1e-3 - 1)),
        "s": lambda sigma: 1 / np.sqrt(np.exp(0.5 * 19.9 * vp_time(sigma) ** 2 + 0.1 * vp_time(sigma))),
        "c": lambda sigma: (np.ones_like(sigma), -sigma, 1 / np.sqrt(sigma**2 + 1), (M - 1) * vp_time(sigma)),
        "drawn": lambda u: vp_sigma(1e-5 + (1 - 1e-5) * u),
        "weight": lambda sigma: 1 / sigma**2,
    },
    "VE": {
        "model": method(
            "EDM",
            ("PowerVE", {"sigma_min": 0.02, "sigma_max": 100.0, "power": 0.5}),
            ("Euler", {**EULER, "spacing": "log_snr"}),
            parametrization="score",
            c_noise="log_half_sigma",
            time_law="log_uniform",
        ),
        "sigma_i": np.sqrt(100.0**2 * (0.02**2 / 100.0**2) ** RAMP),
        "s": np.ones_like,
        "c": lambda sigma: (np.ones_like(sigma), sigma, np.ones_like(sigma), np.log(0.5 * sigma)),
        "drawn": lambda u: np.exp(np.log(0.02) + (np.log(100.0) - np.log(0.02)) * u),
        "weight": lambda sigma: 1 / sigma**2,
    },
    "iDDPM": {
        "model": method(
            "DDPM",
            None,
            on_process(
                ("Euler", {**EULER, "spacing": "iddpm", "denoise": True}),
                ("PowerVE", {"sigma_min": U[M - 1], "sigma_max": U[J_0]}),
            ),
            num_timesteps=M,
            schedule="cosine",
        ),
        "sigma_i": U[np.floor(J_0 + (M - 1 - J_0) * RAMP + 0.5).astype(int)],
        "s": np.ones_like,
        "c": lambda sigma: (
            np.ones_like(sigma),
            -sigma,
            1 / np.sqrt(sigma**2 + 1),
            M - 1 - np.abs(U[:M] - sigma[:, None]).argmin(1),
        ),
        "drawn": lambda u: U[M - 1 - np.floor(M * u).astype(int)],
        "weight": lambda sigma: 1 / sigma**2,
    },
    "EDM": {
        "model": method("EDM"),
        "sigma_i": (80.0 ** (1 / 7) + RAMP * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7,
        "s": np.ones_like,
        "c": lambda sigma: (
            SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2),
            sigma * SIGMA_DATA / np.sqrt(sigma**2 + SIGMA_DATA**2),
            1 / np.sqrt(sigma**2 + SIGMA_DATA**2),
            np.log(sigma) / 4,
        ),
        "drawn": lambda u: np.clip(np.exp(-1.2 + 1.2 * ndtri(u)), 0.002, 80.0),
        "weight": lambda sigma: (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2,
    },
}
each_column = pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)


class Network(Backbone):
    """Some function of what it is told, which it remembers, in float64."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.data_shape, self.out_channels = (3,), None
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x, c_noise, cond=None):
        self.seen, self.told = x, c_noise
        return torch.sin(3 * x) + torch.cos(c_noise.double())[:, None] + self.shift


def configured(config):
    """The method that a configuration means, as ``fit`` makes it, with that network."""
    parser = Parser()
    parser.add_subclass_arguments(Method, "model")
    made = parser.instantiate(parser.parse_args([f"--model={json.dumps(config, default=float)}"])).model
    made.denoiser.backbone = Network()
    return made


def levels_of(process, times):
    """``sigma`` of the paper, which is our ``sigma / alpha``, and its ``s``, our alpha."""
    times = torch.as_tensor(times, dtype=torch.float64)
    return torch.exp(-0.5 * process.log_snr(times)).numpy(), process.alpha(times).numpy()


# ---- every column is reachable -----------------------------------------------------------------------------------


@each_column
def test_the_time_steps_the_schedule_and_the_scaling_are_the_columns(column):
    made = configured(column["model"])
    sampler, process = made.sampler, made.denoiser.process
    sampler.check(made.denoiser)
    if isinstance(sampler, OnProcess):
        sampler, process = sampler.sampler, sampler.process
    plan = sampler.plan(process)
    sigma, scale = levels_of(process, [plan[0].t, *(move.s for move in plan)])
    np.testing.assert_allclose(sigma, column["sigma_i"], rtol=1e-8)
    np.testing.assert_allclose(scale, column["s"](column["sigma_i"]), rtol=1e-8)
    assert isinstance(sampler, (Heun if column is COLUMNS["EDM"] else Euler))


def column_levels(column):
    """Some of its noise levels; on iDDPM's grid."""
    return U[[999, 950, 700, 400, 100, 8]] if column is COLUMNS["iDDPM"] else np.geomspace(0.021, 70.0, 12)


@each_column
def test_the_network_and_its_preconditioning_are_the_columns(column):
    denoiser, sigma = configured(column["model"]).denoiser, column_levels(column)
    t = denoiser.process.t_at_log_snr(-2.0 * torch.from_numpy(sigma).log())
    x = torch.from_numpy(sigma)[:, None] * noise_of(len(sigma), dtype=torch.float64).normal()
    found = denoiser(denoiser.process.alpha(t)[:, None] * x, t)
    c_skip, c_out, c_in, c_noise = (torch.as_tensor(value).double()[:, None] for value in column["c"](sigma))
    torch.testing.assert_close(denoiser.backbone.seen, c_in * x, rtol=1e-7, atol=0)
    torch.testing.assert_close(denoiser.backbone.told.double(), c_noise[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x0, c_skip * x + c_out * found.raw, rtol=1e-7, atol=1e-9)
    if column is COLUMNS["EDM"]:
        torch.testing.assert_close(found.c_skip, c_skip[:, 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(found.c_out, c_out[:, 0], rtol=1e-12, atol=0)


@each_column
def test_the_law_of_the_noise_levels_is_the_columns(column):
    made, u = configured(column["model"]), np.linspace(1e-6, 1 - 1e-6, 201)
    t, density = made.objective.time_law.draw(torch.from_numpy(u), made.denoiser.process)
    assert density is None
    np.testing.assert_allclose(levels_of(made.denoiser.process, t)[0], column["drawn"](u), rtol=1e-6)


@each_column
def test_the_loss_is_weighted_as_the_columns(column):
    """``lambda(sigma) |D(x0 + sigma eps; sigma) - x0|^2``, a mean over the dimensions."""
    made, sigma = configured(column["model"]), column_levels(column)
    denoiser, count = made.denoiser, len(sigma)
    t = denoiser.process.t_at_log_snr(-2.0 * torch.from_numpy(sigma).log())
    x0, eps = (noise_of(count, seed, dtype=torch.float64).normal() for seed in (1, 2))
    loss = made.objective.at(denoiser, x0, t, eps)
    error = denoiser(denoiser.process.perturb(x0, t, eps), t).x0 - x0
    expected = torch.from_numpy(column["weight"](sigma)) * error.square().mean(1)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-7, atol=1e-10)
    assert loss.unweighted is None


@pytest.mark.parametrize("trained", ["VP", "VE", "iDDPM"])
def test_edms_sampler_takes_the_networks_of_the_other_columns(trained):
    """Section 3: the design of the sampler is free of that of the training."""
    made = configured(COLUMNS[trained]["model"])
    sampler = OnProcess(Heun(**HEUN), PowerVE(0.021, 70.0))
    sampler.check(made.denoiser)
    found = sampler.sample(made.denoiser, noise_of(4, dtype=torch.float64))
    assert found.evaluations == 2 * N - 1
    assert bool(found.x.isfinite().all())


def test_by_default_it_is_the_column_of_edm():
    made = EDM(Convolutions(), sigma_data=SIGMA_DATA)
    denoiser, law = made.denoiser, made.objective.time_law
    assert (denoiser.parametrization, denoiser.c_noise, denoiser.unit_variance) == (
        "edm",
        "quarter_log_sigma",
        True,
    )
    assert isinstance(denoiser.process, PowerVE)
    assert (denoiser.process.sigma_min, denoiser.process.sigma_max, denoiser.process.power) == (0.002, 80.0, 1.0)
    assert isinstance(law, LogNormal)
    assert (law.mean, law.std) == (-1.2, 1.2)
    assert (made.objective.weight, made.objective.reduction) == ("raw", "mean")
    assert described(made.sampler) == described(Heun(**HEUN))


# ---- the sampler -------------------------------------------------------------------------------------------------


def algorithm_1(denoise, x, levels):
    """Karras et al. 2022, transcribed; ``levels`` are t_0 .. t_{N-1}, after which t_N is 0."""
    for t, following in zip(levels, [*levels[1:], 0.0], strict=True):
        slope = (x - denoise(x, t)) / t
        moved = x + (following - t) * slope
        if following != 0.0:
            moved = x + (following - t) * 0.5 * (slope + (moved - denoise(moved, following)) / following)
        x = moved
    return x


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("spacing", ["karras:7", "log_snr"])
def test_heuns_error_in_its_schedule_is_of_order_2_and_eulers_of_order_1(power, spacing):
    process, x = PowerVE(0.1, 5.0, power), 5.0 * noise_of(40, dtype=torch.float64).normal()
    exact = GAUSSIAN.flow(process, x, 1.0, process.t_min)
    for make, expected in ((Euler, 1.0), (Heun, 2.0)):
        errors = []
        for steps in (60, 120):
            found = make(steps, spacing=spacing).sample(ExactDenoiser(GAUSSIAN, process), None, start=x).x
            errors.append(float((found - exact).norm(dim=1).max()))
        assert order(*errors) == pytest.approx(expected, abs=0.15)


def test_its_sampler_is_algorithm_1_at_35_evaluations():
    def denoise(x, sigma):
        return MIXTURE.posterior(x, wide(1.0).expand(len(x)), wide(sigma).expand(len(x)))[2]

    made = EDM(Convolutions(), sigma_data=SIGMA_DATA)
    start = 80.0 * noise_of(30, dtype=torch.float64).normal()
    found = made.sampler.sample(ExactDenoiser(MIXTURE, made.denoiser.process), None, start=start)
    expected = algorithm_1(denoise, start, COLUMNS["EDM"]["sigma_i"].tolist())
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-6)
    assert found.evaluations == 35


# ---- other implementations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [PowerVE(), VP(), Flow(1e-3, t_max=0.99)], ids=["EDM", "VP", "Flow"])
def test_its_preconditioning_is_azulas_at_unit_variance(process):
    denoise = pytest.importorskip("azula.denoise")

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def forward(self, x, c_time):
            return self.network(x, 0.25 * c_time)

    theirs = denoise.KarrasDenoiser(Theirs(), lambda t: (process.alpha(t), process.sigma(t)))
    ours = NetworkDenoiser(Network(), process, "edm", "quarter_log_sigma", sigma_data=1.0)
    t = torch.linspace(0.01, process.t_max, 9, dtype=torch.float64)
    x_t = noise_of(9, dtype=torch.float64).normal() * process.sigma(t)[:, None]
    torch.testing.assert_close(ours(x_t, t).x0, theirs(x_t, t).mean, rtol=1e-5, atol=1e-6)


def test_its_preconditioning_levels_and_euler_steps_are_diffusers():
    module = pytest.importorskip("diffusers.schedulers.scheduling_edm_euler")
    scheduler = module.EDMEulerScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(N)
    network, start = Network(), 80.0 * noise_of(20, dtype=torch.float64).normal()
    x = start
    for c_noise in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, c_noise)
        x = scheduler.step(network(seen, c_noise.expand(20)), c_noise, x).prev_sample
    denoiser = NetworkDenoiser(Network(), PowerVE(), "edm", "quarter_log_sigma", sigma_data=SIGMA_DATA)
    sampler = Euler(N - 1, denoise=True, spacing="karras:7", large_steps="allow")
    torch.testing.assert_close(sampler.sample(denoiser, None, start=start).x, x, rtol=1e-4, atol=1e-4)


def test_heun_is_diffusers():
    """On the levels of its own, Karras's between the ends of the linear betas."""
    module = pytest.importorskip("diffusers.schedulers.scheduling_heun_discrete")
    scheduler = module.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    scheduler.set_timesteps(N)
    sigmas = scheduler.sigmas.double()
    process = PowerVE(float(sigmas[-2]), float(sigmas[0]))
    denoiser, start = ExactDenoiser(MIXTURE, process), sigmas[0] * noise_of(20, dtype=torch.float64).normal()
    x = start
    # An evaluation at the first level, and two at each of the others.
    for sigma, t in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        eps = denoiser(x, (sigma / sigmas[0]).expand(20)).eps
        x = scheduler.step(eps, t, x).prev_sample
    found = Heun(**HEUN).sample(denoiser, None, start=start)
    torch.testing.assert_close(found.x, x, rtol=1e-4, atol=1e-4)
    assert found.evaluations == len(scheduler.timesteps)


# ---- sigma_data --------------------------------------------------------------------------------------------------


def test_sigma_data_is_measured_from_the_training_data():
    said, data = [], digits_data(value_range=(-1.0, 1.0))
    found = EDM.resolve_auto({"sigma_data": "auto"}, data, said.append)
    values = np.stack([digits().value(int(i)) for i in data.train_indices]) / 8.0 - 1.0
    assert found == {"sigma_data": pytest.approx(values.std(), rel=1e-3)}
    assert found["sigma_data"] == pytest.approx(0.752, abs=0.003)
    assert said == [f"sigma_data {found['sigma_data']:g}: the standard deviation of 1761 training data"]
    half = EDM.resolve_auto({"sigma_data": "auto"}, digits_data(value_range=(0.0, 1.0)), said.append)
    assert half["sigma_data"] == pytest.approx(0.5 * found["sigma_data"], rel=1e-3)
    assert EDM.resolve_auto({"sigma_data": 0.5}, data, said.append) == {}
    assert len(said) == 2


def test_of_many_data_a_subset_is_measured_and_of_few_all():
    values = 3.0 + 2.0 * noise_of(MEASURED + 500, dtype=torch.float64).normal()
    asked = []

    def read(part):
        asked.extend(part.tolist())
        return values[part]

    deviation, count = standard_deviation(read, len(values))
    assert (count, len(asked), len(set(asked))) == (MEASURED, MEASURED, MEASURED)
    assert deviation == pytest.approx(float(values.std()), rel=0.02)
    deviation, count = standard_deviation(lambda part: values[part], 30)
    assert (deviation, count) == (pytest.approx(float(values[:30].std(correction=0)), rel=1e-12), 30)
    assert standard_deviation(lambda part: torch.full((len(part), 2), 0.3), 5)[0] == pytest.approx(0.0, abs=1e-7)


def test_auto_in_python_code_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"sigma_data is 'auto'.*in Python code give the number") as caught:
        EDM(Convolutions())
    assert "\n" not in str(caught.value)


# ---- it trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"process": VP(), "parametrization": "eps", "c_noise": "time_999", "time_law": "uniform"},
        {"process": PowerVE(0.02, 50.0, 0.5), "parametrization": "score", "time_law": "log_uniform"},
    ],
    ids=["EDM", "VP", "VE"],
)
def test_it_trains_and_generates(tmp_path, keys):
    torch.manual_seed(0)
    keys |= {"sampler": Heun(3, denoise=True, large_steps="allow", spacing="karras:7")}
    made = EDM(Convolutions(), sigma_data=0.75, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), **keys)
    before = weights(made)
    fit(made, digits_data(value_range=(-1.0, 1.0)), tmp_path, 96)
    assert made.skipped_steps == 0
    assert all(not torch.equal(value, before[name]) for name, value in weights(made).items())
    images = made.generate(torch.arange(2), 0).x
    assert images.shape == (2, 1, 8, 8)
    assert bool(images.isfinite().all())
