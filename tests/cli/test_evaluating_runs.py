"""Runs that evaluate, through the command line: their best checkpoints, kills, ``auto`` and what is refused at once."""

from __future__ import annotations

import json
import socket
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from helpers import forked
from helpers.tiny import TINY, digits, digits_data, events

import lit_diffusion
from lit_diffusion.__main__ import as_one_line, dispatch, main
from lit_diffusion.callbacks import Evaluator
from lit_diffusion.callbacks import evaluator as module
from lit_diffusion.errors import UserError
from lit_diffusion.images import to_uint8
from lit_diffusion.metrics.reference import RealData

EVAL = {"every_n_images": 64, "samples": 40, "batch_size": 16, "keep": 2, "seed": 7}
EVALUATING = {**TINY, "samples": {"count": 0}, "trainer": {**TINY["trainer"], "max_images": 192}, "eval": EVAL}


def no_network(*arguments, **keys):
    raise AssertionError("the network was touched")


def figures(event):
    return {key: value for key, value in event.items() if "/digits-" in key}


def changed(folder, **sections):
    """``changed.yaml``: the evaluating run with other keys of ``eval``, or other sections."""
    config = {**EVALUATING, **sections, "eval": {**EVAL, **sections.get("eval", {})}}
    (folder / "changed.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", "changed.yaml"]


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory):
    """A finished run of three evaluations, made without a network, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluating")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EVALUATING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "create_connection", no_network)
        dispatch(["fit", "--config", str(folder / "tiny.yaml"), "--run_dir", str(folder / "run")])
    return folder / "run"


def test_the_best_checkpoints_have_the_figures_that_they_are_kept_for(evaluating, run, workdir):
    best = json.loads((evaluating / "checkpoints" / "best.json").read_text())
    by_images = {event["images"]: figures(event) for event in events(evaluating, "evaluation")}
    assert list(by_images) == [64, 128, 192]
    values = {images: found["fd/digits-40"] for images, found in by_images.items()}
    assert {entry["images"]: entry["value"] for entry in best} == dict(sorted(values.items(), key=lambda v: v[1])[:2])
    assert best[0]["value"] < best[1]["value"]
    for number, entry in enumerate(best):
        checkpoint = evaluating / "checkpoints" / entry["file"]
        seeds = ("--eval.test_samples", 40, "--eval.test_seeds", "[7]", "--likelihood.metrics", "[]")
        run("test", "--ckpt_path", checkpoint, "--run_dir", f"test{number}", *seeds)
        (again,) = events(workdir / f"test{number}", "evaluation")
        assert again["images"] == entry["images"]
        assert figures(again) == by_images[entry["images"]]
        method = lit_diffusion.load(checkpoint)
        kept = np.load(evaluating / f"samples/evaluation-{entry['images']:010d}.npz")["arr_0"]
        assert np.array_equal(to_uint8(method.generate(torch.arange(40), seed=7).x, (0.0, 1.0)), kept)


def test_evaluate_says_the_same_of_the_kept_samples(evaluating, run, workdir):
    data = digits_data()
    real = RealData.of(data.source, data.train_indices, "train").values(torch.arange(len(data.train_indices)))
    np.savez(workdir / "real.npz", arr_0=real)
    for event in events(evaluating, "evaluation"):
        run("evaluate", "--samples", evaluating / event["samples_file"], "--reference", "real.npz", "--out", "o.json")
        found = json.loads((workdir / "o.json").read_text())
        assert found["values"] == pytest.approx(figures(event), rel=1e-6, abs=1e-6)
        assert found["errors"] == pytest.approx(event["errors"], rel=1e-6, abs=1e-6)


def test_the_end_names_the_best(run, workdir, capsys):
    changed(workdir, eval={"metrics": ["fid"], "keep": 1})
    run("fit", "--config", "changed.yaml", "--run_dir", "r")
    (best,) = json.loads((workdir / "r" / "checkpoints" / "best.json").read_text())
    said = capsys.readouterr().out
    assert f"  best        r/checkpoints/{best['file']} (fd/digits-40 {best['value']:.4g}, {best['images']}" in said


def test_report_and_gallery_show_a_run_that_evaluates(evaluating, run, workdir):
    run("report", evaluating, "--out", "report")
    (page,) = (workdir / "report").rglob("*.html")
    text = page.read_text()
    for words in ("fd/digits-40", "digits-classifier", "neighbours"):
        assert words in text
    run("gallery", evaluating, "--count", 40, "--out", "gallery.html")
    assert "fd/digits-40" in (workdir / "gallery.html").read_text()


# ---- kills -------------------------------------------------------------------------------------------------------

WALK = '''
import os, time
from pathlib import Path

from lit_diffusion.samplers import AnnealedLangevin


class Walk(AnnealedLangevin):
    """Hold in the second batch of the second evaluation, where the environment says so."""

    calls = 0

    def start(self, process, noise):
        Walk.calls += 1
        if "HOLD" in os.environ and Walk.calls == 5:
            Path(os.environ["HOLD"]).touch()
            time.sleep(600)
        return super().start(process, noise)
'''


def end_of(run_dir):
    """All that a run ended with."""
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    averages = saved["callbacks"]["EMA"]["shadows"]
    moments = saved["optimizer_states"][0]["state"]
    return {
        **saved["state_dict"],
        **{f"{k}/{name}": value for k, shadow in enumerate(averages) for name, value in shadow.items()},
        **{f"{k}/{name}": value for k, state in moments.items() for name, value in state.items()},
        "images": torch.tensor(saved["lit_diffusion"]["images_seen"]),
    }


def same_end(first, second):
    mine, theirs = end_of(first), end_of(second)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    mine, theirs = (
        [(e["step"], e["images"], figures(e), e["protocol"]) for e in events(run_dir, "evaluation")]
        for run_dir in (first, second)
    )
    assert mine == theirs
    mine, theirs = (json.loads((run_dir / "checkpoints" / "best.json").read_text()) for run_dir in (first, second))
    assert mine == theirs
    for folder in ("checkpoints", "samples"):
        assert {path.name for path in (first / folder).iterdir()} == {path.name for path in (second / folder).iterdir()}


def test_a_run_killed_while_it_evaluates_ends_as_if_it_had_not_been(run, workdir, monkeypatch):
    (workdir / "held_walk.py").write_text(WALK)
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.setenv("LIT_DIFFUSION_ALLOW", "held_walk")
    walk = {"class_path": "held_walk.Walk", "init_args": {"steps_per_level": 2, "eta": 0.001}}
    fit_it = changed(workdir, eval={"sampler": walk})
    said = workdir / "said.txt"
    told = {"HOLD": str(workdir / "inside"), "LIT_DIFFUSION_ALLOW": "held_walk"}
    killed = forked.start(forked.command_line, *fit_it, "--run_dir", "broken", log=said, environment=told)
    try:
        ends = time.monotonic() + 300.0
        while not (workdir / "inside").exists():
            assert killed.exitcode is None, said.read_text()[-3000:]
            assert time.monotonic() < ends
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.join()
    last = workdir / "broken" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lit_diffusion"]["images_seen"] == 128
    (before,) = json.loads((last.parent / "best.json").read_text())
    assert torch.load(last.parent / before["file"], weights_only=True)["lit_diffusion"]["images_seen"] == 64
    run(*fit_it, "--run_dir", "broken", "--ckpt_path", last)
    run(*fit_it, "--run_dir", "straight")
    same_end(workdir / "broken", workdir / "straight")


class Killed(BaseException):
    """As SIGKILL: nothing is caught."""


@pytest.mark.parametrize(("at", "images"), [(2, 128), (3, 160)])
def test_a_kill_after_the_event_and_before_the_checkpoint(run, workdir, evaluating, monkeypatch, at, images):
    """The event is there once, and the end, at which no evaluation is due but the last, is made up for too."""
    keep, calls = Evaluator._keep_the_best, []

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise Killed
        return keep(*arguments)

    monkeypatch.setattr(Evaluator, "_keep_the_best", cut)
    trainer = {**TINY["trainer"], "max_images": 160}
    fit_it = changed(workdir, trainer=trainer)
    with pytest.raises(Killed):
        run(*fit_it, "--run_dir", "broken")
    assert len(events(workdir / "broken", "evaluation")) == at
    run(*fit_it, "--run_dir", "broken", "--ckpt_path", "broken/checkpoints/last.ckpt")
    run(*fit_it, "--run_dir", "straight")
    same_end(workdir / "broken", workdir / "straight")
    lost = [json.loads(line) for line in (workdir / "broken" / "metrics.lost.jsonl").read_text().splitlines()]
    assert [(event["event"], event["images"]) for event in lost[:2]] == [("evaluation", images), ("picture", images)]
    shown = [event["images"] for event in events(workdir / "broken", "picture") if event["name"] == "neighbours"]
    assert shown == [64, 128, 160]


def test_a_finished_run_that_is_continued_says_nothing_twice(run, workdir):
    fit_it = changed(workdir, eval={"metrics": ["fid"]})
    run(*fit_it, "--run_dir", "r", "--trainer.max_images", 96)
    for images in (96, 128):
        run(*fit_it, "--run_dir", "r", "--ckpt_path", "r/checkpoints/last.ckpt", "--trainer.max_images", images)
    assert [event["images"] for event in events(workdir / "r", "evaluation")] == [64, 96, 128]
    assert not (workdir / "r" / "metrics.lost.jsonl").exists()


# ---- samples: auto -----------------------------------------------------------------------------------------------


def chosen(run_dir):
    """The number of samples in a run's configuration, its checkpoint's, the callback's state and the events."""
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return [
        yaml.safe_load((run_dir / "config.yaml").read_text())["eval"]["samples"],
        saved["lit_diffusion"]["config"]["eval"]["samples"],
        saved["callbacks"]["Evaluator"]["samples"],
        *sorted({event["protocol"]["n_fake"] for event in events(run_dir, "evaluation")}),
    ]


@pytest.mark.slow
def test_what_auto_chose_is_written_down_and_kept(run, workdir, monkeypatch, capsys):
    monkeypatch.setattr(module, "COUNTS", (30, 10**9))
    fit_it = changed(workdir, eval={"samples": "auto", "metrics": ["fid"]})
    run(*fit_it, "--run_dir", "r", "--trainer.max_images", 64)
    assert chosen(workdir / "r") == [30, 30, 30, 30]
    monkeypatch.setattr(module, "COUNTS", (20, 10**9))
    for run_dir, images in (("r", 128), ("new", 192)):  # the file of both says auto
        run(*fit_it, "--run_dir", run_dir, "--ckpt_path", "r/checkpoints/last.ckpt", "--trainer.max_images", images)
        assert chosen(workdir / run_dir) == [30, 30, 30, 30]
    assert "differs from the checkpoint: eval.samples" not in capsys.readouterr().out
    run("fit", "--config", "r/config.yaml", "--run_dir", "again", "--trainer.max_images", 64)
    assert [event["protocol"]["n_fake"] for event in events(workdir / "again", "evaluation")] == [30]
    given = ("--eval.samples", 25, "--trainer.max_images", 192)
    run(*fit_it, "--run_dir", "given", "--ckpt_path", "r/checkpoints/last.ckpt", *given)
    assert [event["protocol"]["n_fake"] for event in events(workdir / "given", "evaluation")] == [25]
    assert chosen(workdir / "given")[:2] == [25, 25]


def test_what_auto_settles_changes_nothing_else_of_the_configuration(run, workdir, monkeypatch):
    monkeypatch.setattr(module, "COUNTS", (30, 10**9))
    fit_it = changed(workdir, eval={"samples": "auto", "metrics": ["fid"]})
    run(*fit_it, "--run_dir", "never", "--eval.every_n_images", "null", "--trainer.max_images", 64)
    run(*fit_it, "--run_dir", "r", "--trainer.max_images", 64)
    before, after = (yaml.safe_load((workdir / name / "config.yaml").read_text()) for name in ("never", "r"))
    assert before["eval"]["samples"] == "auto"
    assert {**before, "eval": {**before["eval"], "every_n_images": 64, "samples": 30}} == after


# ---- refused before the first step -------------------------------------------------------------------------------


def test_missing_weights_are_said_at_once_with_the_command_that_brings_them(workdir, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    arguments = [*changed(workdir, eval={"extractor": "inception"}), "--run_dir", "r"]
    monkeypatch.setattr(sys, "argv", ["lit_diffusion", *arguments])
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("lit_diffusion: error: the inception weights are not on this machine")
    assert "run `python -m lit_diffusion fetch weights inception`" in line
    assert not (workdir / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--eval.metrics", "[fidd]"), "eval.metrics is 'fidd'"),
        (("--eval.best", "fidd"), "eval.best is 'fidd'; it must be one of 'fid'"),
        (("--eval.best", "recall", "--eval.metrics", "[fid]"), "eval.best is 'recall', which is not among the metrics"),
        (("--eval.samples", "many"), "eval.samples is 'many'"),
        (("--eval.extractor", "points"), "extractor points takes points"),
        (("--eval.weights", "ema:123"), "weights 'ema:123' are not kept"),
        (("--eval.sampler", "Langevin", "--eval.sampler.eta", "1.0"), "Langevin step eta 1 is not below"),
        (("--eval.test_seeds", "[1, 1]"), "eval.test_seeds is [1, 1]"),
        (("--eval.evry_n_images", "3"), "did you mean"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(workdir, arguments, said):
    with pytest.raises(UserError) as caught:
        dispatch([*changed(workdir), "--run_dir", "r", *arguments])
    line = as_one_line(caught.value)
    assert said in line
    assert "\n" not in str(caught.value)
    assert not (workdir / "r" / "checkpoints" / "last.ckpt").exists()


# ---- other runs' checkpoints -------------------------------------------------------------------------------------


def test_a_checkpoint_from_before_the_likelihood_had_its_own_key_still_opens(trained, run, workdir):
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    config = saved["lit_diffusion"]["config"]
    config["eval"] = {**config.pop("likelihood"), "metrics": [], "probes": 3}
    saved["callbacks"].pop("Evaluator")
    torch.save(saved, workdir / "old.ckpt")
    run("test", "--ckpt_path", "old.ckpt", "--run_dir", "t", "--eval.test_samples", 20, "--eval.test_seeds", "[0]")
    now = yaml.safe_load((workdir / "t" / "config.yaml").read_text())
    assert (now["likelihood"]["metrics"], now["likelihood"]["probes"]) == ([], 3)
    assert len(events(workdir / "t", "evaluation")) == 1
    run("fit", "--ckpt_path", "old.ckpt", "--run_dir", "f", "--trainer.max_images", 160, "--samples.count", 0)
    assert lit_diffusion.load("old.ckpt").clock.images == 128


def test_a_test_without_figures(trained, run, workdir):
    run("test", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--run_dir", "t", "--eval.metrics", "[]")
    assert events(workdir / "t", "evaluation") == []


def test_a_test_without_held_out_data(run, workdir):
    data = {**TINY["data"], "held_out_fraction": 0.0}
    run(*changed(workdir, data=data, eval={"metrics": ["fid"]}), "--run_dir", "r", "--trainer.max_images", 64)
    few = ("--eval.test_samples", 20, "--eval.test_seeds", "[0, 1]")
    run("test", "--ckpt_path", "r/checkpoints/last.ckpt", "--run_dir", "t", *few)
    assert [event["protocol"]["n_real"] for event in events(workdir / "t", "evaluation")] == [len(digits())] * 2
    assert "fd/digits-20/mean" in events(workdir / "t", "test")[0]
