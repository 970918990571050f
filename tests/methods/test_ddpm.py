"""DDPM is the paper's objective on the paper's chain, and DDIM is DDPM with another sampler."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import CONFIG, WALKS, Convolutions, ddpm, digits, digits_data, fit, ncsn, same, trainer, weights

from lit_diffusion.__main__ import dispatch
from lit_diffusion.backbones import MLP
from lit_diffusion.conditions import Condition
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.denoisers import PARAMETRIZATIONS
from lit_diffusion.errors import UserError
from lit_diffusion.images import to_uint8
from lit_diffusion.methods import DDIM, DDPM
from lit_diffusion.objectives import DiffusionObjective, Levels
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.reverse import ReverseChain
from lit_diffusion.samplers import DDIM as DDIMSampler
from lit_diffusion.samplers import Ancestral
from lit_diffusion.training.datamodule import Batch, DataModule


def centred(**keys):
    return digits_data(value_range=(-1.0, 1.0), **keys)


def ready(**keys):
    """A method that knows its data without a training."""
    method = ddpm(**keys)
    method.data_spec = centred().data_spec
    return method


def state(path):
    return torch.load(path, weights_only=True)


def law(method):
    """What the law of the levels remembers."""
    return method.objective.time_law.state_dict()


# ---- the paper ---------------------------------------------------------------------------------------------------


def test_the_papers_defaults():
    method = DDPM(Convolutions())
    process, denoiser = method.denoiser.process, method.denoiser
    betas = 1.0 - (process.alpha(process.grid()) / torch.cat((torch.ones(1), process.alpha(process.grid())[:-1]))) ** 2
    assert betas.tolist() == pytest.approx(np.linspace(1e-4, 0.02, 1000).tolist(), rel=1e-9)
    assert (denoiser.parametrization, denoiser.c_noise, denoiser.unit_variance) == ("eps", "index", False)
    assert (method.objective.loss, method.objective.chain.variance, type(method.objective.time_law)) == (
        "simple",
        "beta",
        Levels,
    )
    assert isinstance(method.sampler, Ancestral)
    assert (method.sampler.steps, method.sampler.variance) == (None, "beta")
    assert len(method.sampler.plan(process)) == 1000
    assert method.configure_optimizers()[0].param_groups[0]["lr"] == 1e-3
    method.sampler.check(denoiser)


def test_the_loss_is_the_papers():
    """Algorithm 1: ``|eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t - 1)|^2``, by the network itself."""
    torch.manual_seed(0)
    method = DDPM(MLP((3,), width=8, depth=1), num_timesteps=20).double()
    method.data_spec = replace(centred().data_spec, num_grey_levels=None, value_range=None)
    x = torch.randn(64, 3, dtype=torch.float64)
    with torch.no_grad():
        loss = method.loss(Batch(x, torch.arange(64)), seed=4)
        t = (loss.t * 20).round().long()
        abar = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 20, dtype=torch.float64), 0)[t - 1, None]
        eps = keyed_normal(4, "noise", torch.arange(64), (3,), dtype=torch.float64)
        guess = method.denoiser.backbone(abar.sqrt() * x + (1 - abar).sqrt() * eps, (t - 1.0).float())
    torch.testing.assert_close(loss.per_sample, (eps - guess).square().mean(1), rtol=1e-6, atol=0)
    assert (int(t.min()), int(t.max())) == (1, 20)


def test_the_cosine_schedule_is_nichol_and_dhariwals():
    method = ddpm(schedule="cosine", num_timesteps=50)
    process = method.denoiser.process
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = (process.alpha(process.grid()) ** 2).tolist()
    assert abar[:-1] == pytest.approx((f[1:-1] / f[0]).tolist(), rel=1e-9)
    assert abar[-1] == pytest.approx(abar[-2] * 0.001)  # the clipped beta of 0.999


def test_the_bound_knows_the_grey_levels_of_the_data():
    method = ready(loss="bound")
    raw = next(iter(centred().train_dataloader()))
    batch = centred().prepare(raw["value"], raw["label"], raw["index"], training=True)
    eps = keyed_normal(0, "noise", batch.index, (1, 8, 8))
    at = [
        method.objective.at(method.denoiser, batch.x, torch.full((32,), 1 / 8).double(), eps, None, levels).per_sample
        for levels in (method.data_spec.grey_levels, None)
    ]
    assert not torch.allclose(*at, rtol=0.01)
    found = method.loss_given_t(batch, torch.full((32,), 1 / 8, dtype=torch.float64), eps).per_sample
    assert torch.equal(found, at[0])
    loss = method.loss(batch, 0)
    assert torch.equal(loss.per_sample, method.loss_given_t(batch, loss.t, eps).per_sample)


def test_held_out_losses_are_of_one_law_whatever_was_learned(tmp_path):
    """Its times, and so its curve, are those of ``time_law: levels`` before and after the law has learned."""
    learning, fixed = ready(time_law="second_moment"), ready()
    batch = Batch(torch.zeros(64, 1, 8, 8), torch.arange(64))
    steep = torch.arange(8).repeat(10)
    learning.after_step({"t": (steep + 1) / 8, "loss": 100.0**steep})
    assert not torch.equal(learning.loss(batch, 0).t, fixed.loss(batch, 0).t)
    held_out = learning.eval().loss(batch, 0)
    assert torch.equal(held_out.t, fixed.loss(batch, 0).t)
    assert torch.equal(held_out.per_sample, held_out.shown)
    # The Trainer's validation is in evaluation mode.
    losses = [
        trainer(tmp_path, limit_val_batches=1.0).validate(method, datamodule=centred(), verbose=False)[0]["val/loss"]
        for method in (learning.train(), fixed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method_sampler", [Ancestral(4, "beta_tilde", "quadratic", None), None])
def test_the_chain_is_the_samplers_or_has_the_methods_variance(method_sampler):
    method = ddpm(variance="learned", loss="hybrid", sampler=method_sampler)
    assert method.reverse_chain == (ReverseChain("beta_tilde", None) if method_sampler else ReverseChain("learned"))
    other = ddpm(variance="beta_tilde", make=DDIM)
    assert other.reverse_chain == ReverseChain("beta_tilde", "data")
    # What is trained is not clipped: it would learn nothing where it is.
    assert other.objective.chain == ReverseChain("beta_tilde", None)


def test_labels_reach_the_network():
    method = ready(network={"num_classes": 10})
    x = torch.zeros(4, 1, 8, 8)
    losses = [
        method.loss(Batch(x, torch.arange(4), Condition(label=torch.full((4,), label))), seed=0).per_sample
        for label in (0, 0, 7)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_points_have_a_bound_too():
    torch.manual_seed(0)
    method = DDPM(MLP((2,), width=8, depth=1, out_channels=4), 8, loss="hybrid", variance="learned")
    method.data_spec = replace(centred().data_spec, num_grey_levels=None, value_range=None, shape=(2,))
    loss = method.loss(Batch(torch.randn(32, 2), torch.arange(32)), seed=0).per_sample
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(method.generate(torch.arange(3), 0).x).all())


# ---- it trains ---------------------------------------------------------------------------------------------------

CHOICES = [
    {"loss": loss, "variance": variance, "time_law": law}
    for loss in ("simple", "bound", "hybrid")
    for variance in ("beta", "beta_tilde", "learned")
    for law in ("levels", "second_moment")
    if (loss, variance) != ("simple", "learned")
]


def moves(method, folder, **keys):
    """Two steps change every weight, and all stay finite."""
    before = weights(method)
    fit(method, centred(), folder, 64, limit_val_batches=1.0, **keys)
    after = weights(method)
    assert method.skipped_steps == 0
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    assert bool(torch.isfinite(method.generate(torch.arange(2), 0).x).all())


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: ", ".join(choice.values()))
def test_every_loss_variance_and_law_trains(tmp_path, choice):
    moves(ddpm(**choice), tmp_path)


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_every_parametrization_trains(tmp_path, parametrization, loss):
    moves(
        ddpm(parametrization=parametrization, loss=loss, variance="beta" if loss == "simple" else "learned"), tmp_path
    )


@pytest.mark.parametrize("c_noise", ["index", "log_sigma", "quarter_log_sigma", "time", "time_999"])
def test_every_noise_input_and_schedule_trains(tmp_path, c_noise):
    moves(ddpm(c_noise=c_noise, schedule="cosine"), tmp_path)


def few():
    """Four digits again and again."""
    return DataModule(InMemory(digits()._values[:4], num_grey_levels=17), 32, (-1.0, 1.0), held_out_fraction=0.0)


def over_all_levels(method):
    """The mean loss of the four digits at all levels, with fixed noise."""
    method.data_spec = few().data_spec
    x = few().normalize(torch.from_numpy(digits()._values[:4])).repeat(8, 1, 1, 1)
    eps, level = keyed_normal(7, "fixed", torch.arange(32), (1, 8, 8)), torch.arange(8).repeat_interleave(4)
    with torch.no_grad():
        loss = method.objective.at(
            method.denoiser, x, (level + 1) / 8, eps, None, method.data_spec.grey_levels
        ).per_sample
    return float(loss.mean())


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"time_law": "second_moment"},
        {"parametrization": "x0"},
        {"parametrization": "v"},
        {"loss": "bound"},
        {"loss": "bound", "variance": "learned", "time_law": "second_moment"},
        {"loss": "hybrid", "variance": "learned"},
    ],
    ids=lambda choice: ", ".join(choice.values()) or "default",
)
def test_the_loss_falls(tmp_path, choice):
    method = ddpm({"channels": 8}, **choice)
    before = over_all_levels(method)
    fit(method, few(), tmp_path, 32 * 40)
    assert over_all_levels(method) < 0.75 * before


def test_the_hybrid_trains_the_variance(tmp_path):
    """Its bound falls below that of a network whose variance was left where it began."""
    method, fresh = (ddpm({"channels": 8}, loss="hybrid", variance="learned") for _ in range(2))
    fit(method, few(), tmp_path, 32 * 40)
    method.objective = DiffusionObjective(8, "bound", "learned")
    learned = over_all_levels(method)
    with torch.no_grad():
        for p, begun in zip(
            method.denoiser.backbone.second.parameters(), fresh.denoiser.backbone.second.parameters(), strict=True
        ):
            p[1] = begun[1]
    assert learned < over_all_levels(method)


# ---- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DDPM, DDIM])
@pytest.mark.parametrize("variance", ["beta", "learned"])
def test_samples_depend_on_seed_and_number_alone(tmp_path, make, variance):
    keys = {"sampler": DDIMSampler(steps=4)} if make is DDIM else {}
    method = ddpm(make=make, variance=variance, loss="hybrid", **keys)
    fit(method, centred(), tmp_path, 64)
    first = method.generate(torch.arange(6), seed=3).x
    assert torch.equal(first, method.generate(torch.arange(6), seed=3).x)
    assert not torch.equal(first, method.generate(torch.arange(6), seed=4).x)
    for size in (1, 4):
        parts = torch.cat([method.generate(indices, seed=3).x for indices in torch.arange(6).split(size)])
        difference = to_uint8(first, (-1.0, 1.0)).astype(int) - to_uint8(parts, (-1.0, 1.0))
        assert np.abs(difference).max() <= 1
    assert len({image.tobytes() for image in first.numpy()}) == 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of each: what was trained, and the checkpoint that it left."""
    folder = tmp_path_factory.mktemp("checkpoints")
    makers = {
        "DDPM": ddpm,
        "DDPM, learned": lambda **keys: ddpm(loss="hybrid", variance="learned", **keys),
        "NCSN": ncsn,
    }
    for name, make in makers.items():
        fit(make(), digits_data(), folder, 96).save_checkpoint(folder / f"{name}.ckpt")
    return {name: (make, folder / f"{name}.ckpt") for name, make in makers.items()}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", ["DDPM", "DDPM, learned", "NCSN"])
def test_a_checkpoint_is_sampled_by_every_sampler(checkpoints, name, walk):
    make, path = checkpoints[name]
    method = make(seed=5)
    method.load_state_dict(state(path)["state_dict"])
    method.data_spec = digits_data().data_spec
    sampler = WALKS[walk]
    sampler.check(method.denoiser)
    images = method.generate(torch.arange(4), 0, sampler=sampler).x
    assert images.shape == (4, 1, 8, 8)
    assert bool(torch.isfinite(images).all())
    assert len({image.tobytes() for image in images.numpy()}) == 4
    assert torch.equal(images, method.generate(torch.arange(4), 0, sampler=sampler).x)


def test_a_learned_variance_is_that_of_the_samples(checkpoints):
    for name, fits in (("DDPM, learned", True), ("DDPM", False), ("NCSN", False)):
        make, path = checkpoints[name]
        method = make()
        method.load_state_dict(state(path)["state_dict"])
        method.data_spec = digits_data().data_spec
        sampler = Ancestral(steps=3, variance="learned")
        if fits:
            learned = method.generate(torch.arange(4), 0, sampler=sampler).x
            assert not torch.equal(learned, method.generate(torch.arange(4), 0, sampler=Ancestral(3, "beta")).x)
            assert torch.equal(learned, method.generate(torch.arange(4), 0, sampler=WALKS["ancestral"]).x)
            assert method.sampler.variance == "learned"
        else:
            with pytest.raises(UserError, match="has not learned a reverse variance"):
                method.generate(torch.arange(4), 0, sampler=sampler)


# ---- the law of the levels ---------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    """Weights, and what the law of the levels remembers; it is uneven from about the fifth step on."""

    def method(seed=0):
        return ddpm(
            {"dropout": 0.3}, seed, loss="hybrid", variance="learned", time_law="second_moment", num_timesteps=4
        )

    straight = method()
    fit(straight, centred(micro_batch_size=20), tmp_path, 480)
    broken = method()
    for number, stop in enumerate([32, 160, 192, 480]):
        last = tmp_path / f"{number - 1}.ckpt" if number else None
        made = fit(broken, centred(micro_batch_size=20), tmp_path, stop, ckpt_path=last)
        made.save_checkpoint(tmp_path / f"{number}.ckpt")
        broken = method(seed=number + 1)
    ended = state(tmp_path / "3.ckpt")["state_dict"]
    assert same(ended, straight.state_dict())
    assert int(ended["objective.time_law.counts"].sum()) == 480
    p = straight.objective.time_law.probabilities()
    assert float(p.max() / p.min()) > 1.2


@pytest.mark.parametrize("micro_batch_size", [1, 5, 20])
def test_what_it_remembers_does_not_depend_on_micro_batches(tmp_path, micro_batch_size):
    whole, parts = (ddpm(time_law="second_moment", num_timesteps=4) for _ in range(2))
    fit(whole, centred(), tmp_path, 192)
    fit(parts, centred(micro_batch_size=micro_batch_size), tmp_path, 192)
    assert torch.equal(law(whole)["counts"], law(parts)["counts"])
    assert torch.allclose(law(whole)["history"], law(parts)["history"], rtol=1e-3)
    assert float(law(whole)["history"].min()) > 0.0


def test_it_remembers_the_losses_in_the_order_of_the_batch(tmp_path):
    """Of all processes: as if two had 16 images each, gathered as ``[processes, images]``."""
    method, told = ddpm(time_law="second_moment", num_timesteps=4), []
    update = method.objective.time_law.update
    method.objective.time_law.update = lambda index, loss: (told.append((index, loss)), update(index, loss))
    method.all_gather = lambda rows: rows.view(2, 16)
    fit(method, centred(), tmp_path, 32)
    ((level, loss),) = told
    assert torch.equal(level, (method.last_step.losses["denoiser"].t * 4).round().long() - 1)
    assert torch.equal(loss, method.last_step.losses["denoiser"].shown)
    assert law(method)["counts"].tolist() == torch.bincount(level, minlength=4).tolist()


def test_a_step_that_is_not_finite_is_not_remembered(tmp_path):
    method = ddpm(time_law="second_moment", num_timesteps=4)
    loss = method.loss

    def spoilt(batch, seed):
        result = loss(batch, seed)
        factor = float("nan") if method.clock.steps == 1 else 1.0
        return replace(result, per_sample=result.per_sample * factor, unweighted=result.shown * factor)

    method.loss = spoilt
    fit(method, centred(), tmp_path, 96)
    assert method.skipped_steps == 1
    assert int(law(method)["counts"].sum()) == 64
    assert bool(torch.isfinite(law(method)["history"]).all())


def test_held_out_images_teach_it_nothing(tmp_path):
    method = ddpm(time_law="second_moment", num_timesteps=4)
    fit(method, centred(), tmp_path, 64, limit_val_batches=1.0, val_check_interval=1)
    assert int(law(method)["counts"].sum()) == 64


# ---- DDIM --------------------------------------------------------------------------------------------------------


def test_ddim_is_ddpm_but_for_the_sampler(tmp_path):
    assert isinstance(DDIM(Convolutions()).sampler, DDIMSampler)
    assert (DDIM(Convolutions()).sampler.steps, DDIM(Convolutions()).sampler.eta) == (50, 0.0)
    keys = {"loss": "hybrid", "variance": "learned"}
    first, second = ddpm(**keys), ddpm(make=DDIM, sampler=DDIMSampler(steps=4), **keys)
    for method in (first, second):
        fit(method, centred(), tmp_path, 96)
    assert same(weights(first), weights(second))
    assert torch.equal(
        second.generate(torch.arange(3), 0).x, first.generate(torch.arange(3), 0, sampler=DDIMSampler(steps=4)).x
    )
    with pytest.raises(UserError, match="visits 50 timesteps and the model has 8") as caught:
        fit(ddpm(make=DDIM), centred(), tmp_path, 32)  # before the work, not after it
    assert "\n" not in str(caught.value)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_timesteps": 1}, "num_timesteps is 1"),
        ({"schedule": "quadratic"}, "schedule is 'quadratic'.*cosine"),
        ({"beta_T": 1.5}, "strictly between 0 and 1"),
        ({"beta_1": 0.0}, "strictly between 0 and 1"),
        ({"parametrization": "epsilon"}, "parametrization is 'epsilon'"),
        ({"c_noise": "sigma"}, "c_noise is 'sigma'"),
        ({"variance": "large"}, "variance is 'large'.*learned"),
        ({"loss": "vlb"}, "loss is 'vlb'.*hybrid"),
        ({"time_law": "importance"}, "time_law is 'importance'.*second_moment"),
        ({"variance": "learned"}, "loss: simple does not train"),
        ({"variance": "learned", "loss": "bound", "network": {"out_channels": 1}}, "need out_channels: 2"),
        ({"network": {"out_channels": 2}}, "need out_channels: 1"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_is_refused_in_one_line(keys, said):
    with pytest.raises(UserError, match=said) as caught:
        ddpm(**keys)
    assert "\n" not in str(caught.value)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Fit a tiny configuration of a method's keys; returns what its run wrote as configuration and weights."""
    monkeypatch.chdir(tmp_path)

    def call(class_path="DDPM", backbone=None, **init_args):
        config = copy.deepcopy(CONFIG)
        unet = config["model"]["init_args"]["backbone"]
        unet["init_args"].update(backbone or {})
        config["model"] = {"class_path": class_path, "init_args": {"num_timesteps": 4, "backbone": unet, **init_args}}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        dispatch(["fit", "--config", "tiny.yaml", "--run_dir", "run"])
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()), state(
            tmp_path / "run/checkpoints/last.ckpt"
        )

    return call


@pytest.mark.parametrize("variance", ["learned", "beta"])
def test_a_learned_variance_doubles_the_output_channels(run, variance):
    config, saved = run(variance=variance, loss="hybrid", time_law="second_moment")
    found = config["model"]["init_args"]["backbone"]["init_args"]
    assert found["data_shape"] == [1, 8, 8]
    assert found["out_channels"] == (2 if variance == "learned" else None)
    assert saved["lit_diffusion"]["images_seen"] == 64
    assert int(saved["state_dict"]["objective.time_law.counts"].sum()) == 64


def test_channels_that_are_given_are_left_as_they_are(run):
    config, _ = run(variance="learned", loss="bound", backbone={"out_channels": 2})
    assert config["model"]["init_args"]["backbone"]["init_args"]["out_channels"] == 2
    with pytest.raises(UserError, match="need out_channels: 2"):
        run(variance="learned", loss="bound", backbone={"out_channels": 3})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"variance": "learned"}, "loss: simple does not train a learned variance"),
        ({"losss": "bound"}, "losss"),
        ({"loss": "vlb"}, "loss.*'vlb'"),
        ({"gradient_clips": 1.0}, "gradient_clips"),
        ({"num_timesteps": 1}, "num_timesteps is 1"),
        ({"class_path": "DDIM"}, "visits 50 timesteps and the model has 4"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_the_command_line_refuses_in_one_line(run, tmp_path, keys, said):
    with pytest.raises(UserError, match=said) as caught:
        run(**keys)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/checkpoints/*"))
