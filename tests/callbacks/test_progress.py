"""What a person sees and what metrics.jsonl keeps of a training."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, run_logger, same, trainer, weights

from lit_diffusion.backbones.flops import forward_flops
from lit_diffusion.callbacks import EMA, Checkpoint, ProgressBar, Samples, Telemetry
from lit_diffusion.errors import UserError
from lit_diffusion.training.callback import Callback
from lit_diffusion.training.stopwatch import PARTS


def trained(folder, callbacks, images=96, spoilt=(), **keys):
    """The train events of a run, and the finite losses and norms of its steps."""
    method = ncsn(**keys)
    loss, steps = method.loss, []

    def noted(batch, seed):
        result = loss(batch, seed)
        factor = math.nan if method.clock.steps + 1 in spoilt else 1.0
        return replace(result, per_sample=result.per_sample * factor)

    method.loss = noted

    class Note(Telemetry):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            steps.append((float(pl_module.last_step.loss), float(pl_module.last_step.gradient_norm)))

    fit(method, digits_data(), folder, images, callbacks=[Note(), *callbacks], logger=run_logger(folder, method))
    return events(folder / "run", "train"), steps


def test_an_event_is_the_average_since_the_one_before(tmp_path):
    made, steps = trained(tmp_path, [Telemetry(every_n_steps=2)], 192)
    assert [(event["step"], event["images"]) for event in made] == [(2, 64), (4, 128), (6, 192)]
    for k, event in enumerate(made):
        mine = steps[2 * k : 2 * k + 2]
        assert event["loss"] == pytest.approx(sum(loss for loss, _ in mine) / 2)
        assert event["gradient_norm"] == pytest.approx(sum(norm for _, norm in mine) / 2)
        assert event["images_per_second"] > 0
        assert event["skipped_steps"] == 0
        assert event["learning_rate"] == 1e-2


def test_steps_that_were_not_finite_are_counted_and_not_averaged(tmp_path):
    made, steps = trained(tmp_path, [Telemetry(every_n_steps=2)], 192, spoilt=(1, 4))
    assert made[0]["loss"] == pytest.approx(steps[1][0])
    assert made[1]["loss"] == pytest.approx(steps[2][0])
    assert made[2]["loss"] == pytest.approx((steps[4][0] + steps[5][0]) / 2)
    assert [event["skipped_steps"] for event in made] == [1, 2, 2]


def test_an_event_of_skipped_steps_alone_says_nan(tmp_path):
    made, _ = trained(tmp_path, [Telemetry(every_n_steps=1)], 96, spoilt=(2,))
    assert [event["loss"] == "nan" for event in made] == [False, True, False]


def test_the_cadence_by_images(tmp_path):
    made, _ = trained(tmp_path, [Telemetry(every_n_images=64, every_n_steps=None)], 160)
    assert [event["images"] for event in made] == [64, 128]
    with pytest.raises(UserError, match="every_n_steps is 0"):
        Telemetry(every_n_steps=0)


def test_the_loss_is_recorded_by_time(tmp_path):
    method, seen = ncsn(), []

    class Note(Telemetry):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append(
                (pl_module.last_step.losses["denoiser"].t.clone(), pl_module.last_step.losses["denoiser"].shown.clone())
            )

    callbacks = [Note(), Telemetry(every_n_steps=3)]
    fit(method, digits_data(), tmp_path, 96, callbacks=callbacks, logger=run_logger(tmp_path, method))
    (event,) = events(tmp_path / "run", "train")
    t, loss = (torch.cat(parts) for parts in zip(*seen, strict=True))
    told = {key: value for key, value in event.items() if key.startswith("loss@")}
    # Three levels at 1/3, 2/3 and 1, in tenths of the time.
    assert list(told) == ["loss@0.35", "loss@0.65", "loss@0.95"]
    for k, value in enumerate(told.values(), start=1):
        assert value == pytest.approx(float(loss[(t - k / 3).abs() < 1e-6].double().mean()), rel=1e-6)
    assert event["loss"] == pytest.approx(float(loss.double().mean()), rel=1e-5)


def test_the_rate_of_a_warm_up_is_recorded(tmp_path):
    made, _ = trained(tmp_path, [Telemetry(every_n_steps=1)], 96, warmup_steps=4)
    assert [event["learning_rate"] for event in made] == pytest.approx([2.5e-3, 5e-3, 7.5e-3])


def test_one_bar_for_the_whole_training_counts_images(tmp_path, capsys):
    bar = ProgressBar()
    fit(ncsn(), digits_data(), tmp_path, 96, callbacks=[bar], limit_val_batches=1)
    assert (bar._images.n, bar._images.total, bar._images.initial) == (96, 96, 0)
    assert "loss=" in bar._images.postfix
    assert "training" in capsys.readouterr().out
    made = fit(ncsn(), digits_data(), tmp_path, None, max_steps=2, callbacks=[ProgressBar()])
    assert made.progress_bar_callback._images.total == 64


def test_a_continued_bar_starts_where_the_run_was(tmp_path):
    fit(ncsn(), digits_data(), tmp_path, 64).save_checkpoint(tmp_path / "a.ckpt")
    bar = ProgressBar()
    fit(ncsn(), digits_data(), tmp_path, 160, callbacks=[bar], ckpt_path=tmp_path / "a.ckpt")
    assert (bar._images.initial, bar._images.n) == (64, 160)


def test_the_loss_shown_is_an_average_without_a_bias_to_zero(tmp_path):
    method = ncsn()
    losses = []

    class Note(Callback):
        def after_step(self, module):
            losses.append(float(module.last_step.loss))

    bar = ProgressBar()
    fit(method, digits_data(), tmp_path, 96, callbacks=[bar, Note()])
    shares = [0.98**2 * 0.02, 0.98 * 0.02, 0.02]
    expected = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert bar._images.postfix == f"loss={expected:.4g}"


# ---- speed and memory --------------------------------------------------------------------------------------------


def test_the_parts_of_a_step_are_within_the_step(tmp_path):
    method = ncsn()
    callbacks = [EMA([64]), Samples(every_n_steps=2, count=4), Telemetry(every_n_steps=2), Checkpoint(every_n_steps=1)]
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 192, callbacks=callbacks, logger=logger, limit_val_batches=1.0)
    made = events(tmp_path / "run", "train")
    assert len(made) == 3
    for event in made:
        parts = {key: value for key, value in event.items() if key.startswith("seconds/")}
        assert list(parts) == [f"seconds/{name}" for name in PARTS]
        assert all(value >= 0.0 for value in parts.values())
        # Rounded to microseconds each. What no part has is little, but how little depends on the machine.
        assert 0.0 < sum(parts.values()) <= event["seconds_per_step"] + 1e-5
        assert event["images_per_second"] == pytest.approx(32 / event["seconds_per_step"], rel=1e-2)
        flops = 3 * forward_flops(method.denoiser.backbone) * event["images_per_second"] / 1e12
        assert event["tflops"] == pytest.approx(flops, abs=1e-4)
        assert 0.01 < event["memory_gb"] < 1000.0
    assert all(event["seconds/forward_backward"] > 0.0 for event in made)
    assert "gpu_memory_gb" not in made[0]
    assert "loss_scale" not in made[0]


@pytest.fixture
def hours(monkeypatch):
    """What takes an hour more by the clock, at once."""
    began, passed = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: began() + passed[0])

    def slow(function):
        def slowly(*args, **keys):
            passed[0] += HOUR
            return function(*args, **keys)

        return slowly

    return slow


HOUR = 3600.0


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_own_time(tmp_path, monkeypatch, hours, part):
    method, ema, data = ncsn(), EMA([64]), digits_data()
    slow_callback = pl.Callback()
    owner, name = {
        "data": (data, "prepare"),
        "forward_backward": (method, "loss"),
        "optimizer": (method, "_set_learning_rates"),
        "ema": (ema, "after_step"),
        "logging": (slow_callback, "on_train_batch_end"),
        "checkpoint": (torch, "save"),
    }[part]
    monkeypatch.setattr(owner, name, hours(getattr(owner, name)))
    callbacks = [ema, slow_callback, Telemetry(every_n_steps=1), Checkpoint(every_n_steps=1)]
    fit(method, data, tmp_path, 96, callbacks=callbacks, logger=run_logger(tmp_path, method))
    _, *made = events(tmp_path / "run", "train")  # A checkpoint is written after the event of its step.
    assert len(made) == 2
    for event in made:
        told = {name: round(event[f"seconds/{name}"] / HOUR) for name in PARTS}
        assert told == {**dict.fromkeys(PARTS, 0), part: 1}
        assert round(event["seconds_per_step"] / HOUR) == 1


def test_drawing_and_validating_are_no_part_of_a_step(tmp_path, hours):
    method, samples = ncsn(), Samples(every_n_steps=1)
    samples.draw = hours(lambda trainer, method: None)
    method.validation_step = hours(method.validation_step)
    keys = {"limit_val_batches": 1.0, "val_check_interval": 1, "logger": run_logger(tmp_path, method)}
    fit(method, digits_data(), tmp_path, 96, callbacks=[samples, Telemetry(every_n_steps=1)], **keys)
    made = events(tmp_path / "run", "train")
    assert len(made) == 3
    for event in made:
        assert [name for name in PARTS if event[f"seconds/{name}"] > HOUR / 2] == []
        assert event["seconds_per_step"] < HOUR / 2


class Another(Telemetry):
    """Another interval at the same time."""


def averages(event):
    """What is computed and not timed."""
    return {
        key: value
        for key, value in event.items()
        if not key.startswith(("time", "seconds", "images_per_second", "tflops", "memory_gb"))
    }


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_stopped_within_an_interval_averages_over_all_of_it(tmp_path, stop):
    told = []
    for stops in ([7], [stop, 7]):
        folder = tmp_path / str(len(stops))
        for number, steps in enumerate(stops):
            method = ncsn({"dropout": 0.3})
            fit(
                method,
                digits_data(),
                folder,
                32 * steps,
                callbacks=[Telemetry(every_n_steps=5), Another(every_n_steps=7), Checkpoint()],
                logger=run_logger(folder, method, continues=number > 0),
                ckpt_path=folder / "run" / "checkpoints" / "last.ckpt" if number else None,
            )
        told.append([averages(event) for event in events(folder / "run", "train")])
    assert [event["step"] for event in told[0]] == [5, 7]
    assert told[1] == told[0]


def test_a_float16_run_tells_its_scale(tmp_path):
    method = ncsn()
    made = trainer(
        tmp_path, 64, callbacks=[Telemetry(every_n_steps=1)], logger=run_logger(tmp_path, method), precision="16-mixed"
    )
    made.precision_plugin.scaler._init_scale = 256.0
    made.fit(method, datamodule=digits_data())
    assert [event["loss_scale"] for event in events(tmp_path / "run", "train")] == [256.0, 256.0]


def test_watching_changes_nothing(tmp_path):
    ends = []
    for callbacks in ([], [ProgressBar(), Telemetry(every_n_steps=1)]):
        method = ncsn()
        fit(method, digits_data(), tmp_path, 96, callbacks=callbacks)
        ends.append(weights(method))
    assert same(*ends)
