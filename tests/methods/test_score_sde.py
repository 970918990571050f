"""Score-SDE is the paper's objective for the paper's three SDEs, written here from its appendices."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import CONFIG, WALKS, Convolutions, digits, digits_data, fit, same, score_sde, weights

from lit_diffusion.__main__ import dispatch
from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import Condition
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.images import to_uint8
from lit_diffusion.methods import ScoreSDE
from lit_diffusion.objectives import SecondMoments, Uniform
from lit_diffusion.processes import VE, VP, Betas, SubVP, linear_betas
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.samplers import AnnealedLangevin, PredictorCorrector, ReverseDiffusion
from lit_diffusion.training.datamodule import Batch, DataModule

PROCESSES = {"VE": lambda **keys: VE(0.01, 5.0, **keys), "VP": VP, "SubVP": SubVP}


def centred(**keys):
    return digits_data(value_range=(-1.0, 1.0), **keys)


# ---- the paper ---------------------------------------------------------------------------------------------------


def kernel(name, t):
    """``alpha``, ``sigma`` and ``g^2`` of appendices B and C."""
    integral, rate = 0.1 * t + 0.5 * 19.9 * t**2, 0.1 + 19.9 * t
    if name == "VE":
        sigma = 0.01 * 500.0**t
        return torch.ones_like(t), sigma, sigma**2 * 2 * math.log(500.0)
    alpha = torch.exp(-0.5 * integral)
    if name == "VP":
        return alpha, torch.sqrt(-torch.expm1(-integral)), rate
    return alpha, -torch.expm1(-integral), rate * -torch.expm1(-2 * integral)


@pytest.mark.parametrize("weight", ["sigma2", "g2"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_is_the_papers(name, weight):
    """Eq. 7: ``lambda/2 |s(x_t, t) + (x_t - alpha x_0) / sigma^2|^2``, by the network itself."""
    torch.manual_seed(0)
    method = ScoreSDE(MLP((3,), width=8, depth=1), PROCESSES[name](t_min=0.01), weight=weight).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    with torch.no_grad():
        loss = method.loss(Batch(x, torch.arange(64)), seed=4)
        alpha, sigma, g2 = (value[:, None] for value in kernel(name, loss.t))
        eps = keyed_normal(4, "noise", torch.arange(64), (3,), dtype=torch.float64)
        x_t = alpha * x + sigma * eps
        score = method.denoiser.backbone(x_t, (sigma / alpha).log().float()[:, 0]) / sigma
        residual = score + (x_t - alpha * x) / sigma**2
        expected = 0.5 * ({"sigma2": sigma**2, "g2": g2}[weight] * residual**2).sum(1)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-5, atol=0)
    assert 0.01 <= float(loss.t.min()) < 0.1
    assert 0.9 < float(loss.t.max()) <= 1.0
    again = method.loss_given_t(Batch(x, torch.arange(64)), loss.t, eps)
    torch.testing.assert_close(again.per_sample, loss.per_sample, rtol=1e-12, atol=0)


def test_the_papers_defaults():
    method = ScoreSDE(Convolutions(), VP())
    objective, denoiser = method.objective, method.denoiser
    assert (type(objective.time_law), objective.weight, objective.reduction) == (Uniform, "sigma2", "half_sum")
    assert (denoiser.parametrization, denoiser.c_noise, denoiser.unit_variance) == ("score", "log_sigma", False)
    assert denoiser.process.t_min == 1e-5
    assert isinstance(method.sampler, PredictorCorrector)
    assert isinstance(method.sampler.predictor, ReverseDiffusion)
    assert (method.sampler.snr, method.sampler.corrector_steps) == (0.16, 1)
    assert len(method.sampler.predictor.plan(denoiser.process)) == 1000
    method.sampler.check(denoiser)


@pytest.mark.parametrize(("reduction", "factor"), [("half_sum", 32.0), ("mean", 1.0)])
def test_the_reduction_is_a_factor_of_the_dimension(reduction, factor):
    """A network that says nothing has half the noise's square, or its mean."""
    method = score_sde(VP(), reduction=reduction)
    with torch.no_grad():
        for p in method.denoiser.parameters():
            p.zero_()
    loss = method.loss(Batch(torch.zeros(500, 1, 8, 8), torch.arange(500)), seed=0).per_sample.detach()
    assert float(loss.mean()) == pytest.approx(factor, rel=0.03)


def test_labels_reach_the_network():
    method = score_sde(VP(), {"num_classes": 10})
    x = torch.zeros(4, 1, 8, 8)
    losses = [
        method.loss(Batch(x, torch.arange(4), Condition(label=torch.full((4,), label))), seed=0).per_sample
        for label in (0, 0, 7)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


# ---- it trains ---------------------------------------------------------------------------------------------------

CHOICES = [
    *({"time_law": law, "weight": weight} for law in ("uniform", "importance") for weight in ("sigma2", "g2")),
    {"weight": "one", "reduction": "mean"},
    *({"parametrization": name} for name in ("eps", "raw_score", "x0", "v", "velocity", "edm")),
    *({"c_noise": name} for name in ("log_sigma", "quarter_log_sigma", "time_999")),
    {"c_in": "unit_variance", "sigma_data": 0.7},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: ", ".join(map(str, choice.values())))
@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_and_choice_trains(tmp_path, name, choice):
    method = score_sde(PROCESSES[name](), gradient_clip=100.0, **choice)
    before = weights(method)
    fit(method, centred(), tmp_path, 64, limit_val_batches=1.0)
    after = weights(method)
    assert method.skipped_steps == 0
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert all(not torch.equal(value, before[name]) for name, value in after.items())


def few():
    """Four digits again and again."""
    return DataModule(InMemory(digits()._values[:4], num_grey_levels=17), 32, (-1.0, 1.0), held_out_fraction=0.0)


def over_all_times(method):
    """The mean loss of the four digits at 32 times, with fixed noise."""
    x = few().normalize(torch.from_numpy(digits()._values[:4])).repeat(32, 1, 1, 1)
    t = torch.linspace(0.02, 1.0, 32, dtype=torch.float64).repeat_interleave(4)
    batch = Batch(x, torch.arange(128))
    with torch.no_grad():
        return float(method.loss_given_t(batch, t, keyed_normal(7, "fixed", batch.index, (1, 8, 8))).per_sample.mean())


@pytest.mark.parametrize(
    "choice",
    [{}, {"time_law": "importance", "weight": "g2", "reduction": "mean"}, {"parametrization": "edm"}],
    ids=lambda choice: ", ".join(choice.values()) or "default",
)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_falls(tmp_path, name, choice):
    method = score_sde(PROCESSES[name](), {"channels": 8}, **choice)
    before = over_all_times(method)
    fit(method, few(), tmp_path, 32 * 40)
    assert over_all_times(method) < 0.8 * before


@pytest.mark.parametrize("time_law", ["uniform", "importance"])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path, time_law):
    def method(seed=0):
        return score_sde(VP(), {"dropout": 0.3}, seed, time_law=time_law, weight="g2", gradient_clip=1.0)

    straight, broken = method(), method()
    fit(straight, centred(micro_batch_size=20), tmp_path, 160)
    for number, stop in enumerate([32, 96, 160]):
        last = tmp_path / f"{number - 1}.ckpt" if number else None
        made = fit(broken, centred(micro_batch_size=20), tmp_path, stop, ckpt_path=last)
        made.save_checkpoint(tmp_path / f"{number}.ckpt")
        broken = method(seed=number + 1)
    assert same(torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"], straight.state_dict())


# ---- samples -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One of each process, after a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    methods = {name: score_sde(make()) for name, make in PROCESSES.items()}
    for method in methods.values():
        fit(method, centred(), folder, 96)
    return methods


@pytest.mark.parametrize("name", PROCESSES)
def test_samples_depend_on_seed_and_number_alone(trained, name):
    method = trained[name]
    first = method.generate(torch.arange(6), seed=3).x
    assert torch.equal(first, method.generate(torch.arange(6), seed=3).x)
    assert not torch.equal(first, method.generate(torch.arange(6), seed=4).x)
    for size in (1, 4):
        parts = torch.cat([method.generate(indices, seed=3).x for indices in torch.arange(6).split(size)])
        difference = to_uint8(first, (-1.0, 1.0)).astype(int) - to_uint8(parts, (-1.0, 1.0))
        assert np.abs(difference).max() <= 1
    assert len({image.tobytes() for image in first.numpy()}) == 6


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", PROCESSES)
def test_it_is_sampled_by_every_sampler(trained, name, walk):
    method, sampler = trained[name], WALKS[walk]
    if walk == "annealed_langevin":
        sampler = AnnealedLangevin(2, eta=1e-9, num_levels=3)
    sampler.check(method.denoiser)
    images = method.generate(torch.arange(4), 0, sampler=sampler).x
    assert images.shape == (4, 1, 8, 8)
    assert bool(torch.isfinite(images).all())
    assert len({image.tobytes() for image in images.numpy()}) == 4


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"time_law": "cosine"}, "time_law is 'cosine'.*importance"),
        ({"weight": "likelihood"}, "weight is 'likelihood'.*g2"),
        ({"reduction": "sum"}, "reduction is 'sum'.*half_sum"),
        ({"parametrization": "noise"}, "parametrization is 'noise'"),
        ({"parametrization": "mean"}, "the process needs num_timesteps"),
        ({"c_noise": "index"}, "needs a process with num_timesteps"),
        ({"c_in": "unit"}, "c_in is 'unit'"),
        ({"network": {"out_channels": 2}}, "need out_channels: 1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_is_refused_in_one_line(keys, said):
    with pytest.raises(UserError, match=said) as caught:
        score_sde(VP(), **keys)
    assert "\n" not in str(caught.value)


def test_a_grid_may_be_trained_by_its_levels_and_continuous_time_may_not():
    batch = Batch(torch.zeros(64, 1, 8, 8), torch.arange(64))
    process = Betas(linear_betas(10))
    t = score_sde(process, time_law="levels").loss(batch, seed=0).t
    assert set(t.tolist()) == set(process.grid().tolist())
    with pytest.raises(UserError, match="continuous time"):
        score_sde(VP(), time_law="levels").loss(batch, seed=0)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Fit a tiny configuration of a process and keys; returns what its run wrote as configuration."""
    monkeypatch.chdir(tmp_path)

    def call(process, **init_args):
        config = copy.deepcopy(CONFIG)
        unet = config["model"]["init_args"]["backbone"]
        sampler = {"class_path": "EulerMaruyama", "init_args": {"steps": 2, "large_steps": "allow"}}
        init_args = {"process": process, "backbone": unet, "sampler": sampler, **init_args}
        config["model"] = {"class_path": "ScoreSDE", "init_args": init_args}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        dispatch(["fit", "--config", "tiny.yaml", "--run_dir", "run"])
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    return call


def test_the_process_is_named_in_the_configuration(run, tmp_path):
    init_args = run(
        {"class_path": "SubVP", "init_args": {"beta_max": 15.0, "t_min": 1e-3}}, time_law="importance", weight="g2"
    )["model"]["init_args"]
    assert init_args["process"]["class_path"].endswith("SubVP")
    assert init_args["process"]["init_args"] == {
        "beta_min": 0.1,
        "beta_max": 15.0,
        "t_min": 1e-3,
        "t_min_sampling": 1e-3,
    }
    assert (init_args["time_law"], init_args["weight"]) == ("importance", "g2")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("process", "keys", "said"),
    [
        ("VQ", {}, "VQ"),
        ({"class_path": "VP", "init_args": {"sigma_min": 0.1}}, {}, "sigma_min"),
        ({"class_path": "VP", "init_args": {"beta_max": 0.05}}, {}, "need 0 < beta_min < beta_max"),
        ({"class_path": "VP", "init_args": {"t_min": 0.0}}, {}, "t_min is 0"),
        ({"class_path": "VP"}, {"weights": "g2"}, "weights"),
        ({"class_path": "VP"}, {"weight": "g3"}, "weight.*'g3'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_command_line_refuses_in_one_line(run, tmp_path, process, keys, said):
    with pytest.raises(UserError, match=said) as caught:
        run(process if isinstance(process, dict) else {"class_path": process}, **keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_law_of_t_that_learns_does_so_in_every_method(tmp_path):
    method = score_sde(VE(0.1, 5.0, num_timesteps=8), time_law=SecondMoments(8))
    fit(method, digits_data(), tmp_path, 64)
    assert int(method.objective.time_law.counts.sum()) == 64
