"""A failure of a picture, a metric or the dashboard costs that alone: the training and its checkpoints are the same."""

from __future__ import annotations

import errno
import io
import json
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import CONFIG, digits_data, events, fit, ncsn, points_data, run_logger, same, toy_dsm, weights

from lit_diffusion import __main__
from lit_diffusion.callbacks import (
    EMA,
    Checkpoint,
    Evaluator,
    Likelihood,
    NoiseLevels,
    ProgressBar,
    Samples,
    ScoreField,
    Telemetry,
)
from lit_diffusion.checkpoints import read_checkpoint
from lit_diffusion.cli.lightning_cli import made_again
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation.sampling import Shard, generate_in_batches
from lit_diffusion.failures import AloneError, Attempt, FailedElsewhereError, Failure, agree
from lit_diffusion.metrics.frechet import FrechetDistance
from lit_diffusion.metrics.scores import Scores
from lit_diffusion.runs.best import read_best
from lit_diffusion.runs.dashboard import Dashboard
from lit_diffusion.runs.events import drop_lost_events

STEPS = 4


def drawing(name):
    """One of the callbacks that draw or measure, twice."""
    return {
        "samples": lambda: Samples(every_n_steps=2, count=4, film_columns=2),
        "noise_levels": lambda: NoiseLevels(every_n_steps=2, num_levels=2, images=8),
        "evaluation": lambda: Evaluator(every_n_steps=2, samples=8, metrics=["fid", "memorisation"]),
        "telemetry": lambda: Telemetry(every_n_steps=2),
    }[name]()


def callbacks(*names):
    return [EMA([64], ramp=1.0), *map(drawing, names), Checkpoint()]


class FakeWandb(SimpleNamespace):
    """As much of wandb as the dashboard calls."""

    def __init__(self):
        self.run = SimpleNamespace(define_metric=lambda *a, **k: None, log=lambda row: None, finish=lambda **k: None)
        super().__init__(init=lambda **keys: self.run, Settings=lambda **keys: None, Image=lambda *a, **k: None)


def trained(folder, given=None, steps=STEPS, dashboard=None, **keys):
    method = ncsn({"dropout": 0.3})
    logger = run_logger(folder, method, dashboard=dashboard, continues=keys.pop("continues", False))
    given = callbacks("samples", "evaluation") if given is None else given
    keys = {"limit_val_batches": 1.0, **keys}
    fit(method, digits_data(), folder, 32 * steps, callbacks=given, logger=logger, **keys)
    return method, folder / "run"


@pytest.fixture(scope="module")
def faultless(tmp_path_factory):
    """The weights of a run in which nothing fails, since nothing is drawn."""
    method, run_dir = trained(tmp_path_factory.mktemp("faultless"), callbacks())
    (end,) = events(run_dir, "end")
    assert (end["status"], end["failures"]) == ("success", 0)
    return weights(method)


def fails(error=TypeError, message="injected\nfault"):
    def failing(*args, **keys):
        raise error(message)

    return failing


PACKAGE = "lit_diffusion"
FAULTS = {
    # Where it fails; what draws there; what the event calls it; the events that are left.
    "grid": ("callbacks.samples.image_grid", "samples", "samples", []),
    "film": ("callbacks.samples._Film.rows", "samples", "samples", []),
    "sampler": ("samplers.langevin.AnnealedLangevin.step", "samples", "samples", []),
    "files": ("runs.logger.save_png", "samples", "samples", []),
    "loss": ("methods.base.Method.loss_given_t", "noise_levels", "noise_levels", []),
    "figure": ("callbacks.noise_levels.render", "noise_levels", "noise_levels", ["noise_levels"]),
    "count": ("callbacks.evaluator.Evaluator._choose_count", "evaluation", "evaluation", []),
    "reference": ("evaluation.measure.reference_of", "evaluation", "evaluation", []),
    "extractor": ("metrics.scores.Scores.update", "evaluation", "evaluation", []),
    "one metric": (
        "metrics.frechet.FrechetDistance.compute",
        "evaluation",
        "evaluation/fid",
        ["evaluation", "picture"],
    ),
    "recording": ("callbacks.evaluator.np.savez_compressed", "evaluation", "evaluation", []),
    "neighbours": ("callbacks.evaluator.image_grid", "evaluation", "neighbours", ["evaluation"]),
    "best": ("callbacks.evaluator.read_best", "evaluation", "evaluation", ["evaluation", "picture"]),
    "step": ("callbacks.progress.Telemetry._add_up", "telemetry", "telemetry", []),
    "speed": ("callbacks.progress.resident_memory", "telemetry", "telemetry", []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_reported_and_counted_and_the_training_is_the_same(
    tmp_path, monkeypatch, capsys, faultless, fault
):
    target, drawn, name, left = FAULTS[fault]
    monkeypatch.setattr(f"{PACKAGE}.{target}", fails())
    method, run_dir = trained(tmp_path, callbacks(drawn))
    assert same(weights(method), faultless)
    saved = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert saved["lit_diffusion"]["steps"] == STEPS
    kinds = [event["event"] for event in events(run_dir)]
    assert sorted(kinds) == sorted(["start", *left * 2, "failed", "failed", "metrics", "end"])
    failed, (end,) = events(run_dir, "failed"), events(run_dir, "end")
    assert (end["status"], end["failures"], end["failed"]) == ("success", 2, {name: 2})
    assert [(event["name"], event["step"], event["error"]) for event in failed] == [
        (name, step, "TypeError: injected fault") for step in (2, STEPS)
    ]
    assert ["traceback" in event for event in failed] == [True, False]  # Once in full.
    said = capsys.readouterr().out
    assert said.count(f"{name} failed at 64 images, and the run goes on without: TypeError: injected fault (") == 1
    assert said.count(f"{name} failed again at 128 images: TypeError at ") == 1


def test_of_an_evaluation_in_which_one_metric_fails_the_others_are_kept_and_the_best_stay(tmp_path, monkeypatch):
    compute, calls = FrechetDistance.compute, []

    def later(self):
        calls.append(None)
        if len(calls) > 1:
            raise ArithmeticError("no square root")
        return compute(self)

    monkeypatch.setattr(FrechetDistance, "compute", later)
    _, run_dir = trained(tmp_path, callbacks("evaluation"))
    first, second = events(run_dir, "evaluation")
    assert {key for key in first if "/digits-8" in key} - {key for key in second if "/digits-8" in key} == {
        "fd/digits-8"
    }
    assert [entry["images"] for entry in read_best(run_dir / "checkpoints")] == [64]
    assert [event["name"] for event in events(run_dir, "failed")] == ["evaluation/fid"]


def test_the_held_out_loss_may_fail_beside_a_training_and_not_by_itself(tmp_path, monkeypatch, faultless):
    loss = type(ncsn()).loss

    def failing(self, batch, seed):
        if not self.training:
            raise ValueError("injected")
        return loss(self, batch, seed)

    monkeypatch.setattr(type(ncsn()), "loss", failing)
    given = [EMA([64], ramp=1.0), Checkpoint()]
    method, run_dir = trained(tmp_path, given)
    assert same(weights(method), faultless)
    assert [event["name"] for event in events(run_dir, "failed")] == ["val/loss"]
    assert events(run_dir, "metrics") == []
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()
    with pytest.raises(ValueError, match="injected"):
        method.trainer.validate(method, datamodule=digits_data(), verbose=False)


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "Image", "finish"])
def test_the_dashboard_is_counted_once(tmp_path, monkeypatch, faultless, where):
    fake = FakeWandb()
    setattr(fake if where in ("init", "Image") else fake.run, where, fails(RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    given = [EMA([64], ramp=1.0), Samples(every_n_steps=2, count=4, film_columns=0), Telemetry(every_n_steps=1)]
    method, run_dir = trained(tmp_path, [*given, Checkpoint()], dashboard=Dashboard("offline"))
    assert same(weights(method), faultless)
    (end,) = events(run_dir, "end")
    assert (end["failures"], end["failed"], end["status"]) == (1, {"dashboard": 1}, "success")
    assert len(events(run_dir, "train")) == STEPS
    assert len(events(run_dir, "picture")) == 2
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["lit_diffusion"]["steps"] == STEPS


def test_figures_of_points_may_fail(tmp_path, monkeypatch):
    ends = []
    for folder, fault in ((tmp_path / "a", False), (tmp_path / "b", True)):
        if fault:
            monkeypatch.setattr("lit_diffusion.callbacks.score_figures.render", fails())
        method = toy_dsm()
        logger = run_logger(folder, method)
        fit(method, points_data(size=200), folder, 64, callbacks=[ScoreField(), Checkpoint()], logger=logger)
        assert method.training
        ends.append(weights(method))
        assert read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")["lit_diffusion"]["steps"] == 2
    assert same(*ends)
    assert [event["name"] for event in events(tmp_path / "b" / "run", "failed")] == ["ScoreField"]


def test_a_picture_of_a_test_costs_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_diffusion.callbacks.likelihood.render", fails())
    monkeypatch.setattr(Evaluator, "_draw_pairs", fails())
    method, run_dir = trained(tmp_path, [], steps=1)
    evaluator = Evaluator(test_samples=8, test_seeds=(0,), metrics=["fid", "memorisation"], keep=0)
    likelihood = Likelihood(metrics=["bpd_bound"])
    method.trainer.callbacks += [likelihood, evaluator]
    method.trainer.test(method, datamodule=digits_data(), verbose=False)
    tests = events(run_dir, "test")
    assert [key for event in tests for key in ("bpd_bound", "fd/digits-8/mean") if key in event] == [
        "bpd_bound",
        "fd/digits-8/mean",
    ]
    assert [event["name"] for event in events(run_dir, "failed")] == ["bound-by-noise-level", "neighbours"]


def test_a_test_whose_number_fails_fails(tmp_path, monkeypatch):
    method, _ = trained(tmp_path, [], steps=1)
    monkeypatch.setattr(FrechetDistance, "compute", fails())
    method.trainer.callbacks.append(Evaluator(test_samples=8, test_seeds=(0,), metrics=["fid"], keep=0))
    with pytest.raises(TypeError, match="injected"):
        method.trainer.test(method, datamodule=digits_data(), verbose=False)


# ---- what is kept, and when --------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize(
    "target",
    [
        "callbacks.samples.Samples.draw",
        "callbacks.noise_levels.NoiseLevels.draw",
        "callbacks.evaluator.Evaluator._evaluate",
    ],
)
def test_the_end_of_a_training_is_saved_before_it_is_drawn(tmp_path, monkeypatch, target):
    """Also where the process is killed by what it draws."""
    monkeypatch.setattr(f"{PACKAGE}.{target}", fails(Killed))
    given = [Samples(count=4), NoiseLevels(num_levels=2, images=8), Evaluator(every_n_steps=100, samples=8, keep=0)]
    with pytest.raises((Killed, SystemExit)):
        trained(tmp_path, [*given, Checkpoint()], steps=2)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["lit_diffusion"]["steps"] == 2


def test_what_failed_counts_as_drawn_when_the_run_goes_on(tmp_path, monkeypatch, faultless):
    """Failed at its second step, where the run was to end; continued without the fault, it draws at its fourth."""
    with monkeypatch.context() as patch:
        patch.setattr(f"{PACKAGE}.callbacks.samples.image_grid", fails())
        patch.setattr(Scores, "update", fails())
        _, run_dir = trained(tmp_path, steps=2)
    last = run_dir / "checkpoints" / "last.ckpt"
    saved = read_checkpoint(last)
    seen, again = made_again(saved)
    assert (seen, again) == (64, set())
    assert drop_lost_events(run_dir, seen, again) == 0
    method, _ = trained(tmp_path, continues=True, ckpt_path=last)
    assert same(weights(method), faultless)
    assert [event["step"] for event in events(run_dir, "failed")] == [2, 2]
    assert {event["step"] for event in events(run_dir, "picture") if event["name"] in ("samples", "film")} == {STEPS}
    assert [event["step"] for event in events(run_dir, "evaluation")] == [STEPS]
    assert events(run_dir, "end")[-1]["failed"] == {"samples": 1, "evaluation": 1}  # Of the whole run.


def test_the_events_of_what_ismade_again_move_aside(tmp_path):
    """Failures of a moment that is drawn again are reported again, too."""
    lines = [{"event": "start", "format_version": 1, "images": 0}]
    lines += [{"event": "failed", "name": name, "images": 64} for name in ("samples", "evaluation/fid", "telemetry")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {"lit_diffusion": {"images_seen": 64}, "callbacks": {"Samples": {"done_at": 32}}}
    assert drop_lost_events(tmp_path, *made_again(state)) == 2
    assert [event.get("name") for event in events(tmp_path)] == [None, "telemetry"]


def test_what_must_end_a_run_ends_it(tmp_path, monkeypatch):
    """A checkpoint that cannot be written, metrics.jsonl that cannot; the last is there all the same."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def cannot(*args, **keys):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cannot)
        with pytest.raises(UserError, match="cannot write"):
            trained(tmp_path / "a", callbacks("evaluation"))
    record = run_logger(tmp_path, ncsn()).record.__func__

    def no_pictures(self, event, values):
        if event == "picture":
            raise UserError("cannot write metrics.jsonl", ends_run=True)
        record(self, event, values)

    monkeypatch.setattr(f"{PACKAGE}.runs.logger.RunLogger.record", no_pictures)
    with pytest.raises(UserError, match=r"cannot write metrics\.jsonl"):
        trained(tmp_path / "b", [Samples(count=4), Checkpoint()])
    saved = read_checkpoint(tmp_path / "b" / "run" / "checkpoints" / "last.ckpt")
    assert saved["lit_diffusion"]["steps"] == STEPS


def test_a_terminal_that_is_gone_is_no_reason_to_stop(tmp_path, monkeypatch, faultless):
    """Every write to it fails."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)

    class Goes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            out.write = out.flush = fails(OSError)

    method, run_dir = trained(tmp_path, [ProgressBar(), Goes(), *callbacks()], limit_val_batches=0)
    assert same(weights(method), faultless)
    assert events(run_dir, "end")[0]["failures"] == 0


def test_what_the_user_got_wrong_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="'ema:3' are not kept"):
        trained(tmp_path, [Samples(weights="ema:3"), Checkpoint()])


def test_the_command_line_ends_with_0_and_says_how_many(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {**CONFIG, "samples": {"count": 4, "film_columns": 0}, "noise_levels": {"num_levels": 0}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(f"{PACKAGE}.callbacks.samples.image_grid", fails())
    monkeypatch.setattr(sys, "argv", ["lit_diffusion", "fit", "--config", "tiny.yaml", "--run_dir", "run"])
    assert __main__.main() == 0
    assert "  1 failure, see the events `failed` of run/metrics.jsonl: samples" in capsys.readouterr().out.splitlines()
    assert events(tmp_path / "run")[-1]["failures"] == 1
    assert read_checkpoint("run/checkpoints/last.ckpt")["lit_diffusion"]["images_seen"] == 64


# ---- attempts ----------------------------------------------------------------------------------------------------


def test_an_attempt_keeps_exceptions_and_lets_interrupts_through():
    with Attempt() as attempt:
        raise ValueError("two\nlines")
    (failure,) = attempt.failures
    assert (failure.kind, failure.message, failure.process) == ("ValueError", "two lines", 0)
    assert failure.place.startswith("test_failures.py:")
    assert "raise ValueError" in failure.traceback
    assert isinstance(attempt.error, ValueError)
    with Attempt() as attempt:
        agree()
    assert attempt.failures == []
    for error in (KeyboardInterrupt(), UserError("the disk is full", ends_run=True)):
        with pytest.raises(type(error)), Attempt(), Attempt():
            raise error
    with Attempt() as outer:
        with Attempt() as inner:
            raise UserError("a word")
        raise KeyError("x")
    assert [len(each.failures) for each in (outer, inner)] == [1, 1]


def test_who_leaves_an_outer_attempt_takes_the_others_with_them(monkeypatch):
    """Another process failed outside the inner attempt in which this one learns of it."""
    elsewhere = Failure("ValueError", "there", "here.py:1", "", process=1, depth=1)
    with Attempt() as outer:
        with Attempt() as inner:
            raise FailedElsewhereError([elsewhere])
        raise AssertionError("not reached")
    assert (outer.failures, inner.failures) == ([elsewhere], [])


def test_a_failure_among_processes_that_share_one_networks_weights_ends_the_run(monkeypatch):
    """The others wait for this one in the network, where they cannot be informed."""
    method = ncsn()
    method.data_spec, method.sharded = digits_data().data_spec, True
    monkeypatch.setattr("lit_diffusion.evaluation.sampling.many_processes", lambda: True)
    monkeypatch.setattr(type(method.sampler), "step", fails())
    with (
        pytest.raises(AloneError, match=r"sampling failed \(TypeError: injected fault .*continue it from its last"),
        Attempt(),
    ):
        list(generate_in_batches(method, Shard.of(4, 2, 0, 1), 0, 2, show_progress=False))


def test_failures_are_plain_and_short():
    try:
        raise RuntimeError("x" * 10_000)
    except RuntimeError as error:
        failure = Failure.of(error)
    assert len(failure.message) == 500
    assert len(failure.traceback) <= 4000
    assert json.dumps(vars(failure))
    assert np.all([isinstance(value, str | int | bool) for value in vars(failure).values()])
