"""The one way from losses to weights, the clock it ticks, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.tiny import (
    ddpm,
    digits,
    digits_data,
    events,
    fit,
    flow_matching,
    ncsn,
    points_data,
    run_logger,
    same,
    toy_dsm,
    trainer,
    weights,
)

from lit_diffusion.callbacks import EMA, Checkpoint
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.methods import DDPM, NCSN
from lit_diffusion.methods.base import Encoded
from lit_diffusion.randomness import SampleNoise, keyed_normal
from lit_diffusion.samplers import DDIM
from lit_diffusion.training.datamodule import Batch, DataModule


class Watch(pl.Callback):
    """Notes what each step left behind."""

    def __init__(self, note):
        self.note, self.notes = note, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append(self.note(trainer, pl_module))


def spoil(method, *steps, value=math.nan):
    """Give the losses of these steps (from 1) another value."""
    loss = method.loss

    def spoilt(batch, seed):
        result = loss(batch, seed)
        factor = value if method.clock.steps + 1 in steps and method.training else 1.0
        return replace(result, per_sample=result.per_sample * factor)

    method.loss = spoilt
    return method


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


# ---- accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 5, 8, 31])
def test_micro_batches_change_nothing_but_memory(tmp_path, micro_batch_size):
    whole, parts = ncsn(optimizer=sgd(1e-3)), ncsn(optimizer=sgd(1e-3))
    norms = []
    for method, size in ((whole, None), (parts, micro_batch_size)):
        watch = Watch(lambda trainer, m: (float(m.last_step.loss), float(m.last_step.gradient_norm)))
        fit(method, digits_data(micro_batch_size=size), tmp_path, callbacks=[watch])
        norms.append(watch.notes)
    assert norms[0] == [pytest.approx(note, rel=1e-5) for note in norms[1]]
    assert len(norms[0]) == 3
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], atol=1e-6), name
    assert max(shape[0] for shape in parts.denoiser.backbone.seen) == micro_batch_size
    assert not same(weights(whole), weights(ncsn()))


def test_only_the_last_part_is_averaged_over_the_processes(tmp_path, monkeypatch):
    from contextlib import contextmanager

    from lightning.pytorch.strategies import SingleDeviceStrategy

    held, backwards = [False], []

    @contextmanager
    def block_backward_sync(self):
        held[0] = True
        yield
        held[0] = False

    monkeypatch.setattr(SingleDeviceStrategy, "block_backward_sync", block_backward_sync, raising=False)
    method = ncsn()
    backward = method.manual_backward
    method.manual_backward = lambda loss: (backwards.append(held[0]), backward(loss))[1]
    fit(method, digits_data(micro_batch_size=10), tmp_path, 64)
    assert backwards == [True, True, True, False] * 2


def test_the_loss_is_the_mean_over_the_batch(tmp_path):
    method, data = ncsn(optimizer=sgd(0.0)), digits_data()
    fit(method, data, tmp_path, 32)
    raw = next(iter(data.train_dataloader()))
    # The trainer's data module starts where the clock stands: images 32 .. 63.
    batch = data.prepare(raw["value"], raw["label"], raw["index"], training=True)
    expected = method.loss(batch, 0).per_sample.mean()
    fit(method, data, tmp_path, 64)
    assert float(method.last_step.loss) == pytest.approx(float(expected.detach()), rel=1e-6)


# ---- steps that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_clock(tmp_path, value):
    method, ema = spoil(ncsn(), 2, value=value), EMA([64])
    watch = Watch(
        lambda trainer, m: {
            "weights": weights(m),
            "ema": {k: v.clone() for k, v in ema.shadows[0].items()},
            "moments": [s["exp_avg"].clone() for s in trainer.optimizers[0].state.values()],
            "count": float(next(iter(trainer.optimizers[0].state.values()))["step"]),
            "clock": (m.clock.images, m.clock.steps, m.skipped_steps, m.last_step.made),
        }
    )
    fit(method, digits_data(), tmp_path, 96, callbacks=[ema, watch])
    first, second, third = watch.notes
    assert same(first["weights"], second["weights"])
    assert same(first["ema"], second["ema"])
    assert all(torch.equal(a, b) for a, b in zip(first["moments"], second["moments"], strict=True))
    assert (first["count"], second["count"], third["count"]) == (1, 1, 2)
    assert [note["clock"] for note in watch.notes] == [(32, 1, 0, True), (64, 2, 1, False), (96, 3, 1, True)]
    assert not same(second["weights"], third["weights"])
    assert not same(second["ema"], third["ema"])


def test_a_loss_that_is_not_finite_with_a_gradient_that_is(tmp_path):
    method = ncsn()
    loss = method.loss

    def shifted(batch, seed):
        result = loss(batch, seed)
        shift = math.inf if method.clock.steps == 1 else 0.0
        return replace(result, per_sample=result.per_sample + shift)

    method.loss = shifted
    watch = Watch(lambda trainer, m: (weights(m), m.last_step.made, math.isfinite(float(m.last_step.gradient_norm))))
    fit(method, digits_data(), tmp_path, 96, callbacks=[watch])
    assert [(stepped, finite) for _, stepped, finite in watch.notes] == [(True, True), (False, True), (True, True)]
    assert same(watch.notes[0][0], watch.notes[1][0])


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path):
    method = ncsn()
    calls = []
    method.denoiser.backbone.first.weight.register_hook(
        lambda gradient: (calls.append(1), gradient * (math.inf if len(calls) == 2 else 1.0))[1]
    )
    watch = Watch(lambda trainer, m: (weights(m), m.last_step.made, m.skipped_steps))
    fit(method, digits_data(), tmp_path, 96, callbacks=[watch])
    assert [(stepped, skipped) for _, stepped, skipped in watch.notes] == [(True, 0), (False, 1), (True, 1)]
    assert same(watch.notes[0][0], watch.notes[1][0])


def test_the_noise_goes_on_as_if_nothing_had_been_skipped(tmp_path):
    seen = []
    for steps in ((), (2,)):
        method, indices = spoil(ncsn(), *steps), []
        loss = method.loss
        method.loss = lambda batch, seed, loss=loss, indices=indices: (indices.append(batch.index), loss(batch, seed))[
            1
        ]
        fit(method, digits_data(), tmp_path, 96)
        seen.append(torch.cat(indices).tolist())
    assert seen[0] == seen[1] == list(range(96))


def test_three_in_a_row_end_the_run_and_the_checkpoint_before_is_intact(tmp_path):
    method = spoil(ncsn(), 2, 5, 6, 7)
    logger = run_logger(tmp_path, method)
    with pytest.raises(UserError, match=r"at step 7 \(224 images\), 3 times in a row: the loss of im") as caught:
        fit(method, digits_data(), tmp_path, 640, callbacks=[Checkpoint(every_n_steps=4), EMA([64])], logger=logger)
    assert "\n" not in str(caught.value)
    assert method.skipped_steps == 4
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["lit_diffusion"]["images_seen"] == 128
    everything = [*saved["state_dict"].values(), *saved["callbacks"]["EMA"]["shadows"][0].values()]
    assert all(bool(torch.isfinite(value).all()) for value in everything)


def test_two_in_a_row_do_not(tmp_path):
    method = spoil(ncsn(), 1, 2, 4, 5)
    fit(method, digits_data(), tmp_path, 192).save_checkpoint(tmp_path / "a.ckpt")
    assert (method.clock.steps, method.skipped_steps) == (6, 4)
    later = spoil(ncsn(), 7)
    fit(later, digits_data(), tmp_path, 256, ckpt_path=tmp_path / "a.ckpt")
    assert (later.clock.steps, later.skipped_steps) == (8, 5)


def test_the_count_of_steps_in_a_row_goes_on_over_a_resume(tmp_path):
    fit(spoil(ncsn(), 3, 4), digits_data(), tmp_path, 128).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"at step 5 .*3 times in a row"):
        fit(spoil(ncsn(), 5), digits_data(), tmp_path, 640, ckpt_path=tmp_path / "a.ckpt")


def level_of(method, number):
    """Sigma of the noise that image ``number`` is given, noted while it trains, and its t."""
    noted, loss = {}, method.loss

    def noting(batch, seed):
        result = loss(batch, seed)
        if number in batch.index.tolist() and method.training:
            t = result.t[batch.index == number].double()
            noted["t"], noted["sigma"] = float(t), float(method.denoiser.process.sigma(t))
        return result

    method.loss = noting
    return noted


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_image_and_the_noise_level_are_named(tmp_path, value, micro_batch_size, capsys):
    """Image 41 in the second step; later ones of that step are as broken."""
    method = ncsn()
    noted = level_of(method, 41)
    loss = method.loss

    def spoilt(batch, seed):
        result = loss(batch, seed)
        broken = (batch.index >= 41) & (batch.index < 64) & method.training
        return replace(result, per_sample=torch.where(broken, value, result.per_sample))

    method.loss = spoilt
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(micro_batch_size=micro_batch_size), tmp_path, 96, logger=logger)
    where = f"sigma/alpha {noted['sigma']:.4g} (t {noted['t']:.4g})"
    what = f"the loss of image 41 is {value:g} at noise level {where}"
    assert f"step 2 changed nothing: {what}\n" in capsys.readouterr().out
    (event,) = events(tmp_path / "run", "skipped")
    assert event["reason"] == what
    assert (event["t"], event["sigma_over_alpha"]) == pytest.approx((noted["t"], noted["sigma"]))
    assert (event["step"], event["images"], event["overflow"]) == (2, 64, False)


def test_of_a_gradient_that_is_not_finite_the_largest_loss_is_named(tmp_path, capsys):
    method = ncsn()
    noted = level_of(method, 40)
    loss, steps = method.loss, []

    def one_is_large(batch, seed):
        result = loss(batch, seed)
        return replace(result, per_sample=torch.where(batch.index == 40, 1e6, result.per_sample))

    method.loss = one_is_large
    method.denoiser.backbone.first.weight.register_hook(
        lambda gradient: (steps.append(1), gradient * (math.inf if len(steps) == 2 else 1.0))[1]
    )
    fit(method, digits_data(), tmp_path, 96, logger=run_logger(tmp_path, method))
    where = f"of image 40 at noise level sigma/alpha {noted['sigma']:.4g} (t {noted['t']:.4g})"
    said = f"step 2 changed nothing: the gradient is not finite; the largest loss is 1e+06, {where}\n"
    assert said in capsys.readouterr().out
    (event,) = events(tmp_path / "run", "skipped")
    assert event["overflow"] is False


# ---- learning rate, clipping, the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"warmup_images": 128}, {"warmup_steps": 4}])
def test_the_learning_rate_rises_linearly(tmp_path, keys):
    method = ncsn(optimizer=sgd(8e-3), **keys)
    watch = Watch(lambda trainer, m: trainer.optimizers[0].param_groups[0]["lr"])
    fit(method, digits_data(), tmp_path, 192, callbacks=[watch])
    assert watch.notes == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3])


def test_without_a_warm_up_it_is_constant(tmp_path):
    method = ncsn(optimizer=sgd(8e-3))
    watch = Watch(lambda trainer, m: trainer.optimizers[0].param_groups[0]["lr"])
    fit(method, digits_data(), tmp_path, 96, callbacks=[watch])
    assert watch.notes == [8e-3] * 3


def test_a_warm_up_is_taken_up_where_it_was_and_the_configured_rate_wins(tmp_path):
    first = ncsn(optimizer=sgd(8e-3), warmup_steps=4)
    fit(first, digits_data(), tmp_path, 64).save_checkpoint(tmp_path / "a.ckpt")
    second = ncsn(optimizer=sgd(4e-3), warmup_steps=4)
    watch = Watch(lambda trainer, m: trainer.optimizers[0].param_groups[0]["lr"])
    fit(second, digits_data(), tmp_path, 160, callbacks=[watch], ckpt_path=tmp_path / "a.ckpt")
    assert watch.notes == pytest.approx([3e-3, 4e-3, 4e-3])


def test_the_gradient_is_clipped_to_a_norm(tmp_path):
    steps = {}
    for clip in (None, 0.5, 1e6):
        method = ncsn(optimizer=sgd(1.0), gradient_clip=clip)
        before = weights(method)
        fit(method, digits_data(), tmp_path, 32)
        steps[clip] = torch.cat([(value - before[name]).flatten() for name, value in weights(method).items()])
        norm = float(method.last_step.gradient_norm)  # before it is clipped
        assert norm > 5.0
    assert float(steps[None].norm()) == pytest.approx(norm, rel=1e-4)
    assert torch.equal(steps[1e6], steps[None])
    assert float(steps[0.5].norm()) == pytest.approx(0.5, rel=1e-4)
    assert float(torch.cosine_similarity(steps[0.5], steps[None], dim=0)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("images", "seen"), [(32, 32), (96, 96), (97, 128)])
def test_max_images_ends_the_run_at_the_first_step_that_reaches_it(tmp_path, images, seen):
    method = ncsn()
    made = fit(method, digits_data(), tmp_path, images)
    assert method.clock.images == seen
    assert method.clock.steps == made.global_step == seen // 32


def test_max_steps_ends_it_too(tmp_path):
    method = ncsn()
    fit(method, digits_data(), tmp_path, None, max_steps=5)
    assert method.clock.steps == 5


def test_a_run_that_is_over_makes_no_further_step(tmp_path):
    first = ncsn()
    fit(first, digits_data(), tmp_path, 64).save_checkpoint(tmp_path / "a.ckpt")
    second = ncsn(seed=3)
    made = fit(second, digits_data(), tmp_path, 64, ckpt_path=tmp_path / "a.ckpt")
    assert (second.clock.images, made.global_step) == (64, 2)
    assert same(weights(first), weights(second))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup_images": 3, "warmup_steps": 4}, "warmup_images or warmup_steps"),
        ({"warmup_images": -3}, "cannot be negative"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0"),
        ({"gradient_clip": -1.0}, "gradient_clip is -1"),
    ],
)
def test_a_wrong_configuration_is_refused_when_the_method_is_built(keys, said):
    with pytest.raises(UserError, match=said) as caught:
        ncsn(**keys)
    assert "\n" not in str(caught.value)


def test_a_sampler_that_would_diverge_is_refused_before_the_training(tmp_path):
    from lit_diffusion.samplers import AnnealedLangevin

    method = ncsn(sampler=AnnealedLangevin(2, eta=0.04))
    with pytest.raises(UserError, match=r"4 sigma\^2"):
        fit(method, digits_data(), tmp_path)
    assert method.clock.images == 0


def test_other_data_are_taken_or_refused(tmp_path):
    """A DataLoader's images train, see test_own_loaders.py; what no method can read does not."""
    loader = torch.utils.data.DataLoader([{"image": torch.zeros(1, 8, 8)}] * 8, batch_size=4)
    with pytest.raises(UserError, match="gives a dict with the keys image; give batches of images"):
        trainer(tmp_path).fit(ncsn(), loader)


# ---- resumption --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    keys = {"warmup_images": 100, "gradient_clip": 20.0}
    data = {"flip": True, "dequantize": True, "micro_batch_size": 20}

    def method(seed=0):
        return spoil(ncsn({"dropout": 0.3}, seed, **keys), 3)

    straight = method()
    fit(straight, digits_data(**data), tmp_path, 1920)  # into the second epoch
    broken, stops = method(), [64, 96, 1824, 1920]
    for number, stop in enumerate(stops):
        last = tmp_path / f"{number - 1}.ckpt" if number else None
        made = fit(broken, digits_data(**data), tmp_path, stop, ckpt_path=last)
        made.save_checkpoint(tmp_path / f"{number}.ckpt")
        broken = method(seed=number + 1)
    ends = [torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"], straight.state_dict()]
    assert same(*ends)


@pytest.mark.parametrize(("version", "said"), [(2, "format_version 2, this"), (None, "format_version None, this")])
def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path, version, said):
    fit(ncsn(), digits_data(), tmp_path, 32).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    if version is None:
        del saved["lit_diffusion"]
    else:
        saved["lit_diffusion"]["format_version"] = version
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=said):
        fit(ncsn(), digits_data(), tmp_path, 64, ckpt_path=tmp_path / "a.ckpt")


def test_dropout_is_tied_to_the_images_and_to_the_seed(tmp_path):
    outcomes = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        method = ncsn({"dropout": 0.5})
        method.seed = seed
        torch.manual_seed(noise)  # whatever was drawn before
        fit(method, digits_data(), tmp_path, 32)
        outcomes.append(weights(method))
    assert same(outcomes[0], outcomes[1])
    assert not same(outcomes[0], outcomes[2])


def test_every_step_and_part_drops_others(tmp_path):
    method, masks = ncsn({"dropout": 0.5}, optimizer=sgd(0.0)), []
    dropout = method.denoiser.backbone.dropout
    dropout.register_forward_hook(
        lambda module, args, out: masks.append((out == 0).flatten().tolist()) if module.training else None
    )
    fit(method, digits_data(micro_batch_size=16), tmp_path, 64)
    assert len(masks) == 4
    assert len({tuple(mask) for mask in masks}) == 4


def test_the_noise_of_image_n_is_keyed_by_n(tmp_path):
    method = ncsn()
    captured = {}
    at = method.objective.at

    def noted(denoiser, x0, t, eps, *rest):
        captured[method.clock.images] = eps
        return at(denoiser, x0, t, eps, *rest)

    method.objective.at = noted
    fit(method, digits_data(), tmp_path, 64).save_checkpoint(tmp_path / "a.ckpt")
    later = ncsn()
    later.objective.at = lambda denoiser, x0, t, eps, *rest: (
        captured.update(later=eps),
        at(denoiser, x0, t, eps, *rest),
    )[1]
    fit(later, digits_data(), tmp_path, 96, ckpt_path=tmp_path / "a.ckpt")
    for start, eps in ((0, captured[0]), (32, captured[32]), (64, captured["later"])):
        assert torch.equal(eps, keyed_normal(0, "noise", torch.arange(start, start + 32), (1, 8, 8)))


# ---- held-out loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ncsn, ddpm, flow_matching])
def test_the_loss_is_of_the_noise_that_a_batch_brings(make):
    method, index = make(), torch.arange(6)
    method.data_spec = digits_data().data_spec
    x, eps = torch.zeros(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    found = method.loss(Batch(x, index, eps=eps), 0)
    assert torch.equal(found.per_sample, method.loss_given_t(Batch(x, index), found.t, eps).per_sample)
    assert not torch.equal(found.per_sample, method.loss(Batch(x, index), 0).per_sample)


def test_the_held_out_loss_is_an_average_over_images_with_noise_of_their_own(tmp_path):
    values = []
    for batch in (32, 7, 36):
        method, data = ncsn(), digits_data(batch)
        made = trainer(tmp_path, limit_val_batches=1.0)
        (first,) = made.validate(method, datamodule=data, verbose=False)
        (again,) = made.test(method, datamodule=data, verbose=False)
        assert first["val/loss"] == again["test/loss"]
        values.append(first["val/loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6) == pytest.approx(values[2], rel=1e-6)
    method.seed = 1
    (other,) = made.validate(method, datamodule=data, verbose=False)
    assert other["val/loss"] != values[0]


def test_each_validation_counts_its_own_images_only(tmp_path):
    method, data = ncsn(), digits_data()
    made = fit(method, data, tmp_path, 96, limit_val_batches=1.0, val_check_interval=1)
    at_the_end = float(made.callback_metrics["val/loss"])
    (alone,) = trainer(tmp_path, limit_val_batches=1.0).validate(method, datamodule=data, verbose=False)
    assert at_the_end == pytest.approx(alone["val/loss"], rel=1e-6)


def test_no_held_out_data_no_loss(tmp_path):
    from helpers.tiny import digits

    method = ncsn()
    made = fit(method, DataModule(digits(), 32, held_out_fraction=0.0), tmp_path, 64, limit_val_batches=1.0)
    assert "val/loss" not in made.callback_metrics
    assert method.clock.images == 64


def test_validating_while_training_changes_no_weight(tmp_path):
    ends = []
    for keys in ({}, {"limit_val_batches": 1.0, "val_check_interval": 1}):
        method = ncsn({"dropout": 0.3})
        fit(method, digits_data(flip=True), tmp_path, 96, **keys)
        ends.append(weights(method))
    assert same(*ends)


# ---- samples -----------------------------------------------------------------------------------------------------


def test_generate_leaves_the_mode_as_it_was_and_needs_the_data_spec():
    method = ncsn({"dropout": 0.5})
    with pytest.raises(UserError, match=r"method\.data_spec = datamodule\.data_spec"):
        method.generate(torch.arange(2), seed=0)
    method.data_spec = digits_data().data_spec
    for training in (True, False):
        method.train(training)
        first = method.generate(torch.arange(2), seed=0).x
        assert method.training is training
        assert method.denoiser.backbone.dropout.training is training
        assert torch.equal(first, method.generate(torch.arange(2), seed=0).x)  # no dropout while sampling
    assert first.shape == (2, 1, 8, 8)
    assert not first.requires_grad
    assert method.sample_shape == (1, 8, 8)


def test_the_denoiser_knows_the_range_of_what_is_diffused():
    method = ddpm(num_timesteps=8)
    assert method.denoiser.data_range is None
    method.data_spec = digits_data(value_range=(-1.0, 1.0)).data_spec
    assert method.denoiser.data_range == (-1.0, 1.0)
    free = method.generate(torch.arange(8), 0, sampler=DDIM(8, clip_x0=None)).x
    assert float(free.abs().max()) > 1.0  # What an untrained network predicts.
    assert float(method.generate(torch.arange(8), 0, sampler=DDIM(8)).x.abs().max()) == 1.0
    method.data_spec = points_data().data_spec
    assert method.denoiser.data_range is None

    class Latent(DDPM):
        def encode(self, x, noise):
            return Encoded(3.0 * x, x.new_zeros(len(x)))

    method = ddpm(make=Latent, num_timesteps=8)
    method.data_spec = digits_data().data_spec
    assert method.denoiser.data_range is None


def test_encode_and_decode_are_the_identity_for_most():
    method, x = ncsn(), torch.randn(3, 1, 8, 8)
    noise = SampleNoise(0, torch.arange(3), (1, 8, 8))
    z, nats = method.encode(x, noise)
    assert z is x
    assert method.decode(z, noise, None) is x
    assert torch.equal(nats, torch.zeros(3))


def test_points_train_and_sample_too(tmp_path):
    method = toy_dsm()
    fit(method, points_data(), tmp_path, 96, limit_val_batches=1.0)
    assert method.generate(torch.arange(5), seed=0).x.shape == (5, 2)


# ---- the Trainer's ways of running the backbone ------------------------------------------------------------------


def labelled(count, num_classes, held_out=None):
    """Digits of as many classes in turn; none for None."""
    labels = None if num_classes is None else np.arange(count) % num_classes
    values = np.stack([digits().value(i) for i in range(count)])
    return InMemory(values, labels, num_grey_levels=17, num_classes=num_classes)


@pytest.mark.parametrize(
    ("classes", "data", "held_out", "said"),
    [
        (5, 10, None, "backbone has 5 classes and the data array have 10: set {key} 10, or null"),
        (10, None, None, "backbone has 10 classes ({key}) and the data array have no labels: set {key} null"),
        (10, 10, labelled(20, None), "backbone has 10 classes and data.held_out has no labels"),
        (10, 10, labelled(20, 3), None),
        (None, 10, labelled(20, None), None),
        (None, None, None, None),
        (12, 10, None, None),
    ],
)
def test_classes_that_the_backbone_does_not_have_are_refused_before_any_work(tmp_path, classes, data, held_out, said):
    method = ncsn(network={"num_classes": classes})
    module = DataModule(labelled(40, data), 32, held_out=held_out)
    if said is None:
        fit(method, module, tmp_path, 32, limit_val_batches=1.0)
        assert method.clock.images == 32
        return
    with pytest.raises(UserError) as caught:
        fit(method, module, tmp_path, 32)
    assert said.format(key="model.init_args.backbone.init_args.num_classes") in str(caught.value)
    assert method.denoiser.backbone.seen == []


def test_samples_have_classes_that_the_data_have():
    method = ncsn(network={"num_classes": 5})
    method.data_spec = DataModule(labelled(40, 3), 32).data_spec
    assert method.condition(torch.arange(5)).label.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(UserError, match="classes are 0 to 2"):
        method.condition(torch.arange(5), 3)
    values = np.stack([digits().value(i) for i in range(40)])
    gaps = InMemory(values, np.array([1, 4] * 20), num_grey_levels=17, num_classes=5)
    method.data_spec = DataModule(gaps, 32).data_spec
    assert method.condition(torch.arange(5)).label.tolist() == [1, 4, 1, 4, 1]
    assert method.condition_by_counts(torch.arange(99), 0, method.data_spec.class_counts).label.unique().tolist() == [
        1,
        4,
    ]
    method.data_spec = DataModule(labelled(40, None), 32).data_spec  # Data without classes, so none is known.
    assert method.condition(torch.arange(5)) is None
    assert method.condition_by_counts(torch.arange(5), 0, None) is None
    with pytest.raises(UserError, match="not class-conditional"):
        method.condition(torch.arange(5), 0)


def test_compiling_in_place_keeps_the_names_and_the_numbers(tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile
    calls = []

    def eager(self, *args, **kwargs):
        calls.append(self)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    plain, compiled = ncsn(), ncsn()
    fit(plain, digits_data(), tmp_path, 64)
    fit(compiled, digits_data(), tmp_path, 64, compile=True)
    assert calls == [compiled.denoiser.backbone]
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(compiled)[name], atol=1e-5), name


def test_channels_last_is_a_layout_only(tmp_path):
    plain, last = ncsn(), ncsn()
    fit(plain, digits_data(), tmp_path, 64)
    fit(last, digits_data(), tmp_path, 64, channels_last=True)
    assert last.denoiser.backbone.first.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(last)[name], atol=1e-4), name


# ---- auto --------------------------------------------------------------------------------------------------------


def test_the_data_shape_is_found_where_it_is_left_to_the_data():
    said = []
    backbone = {"class_path": "UNet", "init_args": {"data_shape": "auto"}}
    found = NCSN.resolve_auto({"backbone": backbone}, digits_data(), said.append)
    assert found == {"backbone.init_args.data_shape": [1, 8, 8]}
    backbone["init_args"]["data_shape"] = [1, 8, 8]
    assert NCSN.resolve_auto({"backbone": backbone}, digits_data(), said.append) == {}
