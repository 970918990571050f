"""Figures of samples while a model trains: true of the weights that they name, and of no consequence to them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.tiny import (
    digits,
    digits_data,
    events,
    fit,
    ncsn,
    points_data,
    run_logger,
    same,
    toy_dsm,
    trainer,
    weights,
)
from PIL import Image

from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, Likelihood, Samples, Telemetry
from lit_diffusion.callbacks import evaluator as module
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation import measure
from lit_diffusion.images import image_grid, to_uint8
from lit_diffusion.metrics import Result, Scores, load_extractor
from lit_diffusion.metrics.catalogue import default_metrics
from lit_diffusion.metrics.reference import RealData, reference_of
from lit_diffusion.randomness import keyed_choice
from lit_diffusion.runs import best
from lit_diffusion.runs.best import read_best
from lit_diffusion.samplers import AnnealedLangevin, Langevin, Sampler
from lit_diffusion.samplers.base import describe
from lit_diffusion.training.datamodule import DataModule

IMAGE = ["fid", "is", "precision"]
"""Three metrics that take no time."""


class Fixed(Sampler):
    """Sample i is training image i, whatever the model and its precision."""

    images = torch.from_numpy(np.stack([digits().value(i) for i in digits_data().train_indices[:64]])).float() / 16.0

    def plan(self, process):
        return []

    def start(self, process, noise):
        return self.images[noise.indices]

    def step(self, *arguments):
        raise AssertionError


class Diverging(AnnealedLangevin):
    """A sampler that diverges while ``lost``."""

    lost = True

    def finish(self, run, x):
        return torch.full_like(x, math.nan) if self.lost else super().finish(run, x)


def evaluated(folder, images=128, half_lives=(64,), method=None, data=None, others=(), continues=False, **keys):
    """A run that evaluates; what it left."""
    method, ema = method or ncsn(), EMA(list(half_lives))
    ckpt_path, every = keys.pop("ckpt_path", None), {} if "every_n_steps" in keys else {"every_n_images": 64}
    more = {key: keys.pop(key) for key in ("precision", "fast_dev_run") if key in keys}
    evaluator = Evaluator(**{**every, "samples": 40, "batch_size": 16, **keys})
    callbacks = [ema, evaluator, *others]
    if not any(isinstance(callback, Checkpoint) for callback in others):
        callbacks.append(Checkpoint())
    logger = run_logger(folder, method, continues=continues)
    made = fit(
        method, data or digits_data(), folder, images, callbacks=callbacks, logger=logger, ckpt_path=ckpt_path, **more
    )
    run_dir = folder / "run"
    return SimpleNamespace(
        method=method,
        ema=ema,
        evaluator=evaluator,
        trainer=made,
        run_dir=run_dir,
        checkpoints=run_dir / "checkpoints",
        events=events(run_dir, "evaluation") if (run_dir / "metrics.jsonl").exists() else [],
    )


def by_hand(x, metrics=None):
    """The figures of samples in [0, 1], without the callback."""
    data, extractor = digits_data(), load_extractor("digits", (1, 8, 8))
    reference = reference_of(RealData.of(data.source, data.train_indices, "train"), extractor)
    scores = Scores(metrics or default_metrics(), extractor, reference, (1, 8, 8))
    scores.update(to_uint8(x, (0.0, 1.0)), torch.arange(len(x)))
    return scores.compute(len(x))


def figures(event):
    """The figures of an event: by their names, which say the features and the number."""
    return {key: value for key, value in event.items() if "/" in key}


def close(first, second, within=1e-6):
    return first.keys() == second.keys() and all(
        value == pytest.approx(second[key], rel=within, abs=within) for key, value in first.items()
    )


class OfItsClass(Sampler):
    """Sample i is image i of the class that is asked for, of few (``labels`` has the classes) in a long row each."""

    def __init__(self, rows):
        self.rows = [torch.from_numpy(row).float() / 16.0 for row in rows]
        self.labels: list[int] = []

    def plan(self, process):
        return []

    def start(self, process, noise):
        return noise.indices.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).float()

    def step(self, *arguments):
        raise AssertionError

    def finish(self, run, x):
        labels = run.cond.label.tolist()
        self.labels += labels
        numbers = x[:, 0, 0, 0].long().tolist()
        return torch.stack([self.rows[k][i % len(self.rows[k])] for i, k in zip(numbers, labels, strict=True)])


# ---- what is measured --------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_averaged_weights_samples(tmp_path):
    run = evaluated(tmp_path, seed=7)
    with run.ema.applied(run.method, "ema"):
        samples = run.method.generate(torch.arange(40), seed=7).x
    expected = by_hand(samples)
    assert [(event["step"], event["images"]) for event in run.events] == [(2, 64), (4, 128)]
    assert set(figures(run.events[0])) == {
        *(f"{name}/digits-40" for name in ("fd", "is", "kd", "precision", "recall", "density", "coverage")),
        *(f"{name}/digits-40" for name in ("near_copies", "nn_ratio", "memorised", "authenticity")),
    }
    assert close(figures(run.events[1]), expected.values)
    assert close(run.events[1]["errors"], expected.errors)
    assert not close(figures(run.events[0]), expected.values, 1e-4)  # other weights
    assert not close(by_hand(run.method.generate(torch.arange(40), seed=7).x).values, expected.values, 1e-4)  # raw ones
    kept = np.load(run.run_dir / run.events[1]["samples_file"])["arr_0"]
    assert np.array_equal(kept, to_uint8(samples, (0.0, 1.0)))


def two_digits(counts):
    """So many zeros and ones."""
    labels = np.array([digits().label(i) for i in range(len(digits()))])
    rows = [np.stack([digits().value(i) for i in np.flatnonzero(labels == k)[:n]]) for k, n in enumerate(counts)]
    return InMemory(np.concatenate(rows), np.repeat([0, 1], counts), num_grey_levels=17, num_classes=2), rows


@pytest.mark.parametrize("reference", ["train", "held_out"])
def test_samples_have_their_classes_as_often_as_the_data_that_they_are_compared_with(tmp_path, reference):
    """Images of the data themselves, by their classes: at no distance."""
    (source, rows), (other, others) = two_digits((168, 7)), two_digits((20, 30))
    counts, real = ((168, 7), rows) if reference == "train" else ((20, 30), others)
    sampler = OfItsClass(real)
    run = evaluated(
        tmp_path,
        64,
        method=ncsn(network={"num_classes": 2}),
        data=DataModule(source, 32, held_out=other),
        samples=600,
        batch_size=300,
        metrics=["fid"],
        reference=reference,
        sampler=sampler,
        seed=7,
    )
    (event,) = run.events
    weights = torch.tensor(counts)
    assert sampler.labels == keyed_choice(7, "sample class", torch.arange(600), weights).tolist()
    share = counts[1] / sum(counts)
    assert abs(sum(sampler.labels) / 600 - share) < 3 * math.sqrt(share * (1 - share) / 600)
    kept = np.load(run.run_dir / event["samples_file"])
    assert kept["labels"].tolist() == sampler.labels[: len(kept["arr_0"])]
    split = "training" if reference == "train" else "held-out"
    assert event["protocol"]["labels"] == f"as in the {split} data"
    assert event["fd/digits-600"] < 1.0  # As often as in the other of the two it would be over 100.


def test_the_protocol_says_how(tmp_path):
    run = evaluated(tmp_path, seed=7)
    extractor, data = load_extractor("digits", (1, 8, 8)), digits_data()
    reference = reference_of(RealData.of(data.source, data.train_indices, "train"), extractor)
    assert run.events[0]["seconds"] > 0
    assert run.events[0]["protocol"] == {
        "extractor": "digits-classifier",
        "extractor_sha256": extractor.sha256,
        "resize": "none",
        "grey_repeated": False,
        "reference": reference.key,
        "reference_source": "digits",
        "split": "train",
        "n_real": 1761,
        "n_fake": 40,
        "is_splits": 10,
        "kid_subsets": 100,
        "kid_subset_size": 40,
        "precision_neighbours": 3,
        "density_neighbours": 5,
        "manifold_n_real": 1761,
        "metric_seed": 2020,
        "weights": "ema",
        "seed": 7,
        "sampler": describe(run.method.sampler, run.method.denoiser),
        "network_evaluations": 7,
        "backbone_precision": "32-true",
        "stage": "fit",
    }


@pytest.mark.parametrize(
    ("asked", "half_lives", "used"), [("raw", [64], "raw"), ("ema:500", [64, 500], "ema:500"), ("ema", [], "raw")]
)
def test_other_weights_by_name(tmp_path, asked, half_lives, used):
    run = evaluated(tmp_path, 64, half_lives, weights=asked, metrics=IMAGE)
    with run.ema.applied(run.method, used):
        expected = by_hand(run.method.generate(torch.arange(40), seed=0).x, IMAGE)
    assert close(figures(run.events[0]), expected.values)
    assert run.events[0]["protocol"]["weights"] == used


def test_another_sampler_and_other_real_data(tmp_path):
    walk = AnnealedLangevin(steps_per_level=1, eta=1e-3)
    run = evaluated(tmp_path, 64, sampler=walk, reference="held_out", metrics=IMAGE)
    protocol = run.events[0]["protocol"]
    assert (protocol["network_evaluations"], protocol["split"], protocol["n_real"]) == (3, "held_out", 36)
    with run.ema.applied(run.method, "ema"):
        samples = run.method.generate(torch.arange(40), 0, sampler=walk).x
    assert np.array_equal(np.load(run.run_dir / run.events[0]["samples_file"])["arr_0"], to_uint8(samples, (0.0, 1.0)))


def test_evaluating_does_not_disturb_the_training(tmp_path):
    ends = []
    for metrics in ([], None):
        run = evaluated(tmp_path / str(metrics), 160, method=ncsn(network={"dropout": 0.3}), metrics=metrics)
        assert len(run.events) == (0 if metrics == [] else 3)
        ends.append((weights(run.method), run.ema.shadows[0]))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


@pytest.mark.parametrize(
    ("keys", "at"),
    [
        ({}, [64, 128, 160]),
        ({"every_n_images": 96}, [96, 160]),
        ({"every_n_images": 32}, [32, 64, 96, 128, 160]),
        ({"every_n_steps": 5}, [160]),
        ({"every_n_images": None}, []),
        ({"metrics": []}, []),
    ],
)
def test_the_cadence_and_the_end_once(tmp_path, keys, at):
    run = evaluated(tmp_path, 160, **{"metrics": IMAGE, **keys})
    assert [event["images"] for event in run.events] == at
    assert run.evaluator.last.get("images") == (160 if at else None)


def test_a_try_run_evaluates_nothing(tmp_path):
    run = evaluated(tmp_path, fast_dev_run=2, test_samples=40)
    run.trainer.test(run.method, datamodule=digits_data(), verbose=False)
    assert run.method.clock.images == 64
    assert run.evaluator.last == {}


def test_no_more_samples_are_kept_than_a_person_looks_at(tmp_path):
    run = evaluated(tmp_path, 64, samples=70, metrics=IMAGE)
    assert list(figures(run.events[0])) == ["fd/digits-70", "is/digits-70", "precision/digits-70"]
    assert len(np.load(run.run_dir / run.events[0]["samples_file"])["arr_0"]) == 64


def test_the_networks_precision_is_not_the_metrics(tmp_path):
    """The same bytes of a run in bfloat16 have the same figures (M1)."""
    full, half = (evaluated(tmp_path / p, 64, sampler=Fixed(), precision=p) for p in ("32-true", "bf16-mixed"))
    assert half.events[0]["protocol"]["backbone_precision"] == "bf16-mixed"
    assert close(figures(full.events[0]), figures(half.events[0]))
    assert close(figures(half.events[0]), by_hand(Fixed.images[:40]).values)


def test_points_are_their_own_features(tmp_path):
    method = toy_dsm()
    run = evaluated(tmp_path, 64, method=method, data=points_data(), seed=3)
    (event,) = run.events
    assert event["protocol"]["extractor"] == "points"
    assert {"fd/points-40", "kd/points-40", "near_copies/points-40"} <= event.keys()
    assert not any(key.startswith("is/") for key in event)
    with run.ema.applied(method, "ema"):
        expected = method.generate(torch.arange(40), 3).x.numpy()
    assert np.array_equal(np.load(run.run_dir / event["samples_file"])["arr_0"], expected)


def test_samples_that_went_astray_are_said_and_recorded_beside_the_figures(tmp_path, capsys):
    class Astray(Fixed):
        def start(self, process, noise):
            return torch.where(noise.indices.view(-1, 1, 1, 1) < 3, 500.0, super().start(process, noise))

    run = evaluated(tmp_path, 64, sampler=Astray(), metrics=IMAGE)
    assert run.events[0]["strays"] == {"count": 3, "of": 40, "largest": 500.0}
    assert capsys.readouterr().out.count("3 of 40 samples ended far outside the data's range") == 1
    sound = evaluated(tmp_path / "b", 64, sampler=Fixed(), metrics=IMAGE)
    assert "strays" not in sound.events[0]
    assert run.events[0]["protocol"].keys() == sound.events[0]["protocol"].keys()


def test_a_sampler_that_diverges_is_a_note_and_the_training_goes_on(tmp_path, capsys):
    walk = Diverging(2, eta=1e-3)

    class Found(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            walk.lost = pl_module.clock.steps < 3

    run = evaluated(tmp_path, 128, sampler=walk, others=[Found()], metrics=IMAGE)
    assert [event["images"] for event in run.events] == [128]
    said = capsys.readouterr().out
    assert said.count("evaluation at 64 images: the sampler diverged") == 1
    assert "no values this time" in said
    assert [entry["images"] for entry in read_best(run.checkpoints)] == [128]


def test_few_samples_are_said_to_be_few_once(tmp_path, capsys):
    evaluated(tmp_path, 128, metrics=IMAGE)
    assert capsys.readouterr().out.count("40 samples are fewer than the 64 dimensions of digits's features") == 1
    evaluated(tmp_path / "b", 64, samples=65, metrics=IMAGE)
    evaluated(tmp_path / "c", 64, metrics=["precision"], best="precision")
    assert "fewer than" not in capsys.readouterr().out


def test_the_time_of_an_evaluation_is_not_the_trainings(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)

    class Time(pl.Callback):
        def on_train_batch_end(self, *arguments):
            clock.now += 2.0

    class Slow(Fixed):
        def start(self, process, noise):
            clock.now += 50.0
            return super().start(process, noise)

    watch = Telemetry(every_n_steps=4)
    run = evaluated(
        tmp_path, 128, sampler=Slow(), batch_size=40, others=[Time(), watch], metrics=IMAGE, every_n_steps=3
    )
    (event,) = events(run.run_dir, "train")
    assert event["images_per_second"] == 16.0
    assert [event["seconds"] for event in run.events] == [50.0, 50.0]


# ---- copies of training images -----------------------------------------------------------------------------------


def test_a_model_that_replays_its_training_is_flagged(tmp_path, capsys):
    run = evaluated(tmp_path, 64, sampler=Fixed())
    (event,) = run.events
    assert event["near_copies/digits-40"] == 1.0
    assert event["nn_ratio/digits-40"] < 1e-4
    assert "look like copies of training images" in capsys.readouterr().out


def test_the_picture_has_each_sample_above_its_nearest_training_image(tmp_path, capsys):
    run = evaluated(tmp_path, 64, seed=5)
    assert "look like copies" not in capsys.readouterr().out
    with run.ema.applied(run.method, "ema"):
        samples = to_uint8(run.method.generate(torch.arange(40), seed=5).x, (0.0, 1.0))
    data, extractor = digits_data(), load_extractor("digits", (1, 8, 8))
    real = RealData.of(data.source, data.train_indices, "train").values(torch.arange(1761))
    distances = torch.cdist(extractor(samples).features.double(), extractor(real).features.double())
    nearest = distances.min(1)
    chosen = nearest.values.argsort()[:12]
    expected = image_grid(np.concatenate((samples[chosen], real[nearest.indices[chosen]])), columns=12)
    (event,) = events(run.run_dir, "picture")
    assert (event["name"], event["file"]) == ("neighbours", "samples/neighbours-0000000064.png")
    assert np.array_equal(np.asarray(Image.open(run.run_dir / event["file"])), expected[..., 0])
    assert event["distances"] == pytest.approx(nearest.values[chosen].tolist(), abs=1e-4)
    without = evaluated(tmp_path / "b", 64, metrics=IMAGE)
    assert events(without.run_dir, "picture") == []


@pytest.mark.parametrize("flip", [False, True])
def test_copies_are_those_of_training_images_whatever_the_reference_and_whichever_way_round(tmp_path, capsys, flip):
    class Mirrored(Fixed):
        def start(self, process, noise):
            return super().start(process, noise).flip(-1)

    data = digits_data(flip=flip)
    (event,) = evaluated(
        tmp_path, 64, data=data, sampler=Mirrored() if flip else Fixed(), reference="held_out", metrics=None
    ).events
    assert event["near_copies/digits-40"] == event["memorised/digits-40"] == 1.0
    assert event["authenticity/digits-40"] == 0.0
    assert "look like copies of training images" in capsys.readouterr().out
    protocol = event["protocol"]
    assert (protocol["split"], protocol["n_real"]) == ("held_out", 36)
    assert (protocol["memorisation_split"], protocol["memorisation_n_real"]) == ("train", 1761)
    assert protocol["memorisation_reference"] != protocol["reference"]
    assert protocol.get("memorisation_mirrored", False) is flip
    assert protocol.get("reference_mirrored") is (False if flip else None)
    (picture,) = events(tmp_path / "run", "picture")
    both = np.asarray(Image.open(tmp_path / "run" / picture["file"]))
    gap = np.flatnonzero((both == 64).all(1))
    middle = gap[gap > gap[0] + len(both) // 4][0]  # The samples above it, the images below.
    height = middle - len(gap) // 3
    assert np.array_equal(both[len(gap) // 3 :][:height], both[middle + len(gap) // 3 :][:height])


def test_without_mirroring_a_mirror_image_is_no_copy(tmp_path):
    class Mirrored(Fixed):
        def start(self, process, noise):
            return super().start(process, noise).flip(-1)

    (event,) = evaluated(tmp_path, 64, sampler=Mirrored(), metrics=["fid", "memorisation"]).events
    assert event["near_copies/digits-40"] < 0.5
    assert not [key for key in event["protocol"] if key.startswith("memorisation")]


def test_what_was_left_out_is_said_once_and_written_every_time(tmp_path, capsys):
    run = evaluated(tmp_path, 128, reference="held_out", samples=5)
    expected = {
        "is": "10 parts need at least as many samples, there are 5",
        **dict.fromkeys(
            ("precision", "recall", "density", "coverage"), "5 nearest neighbors need more than 5 samples and data"
        ),
        "kid error": "subsets of 5 share most of 5 samples and 36 data",
    }
    assert [event["left_out"] for event in run.events] == [expected, expected]
    assert capsys.readouterr().out.count("left out: is (10 parts") == 1
    assert all(event["errors"] == {} for event in run.events)


def test_a_test_says_what_differed_between_its_seeds(monkeypatch):
    """A solver that chooses its steps takes other numbers of them."""
    same = {"weights": "ema", "sampler": "ode"}
    results = [Result({"fid-40": 1.0}, protocol={**same, "seed": k, "network_evaluations": 10 + k}) for k in (0, 1)]
    told = []
    logger = SimpleNamespace(record=lambda event, values: told.append(values["protocol"]))
    monkeypatch.setattr(module, "run_logger_of", lambda trainer: logger)
    Evaluator(test_seeds=(0, 1))._report(SimpleNamespace(), results)
    assert told == [{**same, "network_evaluations": [10, 11], "seeds": [0, 1]}]


# ---- checkpoints -------------------------------------------------------------------------------------------------


def scripted(monkeypatch, *values, metric="fd/digits-40"):
    """Evaluations whose figure takes these values in turn."""
    compute, left = Scores.compute, list(values)

    def replaced(self, total):
        result = compute(self, total)
        result.values[metric] = left.pop(0)
        return result

    monkeypatch.setattr(Scores, "compute", replaced)


def listed(run):
    """The list of the best, which must be what the folder holds and what the files say of themselves."""
    entries = json.loads((run.checkpoints / "best.json").read_text())
    files = sorted(path.name for path in run.checkpoints.glob("best-*.ckpt"))
    assert files == sorted(entry["file"] for entry in entries)
    for entry in entries:
        saved = torch.load(run.checkpoints / entry["file"], weights_only=True)
        assert saved["lit_diffusion"]["images_seen"] == entry["images"]
        assert saved["callbacks"]["Evaluator"]["last"]["values"][entry["metric"]] == entry["value"]
    assert sorted(os.listdir(run.checkpoints)) == [*files, "best.json", "last.ckpt", "previous.ckpt"]
    return [(entry["images"], entry["value"]) for entry in entries]


@pytest.mark.parametrize(
    ("keep", "values", "kept"),
    [
        (1, (3.0, 1.0, 2.0, 5.0), [(64, 1.0)]),
        (2, (3.0, 1.0, 2.0, 5.0), [(64, 1.0), (96, 2.0)]),
        (3, (3.0, 1.0, 2.0, 5.0), [(64, 1.0), (96, 2.0), (32, 3.0)]),
        (2, (5.0, 4.0, 3.0, 2.0), [(128, 2.0), (96, 3.0)]),
        (1, (2.0, 2.0, 2.0, 2.0), [(32, 2.0)]),  # no better, no change
        (2, (math.nan, 4.0, math.nan, 3.0), [(128, 3.0), (64, 4.0)]),
    ],
)
def test_the_best_are_kept_and_listed_best_first(tmp_path, monkeypatch, keep, values, kept):
    scripted(monkeypatch, *values)
    assert listed(evaluated(tmp_path, every_n_images=32, keep=keep, metrics=IMAGE)) == kept


def test_where_higher_is_better(tmp_path, monkeypatch):
    scripted(monkeypatch, 0.3, 0.1, 0.5, 0.2, metric="precision/digits-40")
    run = evaluated(tmp_path, every_n_images=32, keep=2, best="precision", metrics=IMAGE)
    assert listed(run) == [(96, 0.5), (32, 0.3)]
    assert read_best(run.checkpoints)[0]["file"] == "best-0000000096-precision-digits-40-0.5.ckpt"


def test_none_is_kept_where_none_is_asked_for(tmp_path):
    run = evaluated(tmp_path, keep=0, metrics=["precision"])
    assert len(run.events) == 2
    assert sorted(os.listdir(run.checkpoints)) == ["last.ckpt", "previous.ckpt"]


def test_between_evaluations_nothing_is_compared_or_saved(tmp_path, monkeypatch):
    saved = []
    save = torch.save

    def note(state, file):
        saved.append((state["lit_diffusion"]["images_seen"], Path(file.name).name))
        save(state, file)

    monkeypatch.setattr(torch, "save", note)
    scripted(monkeypatch, 3.0, 4.0)
    run = evaluated(tmp_path, 192, every_n_images=96, metrics=IMAGE)
    best = ".best-0000000096-fd-digits-40-3.ckpt.tmp"
    last = ".last.ckpt.tmp"
    assert saved == [(96, last), (96, best), (96, last), (192, last), (192, last)]
    assert listed(run) == [(96, 3.0)]


def test_last_ckpt_carries_the_last_figures_and_nothing_of_the_extractor(tmp_path):
    method = ncsn()
    names, parameters = set(method.state_dict()), sum(p.numel() for p in method.parameters())
    run = evaluated(tmp_path, 160, method=method, every_n_images=64)
    saved = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    last = saved["callbacks"]["Evaluator"]["last"]
    assert last["images"] == 160
    assert last["values"] == figures(run.events[-1])
    assert last["protocol"] == run.events[-1]["protocol"]
    assert set(saved["state_dict"]) == names
    assert sum(p.numel() for p in method.parameters()) == parameters
    text = str(list(saved["state_dict"])) + str([shadow.keys() for shadow in saved["callbacks"]["EMA"]["shadows"]])
    assert not re.search("inception|trunk|head", text)
    assert run.evaluator._evaluation is None


def test_a_full_disk_leaves_the_best_before_and_its_list(tmp_path, monkeypatch):
    scripted(monkeypatch, 3.0, 1.0)
    save = torch.save

    def fails(state, file):
        if Path(file.name).name.startswith(".best-0000000128"):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match=r"No space left.*the one before is untouched"):
        evaluated(tmp_path, 192, metrics=IMAGE)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert listed(SimpleNamespace(checkpoints=checkpoints)) == [(64, 3.0)]
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["lit_diffusion"]["images_seen"] == 128


def test_other_figures_best_and_other_peoples_files_stay(tmp_path):
    first = evaluated(tmp_path, 64, metrics=IMAGE)
    mine = first.checkpoints / "best-of-mine.ckpt"
    mine.write_bytes(b"mine")
    old = read_best(first.checkpoints)
    again = evaluated(
        tmp_path, 128, continues=True, ckpt_path=first.checkpoints / "last.ckpt", samples=30, metrics=IMAGE
    )
    entries = read_best(again.checkpoints)
    assert [entry["metric"] for entry in entries] == ["fd/digits-30", "fd/digits-40"]
    assert entries[1:] == old
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("content", ["torn", '[{"file": "last.ckpt"}]', "[1]", "3", '{"a": 1}'])
def test_a_damaged_list_is_made_anew(tmp_path, capsys, content):
    first = evaluated(tmp_path, 64, metrics=IMAGE, keep=0)
    (first.checkpoints / "best.json").write_text(content)
    again = evaluated(tmp_path, 128, continues=True, ckpt_path=first.checkpoints / "last.ckpt", metrics=IMAGE)
    assert "best.json is damaged" in capsys.readouterr().out
    assert [images for images, _ in listed(again)] == [128]


def test_a_best_checkpoint_that_somebody_took_away_is_off_the_list(tmp_path):
    first = evaluated(tmp_path, 64, metrics=IMAGE, keep=0)
    gone = {"file": "best-gone.ckpt", "metric": "fd/digits-40", "value": 0.0, "images": 1}
    (first.checkpoints / "best.json").write_text(json.dumps([gone]))
    again = evaluated(tmp_path, 128, continues=True, ckpt_path=first.checkpoints / "last.ckpt", metrics=IMAGE)
    assert [images for images, _ in listed(again)] == [128]


# ---- continuing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [96, 128])  # where an evaluation is due, and where it is not
def test_a_run_continued_after_its_end_is_not_evaluated_twice_there(tmp_path, capsys, end):
    first = evaluated(tmp_path, end, metrics=IMAGE)
    last = first.checkpoints / "last.ckpt"
    again = evaluated(tmp_path, end, continues=True, ckpt_path=last, metrics=IMAGE)
    assert [event["images"] for event in again.events] == [64, end]
    further = evaluated(tmp_path, 160, continues=True, ckpt_path=last, metrics=IMAGE)
    assert [event["images"] for event in further.events] == sorted({64, end, 128, 160})
    assert "is missing" not in capsys.readouterr().out


class Killed(BaseException):
    """As SIGKILL: nothing is caught."""


@pytest.mark.parametrize("moment", ["generating", "recorded", "best saved", "best listed"])
def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch, capsys, moment):
    """Twice, the second time while it is made up for; then all is as if nothing had happened."""
    keys = {"metrics": IMAGE, "keep": 2, "best": "is", "seed": 7}
    straight = evaluated(tmp_path / "straight", 192, **keys)
    assert straight.events[1]["is/digits-40"] > straight.events[0]["is/digits-40"]  # the one cut short is the best then
    target, name = {  # what is called first after that moment
        "generating": (measure, "generate_in_batches"),
        "recorded": (Evaluator, "_keep_the_best"),
        "best saved": (best, "atomic_write"),
        "best listed": (module, "save_after"),
    }[moment]
    whole, calls = getattr(target, name), []

    def cut(*arguments, **more):
        begins = {"best saved": lambda: arguments[0].name == "best.json"}
        if begins.get(moment, lambda: True)():
            calls.append(arguments)
            if len(calls) in (2, 3):
                raise Killed
        return whole(*arguments, **more)

    monkeypatch.setattr(target, name, cut)
    last = tmp_path / "broken" / "run" / "checkpoints" / "last.ckpt"
    for attempt in range(3):
        ckpt = {"ckpt_path": last, "continues": True} if attempt else {}
        if attempt < 2:
            with pytest.raises(Killed):
                evaluated(tmp_path / "broken", 192, **keys, **ckpt)
            assert torch.load(last, weights_only=True)["lit_diffusion"]["images_seen"] == 128
            assert [entry["images"] for entry in read_best(last.parent) if entry["images"] != 128] == [64]
        else:
            broken = evaluated(tmp_path / "broken", 192, **keys, **ckpt)
    assert capsys.readouterr().out.count("the evaluation at 128 images is missing: made now") == 2
    assert same(weights(straight.method), weights(broken.method))
    assert same(straight.ema.shadows[0], broken.ema.shadows[0])
    once = {event["images"]: figures(event) for event in broken.events}
    assert once == {event["images"]: figures(event) for event in straight.events}
    assert listed(broken) == listed(straight)


def test_the_making_up_is_not_counted_as_training(tmp_path, monkeypatch):
    first = evaluated(tmp_path, 64, every_n_images=None)
    assert first.events == []
    watch = Telemetry()
    monkeypatch.setattr(watch, "exclude", lambda seconds: excluded.append(seconds))
    excluded = []
    ckpt = {"ckpt_path": first.checkpoints / "last.ckpt", "continues": True}
    again = evaluated(tmp_path, 96, others=[watch], metrics=IMAGE, every_n_steps=2, **ckpt)
    assert [event["images"] for event in again.events] == [64, 96]
    assert len(excluded) == 2


# ---- how many ----------------------------------------------------------------------------------------------------


class Watch:
    """A clock that only training steps and sampling move."""

    def __init__(self, monkeypatch, step, sample):
        self.now, self.sample = 0.0, sample
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        watch = self

        class Steps(pl.Callback):
            def on_train_batch_start(self, *arguments):
                watch.now += step

        class Walk(Fixed):
            def start(self, process, noise):
                watch.now += sample * len(noise.indices)
                return Fixed.images[noise.indices % 64]

        self.callback, self.walk = Steps(), Walk()


@pytest.mark.parametrize(
    ("sample", "chosen", "within"),
    # Two steps of 100 s between evaluations, of which a twentieth, 10 s, may be spent.
    [(0.021, 500, False), (0.02, 500, True), (0.011, 500, True), (0.0099, 1000, True), (0.0049, 2000, True)],
)
def test_auto_takes_the_most_samples_that_the_budget_allows(tmp_path, monkeypatch, capsys, sample, chosen, within):
    watch = Watch(monkeypatch, 100.0, sample)
    keys = {"samples": "auto", "metrics": ["fid"], "sampler": watch.walk, "batch_size": 250}
    run = evaluated(tmp_path, 128, others=[watch.callback], **keys)
    assert [event["protocol"]["n_fake"] for event in run.events] == [chosen, chosen]
    (budget,) = events(run.run_dir, "budget")
    assert budget["samples"] == chosen
    assert budget["seconds_a_sample"] == pytest.approx(sample)
    assert budget["share"] == pytest.approx(chosen * sample / 200.0)
    said = capsys.readouterr().out
    assert f"eval.samples auto: {chosen}, {1000 * sample:.3g} ms each" in said
    assert ("over eval.budget 5.0%: evaluate less often" in said) != within
    saved = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["Evaluator"]["samples"] == chosen


def test_auto_goes_by_the_speed_of_training_and_not_of_drawing(tmp_path, monkeypatch):
    watch = Watch(monkeypatch, 100.0, 0.0099)

    class Draws(Samples):
        def draw(self, trainer, method):
            watch.now += 1e6

    keys = {"samples": "auto", "metrics": ["fid"], "sampler": watch.walk, "batch_size": 250}
    run = evaluated(tmp_path, 64, others=[watch.callback, Draws(every_n_steps=1)], **keys)
    (budget,) = events(run.run_dir, "budget")
    assert budget["share"] == pytest.approx(0.0495)


def test_auto_of_a_continued_run_is_what_it_was(tmp_path, monkeypatch):
    watch = Watch(monkeypatch, 100.0, 0.0099)
    keys = {"samples": "auto", "metrics": ["fid"], "sampler": watch.walk, "batch_size": 250, "others": [watch.callback]}
    first = evaluated(tmp_path, 64, **keys)
    watch.sample = 10.0
    ckpt = {"ckpt_path": first.checkpoints / "last.ckpt", "continues": True}
    again = evaluated(tmp_path, 128, **keys, **ckpt)
    assert [event["protocol"]["n_fake"] for event in again.events] == [1000, 1000]
    assert len(events(again.run_dir, "budget")) == 1
    elsewhere = evaluated(tmp_path / "elsewhere", 128, **keys, ckpt_path=ckpt["ckpt_path"])
    assert (elsewhere.run_dir / "config.yaml").read_text() == "eval:\n  samples: 1000\n"
    given = evaluated(tmp_path, 192, **{**keys, "samples": 60}, **ckpt)
    assert given.events[-1]["protocol"]["n_fake"] == 60


def test_auto_knows_nothing_before_a_step_was_made(tmp_path, monkeypatch):
    """The checkpoint of a run that never evaluated, at an image where an evaluation is due."""
    first = evaluated(tmp_path, 64, every_n_images=None)
    watch = Watch(monkeypatch, 100.0, 0.0099)
    again = evaluated(
        tmp_path,
        128,
        samples="auto",
        metrics=["fid"],
        sampler=watch.walk,
        batch_size=250,
        others=[watch.callback],
        ckpt_path=first.checkpoints / "last.ckpt",
        continues=True,
    )
    assert [(event["images"], event["protocol"]["n_fake"]) for event in again.events] == [(128, 1000)]


# ---- what is refused before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": "ema:123"}, "weights 'ema:123' are not kept; choose one of raw, ema, ema:64"),
        ({"sampler": Langevin(eta=1.0)}, "Langevin step eta 1 is not below"),
        ({"extractor": "points"}, "extractor points takes points"),
        ({"metrics": ["precision"]}, "eval.best is 'fid', which is not among the metrics here: precision"),
        ({"samples": 1, "metrics": ["fid"]}, "fid cannot be measured: it needs at least 2 samples"),
        ({"metrics": ["fid", "fid_infinity"]}, "fid_infinity cannot be measured: FD-infinity in 64 dimensions needs"),
        ({"weights_path": "nowhere.safetensors"}, "cannot read nowhere.safetensors"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, keys, said):
    method = ncsn()
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        evaluated(tmp_path, method=method, **keys)
    assert "\n" not in str(caught.value)
    assert method.clock.images == 0


def test_a_reference_without_data_is_refused_before_the_first_step(tmp_path):
    method = ncsn()
    data = DataModule(digits(), 32, held_out_fraction=0.0)
    with pytest.raises(UserError, match=r"eval\.reference held_out: there are 0 such data"):
        evaluated(tmp_path, method=method, data=data, reference="held_out")
    assert method.clock.images == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"metrics": ["fidd"]},
        {"best": "fidd"},
        {"best": "memorisation"},
        {"metrics": ["clip_score"]},
        {"samples": 0},
        {"test_samples": 0},
        {"batch_size": 0},
        {"budget": 0.0},
        {"budget": 1.0},
        {"keep": -1},
        {"test_seeds": ()},
        {"test_seeds": (1, 1)},
        {"every_n_images": 0},
    ],
)
def test_a_wrong_configuration(keys):
    (key,) = keys
    with pytest.raises(UserError, match=rf"eval(\.|: ){key}"):
        Evaluator(**keys)


def test_it_needs_a_datamodule_of_this_project(tmp_path):
    made = trainer(tmp_path, 64)
    with pytest.raises(UserError, match="evaluation compares with a lit_diffusion DataModule"):
        Evaluator._datamodule(made)


# ---- test --------------------------------------------------------------------------------------------------------


def measured(folder, method=None, data=None, others=(), half_lives=(64,), **keys):
    """``test`` of a method that has trained for 64 images."""
    method, ema = method or ncsn(), EMA(list(half_lives))
    data = data or digits_data()
    keys = {"test_samples": 40, "batch_size": 16, **keys}
    made = trainer(folder, 64, callbacks=[ema, Evaluator(**keys), *others], logger=run_logger(folder, method))
    made.fit(method, datamodule=data)
    made.test(method, datamodule=data, verbose=False)
    return SimpleNamespace(method=method, ema=ema, run_dir=folder / "run", events=events(folder / "run", "evaluation"))


def test_every_seed_is_an_evaluation_and_test_is_their_mean_and_minimum(tmp_path, capsys):
    run = measured(tmp_path, test_seeds=(3, 5, 8), test_sampler=AnnealedLangevin(1, eta=1e-3))
    assert [event["protocol"]["seed"] for event in run.events] == [3, 5, 8]
    assert all(event["protocol"]["stage"] == "test" for event in run.events)
    assert all(event["protocol"]["network_evaluations"] == 3 for event in run.events)
    kept = [np.load(run.run_dir / event["samples_file"])["arr_0"] for event in run.events]
    assert len({images.tobytes() for images in kept}) == 3
    (summary,) = events(run.run_dir, "test")
    assert summary["protocol"] == {
        **{key: value for key, value in run.events[0]["protocol"].items() if key != "seed"},
        "seeds": [3, 5, 8],
    }
    said = capsys.readouterr().out
    for name in figures(run.events[0]):
        values = [event[name] for event in run.events]
        assert summary[f"{name}/mean"] == pytest.approx(sum(values) / 3)
        assert summary[f"{name}/min"] == min(values)
        assert re.search(rf"{re.escape(name)} +{sum(values) / 3:.4f}, minimum {min(values):.4f}", said)
    (picture,) = events(run.run_dir, "picture")
    with run.ema.applied(run.method, "ema"):
        samples = run.method.generate(torch.arange(40), 3, sampler=AnnealedLangevin(1, eta=1e-3)).x
    assert np.array_equal(kept[0], to_uint8(samples, (0.0, 1.0)))
    assert picture["name"] == "neighbours"
    assert picture["distances"] == pytest.approx([pair.distance for pair in pairs(samples)], abs=1e-4)


def pairs(x):
    data, extractor = digits_data(), load_extractor("digits", (1, 8, 8))
    reference = reference_of(RealData.of(data.source, data.train_indices, "train"), extractor)
    scores = Scores(["memorisation"], extractor, reference, (1, 8, 8), pairs=12)
    scores.update(to_uint8(x, (0.0, 1.0)), torch.arange(len(x)))
    return scores.compute(len(x)).pairs


def test_one_seed_has_no_spread(tmp_path, capsys):
    run = measured(tmp_path, test_seeds=(4,), metrics=["is"])  # without the metric of the best
    (summary,) = events(run.run_dir, "test")
    assert summary["is/digits-40/mean"] == summary["is/digits-40/min"] == run.events[0]["is/digits-40"]
    said = capsys.readouterr().out
    assert "seed [4]:" in said
    assert "minimum" not in said
    assert "nan" not in said


def test_no_metrics_no_test(tmp_path):
    run = measured(tmp_path, metrics=[])
    assert run.events == events(run.run_dir, "test") == []


@pytest.mark.parametrize(("asked", "others"), [("raw", "ema"), ("ema", "raw"), ("ema:500", "ema")])
def test_the_weights_are_those_named_whatever_the_likelihood_is_measured_with(tmp_path, asked, others):
    run = measured(
        tmp_path,
        weights=asked,
        test_seeds=(0,),
        metrics=IMAGE,
        half_lives=[64, 500],
        others=[Likelihood(metrics=[], weights=others)],
    )
    with run.ema.applied(run.method, asked):
        expected = by_hand(run.method.generate(torch.arange(40), 0).x, IMAGE)
    assert close(figures(run.events[0]), expected.values)
    assert run.events[0]["protocol"]["weights"] == asked


def test_a_run_without_held_out_data_is_tested_all_the_same(tmp_path, capsys):
    data = DataModule(digits(), 32, held_out_fraction=0.0)
    run = measured(tmp_path, data=data, test_seeds=(0,), metrics=IMAGE, others=[Likelihood()])
    assert [event["protocol"]["n_real"] for event in run.events] == [1797]
    assert [sorted(figures(event)) for event in events(run.run_dir, "test")] == [
        sorted(f"{name}/digits-40/{part}" for name in ("fd", "is", "precision") for part in ("mean", "min"))
    ]
    assert "not measured: bpd_ode, bpd_bound: no data are held out" in capsys.readouterr().out


def test_points_are_tested(tmp_path):
    run = measured(tmp_path, method=toy_dsm(), data=points_data(), test_seeds=(0, 1))
    assert len(run.events) == 2
    assert "fd/points-40/mean" in events(run.run_dir, "test")[0]


def test_a_test_that_diverges_is_one_line(tmp_path):
    with pytest.raises(UserError, match="the sampler diverged") as caught:
        measured(tmp_path, test_sampler=Diverging(2, eta=1e-3), metrics=IMAGE)
    assert "\n" not in str(caught.value)
    assert events(tmp_path / "run", "evaluation") == []


def test_what_cannot_be_tested_is_said_before_the_likelihoods(tmp_path):
    class Late(Likelihood):
        def on_test_batch_end(self, *arguments):
            raise AssertionError

    with pytest.raises(UserError, match="Langevin step eta 1 is not below"):
        measured(tmp_path, test_sampler=Langevin(eta=1.0), others=[Late(metrics=[])])


def test_grey_levels_other_than_256_and_another_range(tmp_path):
    """What is compared are bytes, however the data are scaled for the model."""
    images = InMemory(np.stack([digits().value(i) for i in range(200)]), num_grey_levels=17, name="some")
    data = DataModule(images, 32, value_range=(-1.0, 1.0), held_out_fraction=0.0)

    class Replay(Fixed):
        def start(self, process, noise):
            return data.training_values(noise.indices % 200)

    run = evaluated(tmp_path, 64, data=data, sampler=Replay(), samples=200, keep=0, metrics=["fid", "memorisation"])
    assert run.events[0]["fd/digits-200"] == pytest.approx(0.0, abs=1e-6)
    assert run.events[0]["near_copies/digits-200"] == 1.0


def test_a_perfect_model_of_dequantised_data_has_a_distance_of_0(tmp_path):
    data = DataModule(digits(), 32, value_range=(-1.0, 1.0), held_out_fraction=0.0, dequantize=True)

    class Replay(Fixed):
        def start(self, process, noise):
            index = noise.indices
            value = torch.from_numpy(np.stack([data.source.value(int(i)) for i in index]))
            return data.normalize(value, index)  # With the noise of training.

    keys = {"sampler": Replay(), "samples": 1797, "batch_size": 599, "keep": 0, "metrics": ["fid", "memorisation"]}
    (event,) = evaluated(tmp_path, 64, data=data, **keys).events
    assert event["fd/digits-1797"] == pytest.approx(0.0, abs=1e-6)
    assert event["near_copies/digits-1797"] == 1.0
