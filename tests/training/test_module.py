"""Several networks with an optimizer each: a loss moves its own, all step or none; and a module without a denoiser."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny import (
    Convolutions,
    TwoNetworks,
    digits_data,
    events,
    fit,
    ncsn,
    run_logger,
    same,
    trainer,
    two_networks,
    weights,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lit_diffusion.callbacks import EMA, Checkpoint, Telemetry
from lit_diffusion.checkpoints import load, read_checkpoint
from lit_diffusion.errors import UserError
from lit_diffusion.objectives import Loss
from lit_diffusion.training.callback import Callback
from lit_diffusion.training.module import TrainedModule


def parts(values):
    """Weights by the network that they belong to."""
    return {
        name: {key: value for key, value in values.items() if key.startswith(f"{name}.")}
        for name in ("denoiser", "autoencoder")
    }


def moved(module, start):
    """The networks whose weights are others than at the start, weight by weight."""
    now = weights(module)
    return {name: [not torch.equal(now[key], start[key]) for key in part] for name, part in parts(start).items()}


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


class Watch(Callback):
    """Notes what each step left behind."""

    def __init__(self, note):
        self.note, self.notes = note, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append(self.note(trainer, pl_module))


def spoilt(module, name, value, step=2):
    """Give the loss of one network another value in one step."""
    losses = module.losses

    def wrong(batch, seed):
        found = losses(batch, seed)
        factor = value if module.clock.steps + 1 == step else 1.0
        return {**found, name: replace(found[name], per_sample=found[name].per_sample * factor)}

    module.losses = wrong
    return module


# ---- two networks, two optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "other"), [("denoiser", "autoencoder"), ("autoencoder", "denoiser")])
def test_the_gradient_of_a_loss_reaches_its_own_network_alone(tmp_path, changed, other):
    """A loss three times as large changes its network's step and not a bit of the other's; both share a forward."""
    ends = []
    for factor in (1.0, 3.0):
        module = spoilt(two_networks(optimizer=sgd(1e-3)), changed, factor, step=1)
        start = weights(module)
        fit(module, digits_data(), tmp_path, 32)
        assert all(each for of_network in moved(module, start).values() for each in of_network)
        ends.append(parts(weights(module)))
    assert same(ends[0][other], ends[1][other])
    assert not same(ends[0][changed], ends[1][changed])


def test_each_network_has_the_gradient_of_its_loss_by_autograd(tmp_path):
    module, data = two_networks(optimizer=sgd(1.0)), digits_data()  # These data begin with the first image.
    start = weights(module)
    fit(module, digits_data(), tmp_path, 32)
    again = two_networks()
    again.data_spec = data.data_spec
    order = next(iter(data.train_dataloader()))
    batch = data.prepare(order["value"], order["label"], order["index"], training=True)
    losses = again.losses(batch, 0)
    for name, network in again.trained().items():
        gradients = torch.autograd.grad(losses[name].per_sample.mean(), list(network.parameters()), retain_graph=True)
        for (key, _), gradient in zip(network.named_parameters(), gradients, strict=True):
            full = f"{name}.{key}"
            assert torch.allclose(start[full] - weights(module)[full], gradient, atol=1e-4, rtol=1e-3), full


def test_max_steps_counts_steps_of_the_clock(tmp_path):
    module = two_networks()
    made = fit(module, digits_data(), tmp_path, None, max_steps=5)
    assert (module.clock.steps, module.clock.images, made.global_step) == (5, 160, 5)


@pytest.mark.parametrize("micro_batch_size", [1, 10])
def test_micro_batches_change_nothing_but_memory(tmp_path, micro_batch_size):
    whole, parted = two_networks(gradient_clip=5.0), two_networks(gradient_clip=5.0)
    fit(whole, digits_data(), tmp_path, 64)
    fit(parted, digits_data(micro_batch_size=micro_batch_size), tmp_path, 64)
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parted)[name], atol=1e-5), name
    assert torch.allclose(whole.remembered, parted.remembered, rtol=1e-5)


def test_a_continued_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    """Weights of both networks, averages, both optimizers, the buffer that is written after a step."""
    ends = []
    for stops in ([128], [32, 96, 128]):
        for number, images in enumerate(stops):
            module, ema = two_networks(seed=number, warmup_images=100), EMA([64], ramp=1.0)
            ckpt_path = tmp_path / f"{stops[number - 1]}.ckpt" if number else None
            made = fit(module, digits_data(), tmp_path, images, callbacks=[ema], ckpt_path=ckpt_path)
            made.save_checkpoint(tmp_path / f"{images}.ckpt")
        saved = read_checkpoint(tmp_path / "128.ckpt")
        ends.append((saved["state_dict"], saved["callbacks"]["EMA"]["shadows"][0], saved["optimizer_states"]))
    (state, shadow, optimizers), (state_2, shadow_2, optimizers_2) = ends
    assert same(state, state_2)
    assert same(shadow, shadow_2)
    assert shadow.keys() == {name for name, _ in module.named_parameters()}
    assert len(optimizers) == len(optimizers_2) == 2
    for first, second in zip(optimizers, optimizers_2, strict=True):
        for number, moments in first["state"].items():
            assert same(moments, second["state"][number])
    opened = load(tmp_path / "128.ckpt", "ema", method=two_networks(seed=7))
    assert same(weights(opened), shadow)
    assert not same({name: state[name] for name in shadow}, shadow)


def test_what_the_losses_keep_is_in_the_batchs_order(tmp_path):
    module = two_networks()
    fit(module, digits_data(micro_batch_size=7), tmp_path, 32)
    assert torch.equal(module.remembered, module.last_step.losses["autoencoder"].kept["size"])
    assert float(module.remembered.min()) > 0.0


@pytest.mark.parametrize("name", ["denoiser", "autoencoder"])
def test_where_one_loss_is_not_finite_no_network_steps(tmp_path, name, capsys):
    module, ema = spoilt(two_networks(), name, math.nan), EMA([64])
    watch = Watch(lambda trainer, m: (weights(m), m.remembered.clone(), m.last_step.made, m.skipped_steps))
    logger = run_logger(tmp_path, module)
    fit(module, digits_data(), tmp_path, 96, callbacks=[ema, watch], logger=logger)
    assert [(made, skipped) for *_, made, skipped in watch.notes] == [(True, 0), (False, 1), (True, 1)]
    (first, buffer, *_), (second, buffer_after, *_), (third, *_) = watch.notes
    assert same(first, second)
    assert torch.equal(buffer, buffer_after)
    assert ema.updates == 2
    assert not same(parts(second)[name], parts(third)[name])
    said = "noise level sigma/alpha" if name == "denoiser" else "the loss of image 32 is nan\n"
    assert said in capsys.readouterr().out
    (event,) = events(tmp_path / "run", "skipped")
    assert ("sigma_over_alpha" in event) == (name == "denoiser")


def test_where_float16_overflows_for_one_network_none_steps_and_the_scale_falls_once(tmp_path):
    module, ema = two_networks(), EMA([64])
    made = trainer(tmp_path, 32, precision="16-mixed", callbacks=[ema])
    made.precision_plugin.scaler._init_scale = 256.0
    assert isinstance(made.precision_plugin, MixedPrecision)
    module.autoencoder["decoder"].weight.register_hook(lambda gradient: gradient * math.inf)
    start = weights(module)
    made.fit(module, datamodule=digits_data())
    assert same(start, weights(module))
    assert module.last_step.overflowed
    assert made.precision_plugin.scaler.get_scale() == 128.0
    assert all(not optimizer.state for optimizer in made.optimizers)
    assert (module.clock.steps, made.global_step, ema.updates, module.skipped_steps) == (1, 1, 0, 0)


def test_both_train_under_float16(tmp_path):
    ends = []
    for precision in ("32-true", "16-mixed"):
        module = two_networks()
        made = trainer(tmp_path, 96, precision=precision)
        if precision == "16-mixed":
            made.precision_plugin.scaler._init_scale = 256.0
        made.fit(module, datamodule=digits_data())
        assert module.last_step.made
        ends.append(torch.cat([p.flatten() for p in module.parameters()]).detach())
    assert 0.0 < float((ends[0] - ends[1]).abs().max()) < 0.02


def test_options_are_for_all_networks_or_by_name(tmp_path):
    module = two_networks(
        optimizer=sgd(1.0),
        optimizers={"autoencoder": sgd(4.0)},
        gradient_clip={"denoiser": 0.5, "autoencoder": 0.25},
        warmup_images={"autoencoder": 64},
    )
    start = weights(module)
    logger = run_logger(tmp_path, module)
    made = fit(module, digits_data(), tmp_path, 32, callbacks=[Telemetry(every_n_steps=1)], logger=logger)
    assert [optimizer.param_groups[0]["lr"] for optimizer in made.optimizers] == [1.0, 2.0]
    steps = {
        name: torch.cat([(value - start[key]).flatten() for key, value in part.items()]).norm()
        for name, part in parts(weights(module)).items()
    }
    assert {name: float(step) for name, step in steps.items()} == pytest.approx(
        {"denoiser": 0.5, "autoencoder": 0.5}, rel=1e-4
    )
    (event,) = events(tmp_path / "run", "train")
    assert (event["denoiser/learning_rate"], event["autoencoder/learning_rate"]) == (1.0, 2.0)
    losses = module.last_step.losses
    for name in ("reconstruction", "size"):
        assert event[f"autoencoder/{name}"] == pytest.approx(float(losses["autoencoder"].terms[name].mean()), rel=1e-5)
    assert event["loss"] == pytest.approx(event["denoiser/loss"] + event["autoencoder/loss"], rel=1e-5)
    assert {key.partition("@")[0] for key in event if "@" in key} == {"denoiser/loss"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optimizers": {"encoder": sgd(1.0)}}, "trains no 'encoder'; give options for denoiser, autoencoder"),
        ({"gradient_clip": {"decoder": 1.0}}, "trains no 'decoder'"),
        ({"warmup_images": {"x": 1}}, "trains no 'x'"),
    ],
)
def test_options_of_a_network_that_there_is_not_are_refused(tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        fit(two_networks(**keys), digits_data(), tmp_path, 32)
    with pytest.raises(UserError, match="gradient_clip is -1"):
        two_networks(gradient_clip={"denoiser": -1.0})


# ---- what no optimizer holds ---------------------------------------------------------------------------------------


def test_a_parameter_that_no_optimiser_holds_is_refused_by_name_at_set_up(tmp_path):
    method = ncsn()
    method.teacher = nn.Linear(2, 2)
    with pytest.raises(
        UserError, match=r"NCSN: the parameter teacher.weight requires a gradient, and no optimizer"
    ) as said:
        fit(method, digits_data(), tmp_path)
    assert "\n" not in str(said.value)
    assert method.clock.steps == 0
    method.teacher.requires_grad_(False)
    fit(method, digits_data(), tmp_path, 32)
    assert method.clock.steps == 1


def test_a_parameter_of_two_networks_is_refused(tmp_path):
    module = two_networks()
    module.autoencoder["shared"] = module.denoiser.backbone.first
    with pytest.raises(UserError, match="belongs to denoiser and to autoencoder"):
        fit(module, digits_data(), tmp_path)


# ---- no denoiser, no sampler ---------------------------------------------------------------------------------------


class Classifier(TrainedModule):
    """Tells the digits apart."""

    def __init__(self, **training):
        super().__init__(**training)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def trained(self):
        return {"classifier": self.network}

    def loss(self, batch, seed):
        said = self.network(batch.x)
        right = (said.argmax(1) == batch.cond.label).to(said.dtype)
        return Loss(nn.functional.cross_entropy(said, batch.cond.label, reduction="none"), terms={"accuracy": right})


def test_a_plain_classifier_is_trained_without_a_denoiser_or_a_sampler(tmp_path):
    torch.manual_seed(0)
    module, ema = Classifier(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-2)), EMA([320])
    callbacks = [ema, Telemetry(every_n_steps=10), Checkpoint(every_n_steps=10)]
    keys = {"callbacks": callbacks, "logger": run_logger(tmp_path, module), "limit_val_batches": 1.0}
    made = fit(module, digits_data(128), tmp_path, 3840, val_check_interval=10, **keys)
    first, *_, last = events(tmp_path / "run", "train")
    assert first["loss"] > 2 * last["loss"]
    assert last["accuracy"] > 0.9
    assert not any("@" in key for key in last)  # Its loss has no noise level.
    assert float(made.callback_metrics["val/accuracy"]) > 0.8
    assert float(made.callback_metrics["val/loss"]) < 0.7
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert list(saved["callbacks"]["EMA"]["shadows"][0]) == ["network.1.weight", "network.1.bias"]
    again = Classifier()
    fit(again, digits_data(128), tmp_path, 3840, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert same(weights(module), weights(again))


def test_a_step_of_it_that_is_not_finite_names_the_image(tmp_path, capsys):
    module = Classifier()
    loss = module.loss

    def wrong(batch, seed):
        found = loss(batch, seed)
        broken = (batch.index == 41) & module.training
        return replace(found, per_sample=torch.where(broken, math.inf, found.per_sample))

    module.loss = wrong
    fit(module, digits_data(), tmp_path, 96, logger=run_logger(tmp_path, module))
    assert "step 2 changed nothing: the loss of image 41 is inf\n" in capsys.readouterr().out
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["reason"], event.get("t")) == ("the loss of image 41 is inf", None)


def test_networks_are_run_as_the_trainer_says_whoever_holds_them(tmp_path):
    class Scored(Classifier):
        def __init__(self):
            super().__init__()
            self.network = Convolutions(out_channels=10)

        def loss(self, batch, seed):
            said = self.network.evaluate(batch.x, batch.x.new_zeros(len(batch))).mean((2, 3)).float()
            return Loss(nn.functional.cross_entropy(said, batch.cond.label, reduction="none"))

    module, seen = Scored(), set()
    module.network.first.register_forward_hook(lambda network, args, out: seen.add(out.dtype) if len(out) > 1 else None)
    fit(module, digits_data(), tmp_path, 32, precision="bf16-mixed")
    assert seen == {torch.bfloat16}
    assert module.flops > 0


# ---- encode and decode ---------------------------------------------------------------------------------------------


def test_training_diffuses_what_the_encoder_makes_and_the_encoders_noise_is_keyed(tmp_path):
    module = two_networks(optimizer=sgd(0.0))
    seen, loss = {}, module.loss
    module.loss = lambda batch, seed: (seen.update({module.clock.images: batch.x.detach()}), loss(batch, seed))[1]
    fit(module, digits_data(), tmp_path, 64)
    again = two_networks(optimizer=sgd(0.0))
    seen_again, loss_again = [], again.loss
    again.loss = lambda batch, seed: (seen_again.append(batch.x.detach()), loss_again(batch, seed))[1]
    fit(again, digits_data(micro_batch_size=8), tmp_path, 64)
    assert torch.allclose(torch.cat(list(seen.values())), torch.cat(seen_again), atol=1e-6)
    assert not torch.allclose(seen[0], seen[32])


def test_samples_are_decoded_each_with_noise_of_its_own():
    method = two_networks()
    method.data_spec = digits_data().data_spec
    together = method.generate(torch.arange(4), 3).x
    assert torch.allclose(together[2:], method.generate(torch.arange(2, 4), 3).x, atol=1e-6)
    assert not together.requires_grad
    plain = TwoNetworks.decode
    try:
        TwoNetworks.decode = lambda self, z, noise, cond: plain(self, z, noise, cond) - 0.01 * noise.normal()
        changed = method.generate(torch.arange(4), 3).x
    finally:
        TwoNetworks.decode = plain
    assert 0.0 < float((together - changed).abs().max()) < 0.1
    assert method.denoiser.data_range is None
    assert method.grey_levels is None
