"""What a person sees and what metrics.jsonl keeps of a training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import digits_data, events, fit, ncsn, run_logger, same, weights

from lit_diffusion.callbacks import ProgressBar, Telemetry
from lit_diffusion.errors import UserError


def told(folder, callbacks, images=96, spoilt=(), **keys):
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
            steps.append((float(pl_module.last_loss), float(pl_module.last_gradient_norm)))

    fit(method, digits_data(), folder, images, callbacks=[Note(), *callbacks], logger=run_logger(folder, method))
    return events(folder / "run", "train"), steps


def test_an_event_is_the_average_since_the_one_before(tmp_path):
    made, steps = told(tmp_path, [Telemetry(every_n_steps=2)], 192)
    assert [(event["step"], event["images"]) for event in made] == [(2, 64), (4, 128), (6, 192)]
    for k, event in enumerate(made):
        mine = steps[2 * k : 2 * k + 2]
        assert event["loss"] == pytest.approx(sum(loss for loss, _ in mine) / 2)
        assert event["gradient_norm"] == pytest.approx(sum(norm for _, norm in mine) / 2)
        assert event["images_per_second"] > 0
        assert event["skipped_steps"] == 0
        assert event["learning_rate"] == 1e-2


def test_steps_that_were_not_finite_are_counted_and_not_averaged(tmp_path):
    made, steps = told(tmp_path, [Telemetry(every_n_steps=2)], 192, spoilt=(1, 4))
    assert made[0]["loss"] == pytest.approx(steps[1][0])
    assert made[1]["loss"] == pytest.approx(steps[2][0])
    assert made[2]["loss"] == pytest.approx((steps[4][0] + steps[5][0]) / 2)
    assert [event["skipped_steps"] for event in made] == [1, 2, 2]


def test_an_event_of_skipped_steps_alone_says_nan(tmp_path):
    made, _ = told(tmp_path, [Telemetry(every_n_steps=1)], 96, spoilt=(2,))
    assert [event["loss"] == "nan" for event in made] == [False, True, False]


def test_the_cadence_by_images(tmp_path):
    made, _ = told(tmp_path, [Telemetry(every_n_images=64, every_n_steps=None)], 160)
    assert [event["images"] for event in made] == [64, 128]
    with pytest.raises(UserError, match="every_n_steps is 0"):
        Telemetry(every_n_steps=0)


def test_the_loss_is_told_apart_by_time(tmp_path):
    method, seen = ncsn(), []

    class Note(Telemetry):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            seen.append((pl_module.last_times.clone(), pl_module.last_losses.clone()))

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


def test_the_rate_of_a_warm_up_is_told(tmp_path):
    made, _ = told(tmp_path, [Telemetry(every_n_steps=1)], 96, warmup_steps=4)
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
    optimise = method.optimise
    method.optimise = lambda *args: (optimise(*args), losses.append(float(method.last_loss)))[0]
    bar = ProgressBar()
    fit(method, digits_data(), tmp_path, 96, callbacks=[bar])
    shares = [0.98**2 * 0.02, 0.98 * 0.02, 0.02]
    expected = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert bar._images.postfix == f"loss={expected:.4g}"


def test_watching_changes_nothing(tmp_path):
    ends = []
    for callbacks in ([], [ProgressBar(), Telemetry(every_n_steps=1)]):
        method = ncsn()
        fit(method, digits_data(), tmp_path, 96, callbacks=callbacks)
        ends.append(weights(method))
    assert same(*ends)
