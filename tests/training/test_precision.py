"""Mixed precision is the backbone's only; the Trainer refuses what would do nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, run_logger, same, trainer, weights
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_diffusion.callbacks import EMA
from lit_diffusion.errors import UserError
from lit_diffusion.training.precision import autocast_dtype
from lit_diffusion.training.sharding import ShardedStrategy
from lit_diffusion.training.trainer import Trainer


def dtypes(method):
    """Hooks that note the types inside the backbone, into and out of it, and of the loss."""
    seen = {"first": set(), "into": set(), "level": set(), "out": set(), "loss": set(), "score": set()}
    backbone = method.denoiser.backbone
    # A batch of one image is what its operations are counted on.
    backbone.first.register_forward_hook(lambda module, args, out: seen["first"].update([out.dtype] * (len(out) > 1)))
    backbone.register_forward_hook(
        lambda module, args, out: (seen["into"].add(args[0].dtype), seen["level"].add(args[1].dtype), None)[-1]
    )
    method.denoiser.register_forward_hook(
        lambda module, args, out: (seen["out"].add(out.x_t.dtype), seen["score"].add(out.score.dtype), None)[-1]
    )
    loss = method.loss

    def noted(batch, seed):
        result = loss(batch, seed)
        seen["loss"].add(result.per_sample.dtype)
        seen["t"] = {result.t.dtype}
        seen["autocast"] = {torch.is_autocast_enabled("cpu")}
        return result

    method.loss = noted
    return seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_only_the_backbone_computes_in_less(tmp_path, precision):
    method = ncsn()
    seen = dtypes(method)
    fit(method, digits_data(), tmp_path, 64, precision=precision, limit_val_batches=1)
    inside = autocast_dtype(precision) or torch.float32
    assert seen["first"] == {inside}
    full = {torch.float32}
    assert seen["into"] == seen["level"] == seen["out"] == seen["score"] == seen["loss"] == full
    assert seen["t"] == {torch.float64}
    assert seen["autocast"] == {False}  # around the backbone, not around the step
    assert {p.dtype for p in method.parameters()} == full
    states = method.optimizers().optimizer.state.values()
    assert {value.dtype for state in states for value in state.values() if torch.is_tensor(value)} <= full
    x = method.generate(torch.arange(2), seed=0).x
    assert x.dtype == torch.float32
    assert seen["first"] == {inside}  # samples are drawn in the same precision


def test_bf16_trains_to_about_the_same_weights(tmp_path):
    ends = []
    for precision in ("32-true", "bf16-mixed"):
        method = ncsn()
        fit(method, digits_data(), tmp_path, 96, precision=precision)
        ends.append(torch.cat([p.flatten() for p in method.parameters()]).detach())
    assert 1e-6 < float((ends[0] - ends[1]).abs().max()) < 0.02


def test_an_overflow_of_float16_skips_the_step_and_lowers_the_scale(tmp_path, capsys):
    method, ema = ncsn(), EMA([64])
    logger = run_logger(tmp_path, method)
    made = trainer(tmp_path, 32, precision="16-mixed", callbacks=[ema], logger=logger)
    made.precision_plugin.scaler._init_scale = 2.0**40  # its first backward pass overflows
    before = weights(method)
    made.fit(method, datamodule=digits_data())
    assert not method.last_step.made
    assert same(before, weights(method))
    assert same(before, ema.shadows[0])
    assert ema.updates == 0
    assert method.clock.images == 32
    assert made.precision_plugin.scaler.get_scale() == 2.0**39
    assert not made.optimizers[0].state
    loss = method.last_step.losses["denoiser"]
    worst = int(loss.shown.argmax())
    t = float(loss.t[worst])
    sigma = float(method.denoiser.process.sigma(loss.t[worst].double()))
    what = (
        f"float16 gradients overflowed, the loss scale is {2.0**39:g} now; the gradient is not finite; the largest "
        f"loss is {float(loss.shown[worst]):.4g}, of image {worst} at noise level sigma/alpha {sigma:.4g} (t {t:.4g})"
    )
    assert f"step 1 changed nothing: {what}\n" in capsys.readouterr().out
    (event,) = events(tmp_path / "run", "skipped")
    assert (event["reason"], event["overflow"]) == (what, True)


def test_overflows_are_not_the_end_however_many_there_are(tmp_path):
    method = ncsn()
    made = trainer(tmp_path, 640, precision="16-mixed", logger=run_logger(tmp_path, method))
    made.precision_plugin.scaler._init_scale = 2.0**30
    made.fit(method, datamodule=digits_data())
    assert method.last_step.made
    skipped = events(tmp_path / "run", "skipped")
    assert len(skipped) > 3
    assert [event["step"] for event in skipped] == list(range(1, len(skipped) + 1))


def test_float16_follows_float32_once_its_scale_fits(tmp_path):
    ends = []
    for precision in ("32-true", "16-mixed"):
        method = ncsn(gradient_clip=1.0)
        made = trainer(tmp_path, 96, precision=precision)
        if precision == "16-mixed":
            made.precision_plugin.scaler._init_scale = 256.0
        made.fit(method, datamodule=digits_data())
        assert method.last_step.made
        ends.append(torch.cat([p.flatten() for p in method.parameters()]).detach())
        norm = float(method.last_step.gradient_norm)
        assert 1.0 < norm < 100.0  # unscaled before it is measured and clipped
    assert float((ends[0] - ends[1]).abs().max()) < 0.02


def test_a_nan_loss_under_float16_is_one_skipped_step(tmp_path):
    method = ncsn()
    loss, calls = method.loss, []

    def second_is_nan(batch, seed):
        calls.append(1)
        result = loss(batch, seed)
        return replace(result, per_sample=result.per_sample * (math.nan if len(calls) == 2 else 1.0))

    method.loss = second_is_nan
    made = trainer(tmp_path, 128, precision="16-mixed")
    made.precision_plugin.scaler._init_scale = 256.0
    made.fit(method, datamodule=digits_data())
    assert method.clock.steps == 4
    assert method.skipped_steps == 1
    assert method.last_step.made


def test_gradients_that_stay_nan_end_a_float16_run(tmp_path):
    method = ncsn()
    method.denoiser.backbone.second.weight.register_hook(lambda gradient: gradient * math.nan)
    before = weights(method)
    with pytest.raises(UserError, match=r"3 times in a row: the gradient is not finite; the largest"):
        fit(method, digits_data(), tmp_path, 3200, precision="16-mixed")
    assert same(before, weights(method))
    assert method.clock.steps < 30


def test_the_scale_is_kept_in_the_checkpoint_and_resumes(tmp_path):
    straight = ncsn()
    fit(straight, digits_data(), tmp_path, 256, precision="16-mixed")
    first = ncsn()
    made = fit(first, digits_data(), tmp_path, 128, precision="16-mixed")
    made.save_checkpoint(tmp_path / "a.ckpt")
    scale = made.precision_plugin.scaler.get_scale()
    assert scale < 2.0**16
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["BackboneMixedPrecision"]["scale"] == scale
    second = ncsn(seed=5)
    fit(second, digits_data(), tmp_path, 256, precision="16-mixed", ckpt_path=tmp_path / "a.ckpt")
    assert same(weights(straight), weights(second))


def test_unknown_precisions_are_refused():
    for name in ("64-true", "bf16-true", "bf16"):
        with pytest.raises(UserError, match=rf"{name}.*32-true, bf16-mixed, 16-mixed"):
            autocast_dtype(name)
    assert autocast_dtype("32-true") is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_images": 0}, "max_images is 0"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val does nothing"),
        ({"gradient_clip_algorithm": "norm"}, "gradient_clip_algorithm does nothing"),
        ({"accumulate_grad_batches": 2}, "micro_batch_size"),
        ({"max_epochs": 3}, "max_images"),
        ({"limit_train_batches": 10}, "limit_train_batches would repeat"),
        ({"limit_train_batches": 1}, "limit_train_batches would repeat"),
        ({"overfit_batches": 1}, "overfit_batches would repeat"),
        ({"min_epochs": 2}, "min_epochs does nothing.*set trainer.max_images"),
        ({"min_steps": 5}, "min_steps does nothing.*set trainer.max_images"),
        ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch does nothing.*set trainer.val_check_interval"),
        ({"val_check_interval": 0.5}, "val_check_interval is 0.5.*whole number"),
        ({"val_check_interval": 0}, "val_check_interval is 0;"),
        ({"val_check_interval": "00:01:00:00"}, "val_check_interval is 00:01:00:00"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs does nothing"),
        ({"inference_mode": True}, "inference_mode stays false"),
        ({"use_distributed_sampler": True}, "use_distributed_sampler stays false"),
        ({"barebones": True}, "barebones would leave out"),
        ({"model_registry": "x"}, "model_registry does nothing"),
        ({"strategy": "fsdp_cpu_offload"}, "FSDPStrategy is not supported; give fsdp"),
        ({"strategy": FSDPStrategy()}, "FSDPStrategy is not supported; give fsdp"),
        ({"strategy": ModelParallelStrategy()}, "give fsdp instead of a ModelParallelStrategy"),
        ({"precision": "64-true"}, "64-true"),
    ],
)
def test_the_trainer_refuses_what_would_do_nothing(keys, said):
    with pytest.raises(UserError, match=said) as caught:
        Trainer(accelerator="cpu", **keys)
    assert "\n" not in str(caught.value)


def test_fsdp_is_our_own_sharding():
    assert isinstance(Trainer(accelerator="cpu", logger=False, strategy="fsdp").strategy, ShardedStrategy)


def test_the_trainer_settles_what_the_project_rests_on():
    made = Trainer(accelerator="cpu", logger=False, max_epochs=-1, limit_train_batches=1.0, overfit_batches=0)
    assert made.max_epochs == -1
    assert made._accelerator_connector.use_distributed_sampler is False
    assert made.fit_loop.epoch_loop.val_loop.inference_mode is False
    assert made.predict_loop.inference_mode is False
