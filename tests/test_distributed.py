"""Two processes compute what one computes: the same losses, weights, averages and samples.

Two processes that import this file make up one group of gloo processes that runs every case.
"""

from __future__ import annotations

import ast
import json
import math
import os
import pkgutil
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from helpers.forked import command_line, group, start
from helpers.tiny import (
    CONFIG,
    LEVELS,
    ddpm,
    digits,
    digits_data,
    events,
    fit,
    flow_matching,
    ncsn,
    pairs_noted,
    trainer,
    two_networks,
    weights,
)

import lit_diffusion
from lit_diffusion import interrupts
from lit_diffusion.backbones import UNet
from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, Likelihood, NoiseLevels, Samples, Telemetry
from lit_diffusion.checkpoints import read_checkpoint
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation.measure import Evaluation
from lit_diffusion.evaluation.sampling import DivergedError, Shard, generate_in_batches
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.methods import NCSN
from lit_diffusion.randomness import keyed_normal
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.samplers import AnnealedLangevin, ProbabilityFlow, Sampler
from lit_diffusion.training.datamodule import DataModule
from lit_diffusion.training.sharding import full_tensor

NAMES = ("plain", "micro", "nan", "clipped", "second_moment", "two_networks", "coupled")
MADE_BY = {"second_moment": ddpm, "two_networks": two_networks, "coupled": flow_matching}


def run(folder: Path, name: str, many: dict, data: dict | None = None, images: int = 96, **keys):
    """One training with everything that is written; returns what it ended with."""
    method, ema = keys.pop("make", ncsn)(**keys.pop("method", {})), EMA([64], ramp=1.0)
    if "loss" in keys:
        method.loss = keys.pop("loss")(method)
    logger = RunLogger(name, root=folder)
    logger.clock = method.clock
    callbacks = [ema, Samples(count=4, film_columns=0), Telemetry(every_n_steps=1), Checkpoint(every_n_steps=1)]
    made = fit(
        method,
        digits_data(**(data or {})),
        folder,
        images,
        callbacks=callbacks,
        logger=logger,
        limit_val_batches=1.0,
        **keys,
        **many,
    )
    return {
        "weights": weights(method),
        "average": ema.shadows[0],
        "loss": float(made.callback_metrics.get("val/loss", math.nan)),
        "run_dir": str(logger.run_dir),
        "run_id": logger.version,
        "skipped": method.skipped_steps,
        "local_loss": float(method.last_step.loss),
        "norm": float(method.last_step.gradient_norm),
        "remembered": {
            name: v for name, v in method.state_dict().items() if "time_law" in name or name == "remembered"
        },
    }


def nan_on_the_last_process(method):
    """The loss of image 63, the last of the second step, is not a number: only one process sees it."""
    loss = method.loss

    def spoilt(batch, seed):
        result = loss(batch, seed)
        if not method.training:
            return result
        return replace(result, per_sample=torch.where(batch.index == 63, math.nan, result.per_sample))

    return spoilt


def coupled(folder: Path, many: dict) -> dict:
    """A training whose noise is paired with the data of the global batch, in parts on two processes; the pairs."""
    method = pairs_noted(flow_matching(coupling="optimal_transport"))
    found = run(folder, "coupled", many, {"micro_batch_size": 5} if many else None, make=lambda: method)
    return {**found, "pairs": method.pairs}


def unequal_shards(folder: Path, many: dict) -> dict:
    """Seven held-out images, one a batch: four for one process and three for the other."""
    held_out = InMemory(np.stack([digits().value(k) for k in range(7)]), num_grey_levels=17)
    data = DataModule(InMemory(digits()._values, num_grey_levels=17), 2, held_out=held_out)
    method = ncsn()
    made = fit(method, data, folder, 4, limit_val_batches=1.0, val_check_interval=1, **many)
    in_fit = float(made.callback_metrics["val/loss"])
    (alone,) = trainer(folder, limit_val_batches=1.0, **many).validate(ncsn(), datamodule=data, verbose=False) or [{}]
    return {"in_fit": in_fit, "alone": alone.get("val/loss", math.nan)}


def predicted(folder: Path, many: dict) -> None:
    method = ncsn(network={"num_classes": 10})
    logger = RunLogger("predict", root=folder)
    made = trainer(folder, callbacks=[Samples()], logger=logger, **many)
    made.predict(method, datamodule=digits_data(8, predict_samples=7))


def refused(folder: Path, many: dict) -> str:
    """What each process says of a directory that holds a run."""
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "run_id").write_text("x")
    method = ncsn()
    try:
        fit(method, digits_data(), folder, 32, logger=RunLogger("tiny", run_dir=folder / "taken"), **many)
    except UserError as error:
        return str(error)
    return ""


class Fixed(Sampler):
    """Sample i is digit i a little brighter, whatever the model; from sample ``lost`` on it is not a number."""

    lost = 1000

    def plan(self, process):
        return []

    def start(self, process, noise):
        images = torch.from_numpy(np.stack([digits().value(int(i)) for i in noise.indices])).float() / 16.0 + 0.1
        return torch.where(noise.indices.view(-1, 1, 1, 1) < self.lost, images, math.nan)

    def step(self, *arguments):
        raise AssertionError


def evaluated(folder: Path, name: str, many: dict, lost: int = 1000, **keys) -> dict:
    """A training that evaluates, and a test; what each process holds of the figures."""
    method, walk = ncsn(), Fixed()
    walk.lost = lost
    logger = RunLogger(name, root=folder)
    logger.clock = method.clock
    keys = {"every_n_steps": 1, "sampler": walk, "test_sampler": Fixed(), "test_seeds": (0, 1), "keep": 2, **keys}
    evaluator = Evaluator(test_samples=37, **keys)
    callbacks = [EMA([64]), evaluator, Checkpoint()]
    data = digits_data()
    made = fit(method, data, folder, 64, callbacks=callbacks, logger=logger, **many)
    last = evaluator.last
    if name == "odd":
        made.test(method, datamodule=data, verbose=False)
    return {"last": last, "tested": evaluator.last, "run_dir": str(logger.run_dir)}


def chosen(folder: Path, many: dict) -> dict:
    """``auto`` where the first process finds samples cheap, and the other dear."""
    dear = os.environ.get("RANK", "0") != "0"
    with (
        patch.object(Evaluation, "seconds_a_sample", lambda *_: 1e9 if dear else 1e-9),
        patch("lit_diffusion.callbacks.evaluator.COUNTS", (20, 40)),
    ):
        return evaluated(folder, "auto", many, samples="auto", metrics=["fid"])


def unet(optimizer=None, seed: int = 0, **keys) -> NCSN:
    """A network with stages to share out."""
    torch.manual_seed(seed)
    backbone = UNet((1, 8, 8), channels=8, mult=(1, 2), blocks=1, attention=(), middle_attention=False)
    keys = {"sampler": AnnealedLangevin(steps_per_level=2, eta=1e-3, denoise=True), **keys}
    # Adam makes full steps of gradients that are nothing but rounding; this one does not.
    optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-3))
    return NCSN(
        backbone,
        sigma_max=2.0,
        sigma_min=0.1,
        num_levels=3,
        parametrization="score",
        c_noise="log_sigma",
        optimizer=optimizer,
        **keys,
    )


def of_a_unet(folder: Path, name: str, many: dict, images: int = 96, ckpt_path=None, **data) -> dict:
    """A training of a U-Net, from its beginning to its end with all that callbacks do; the weights, whole."""
    method, ema = unet(gradient_clip=5.0, seed=0 if ckpt_path is None else 1), EMA([64], ramp=1.0)
    logger = RunLogger(name, root=folder)
    logger.clock = method.clock
    callbacks = [ema, Checkpoint(every_n_steps=1)]
    if images == 96 and ckpt_path is None:
        callbacks += [
            Samples(every_n_steps=2, count=5, film_columns=3),
            NoiseLevels(num_levels=2, images=8),
            Evaluator(every_n_steps=2, samples=9, batch_size=2, metrics=["fid", "memorisation"], keep=1),
            Telemetry(every_n_steps=1),
        ]
    made = fit(
        method,
        digits_data(**data),
        folder,
        images,
        callbacks=callbacks,
        logger=logger,
        limit_val_batches=1.0,
        ckpt_path=ckpt_path,
        **many,
    )
    return {
        "weights": {key: full_tensor(value.detach()).clone() for key, value in method.named_parameters()},
        "average": {key: full_tensor(value).clone() for key, value in ema.shadows[0].items()},
        "own": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in method.parameters()),
        "loss": float(made.callback_metrics["val/loss"]),
        "run_dir": str(logger.run_dir),
    }


def said(call, *kinds) -> tuple[str, str]:
    """What a call is ended by, in words and in kind."""
    try:
        call()
    except kinds as error:
        return type(error).__name__, str(error)
    return "", "nothing"


def refused_with_fsdp(folder: Path, many: dict) -> dict:
    """What each process says of what does not go with sharding; before any work."""

    def tried(method, fit_or_test="fit", callbacks=(), **keys):
        made = trainer(folder / "refused", 32, callbacks=callbacks, **keys, **many)
        return said(lambda: getattr(made, fit_or_test)(method, datamodule=digits_data()), UserError)

    more = unet()
    more.more = torch.nn.Parameter(torch.zeros(1))
    return {
        "compile": tried(unet(), compile=True),
        "16-mixed": tried(unet(), precision="16-mixed"),
        "adaptive": tried(unet(sampler=ProbabilityFlow(1e-2, 1e-2))),
        "outside": tried(more),
        "two networks": tried(two_networks()),
        "likelihood": tried(unet(), "test", [Likelihood()]),
    }


def signal_to_the_last(method):
    """The last process is asked to stop while the second step is made."""
    loss = method.loss

    def signalled(batch, seed):
        if method.training and method.clock.steps == 1 and 63 in batch.index.tolist():
            interrupts._asked = "SIGTERM"
        return loss(batch, seed)

    return signalled


def interrupted(folder: Path, many: dict) -> dict:
    """A training of which one process is asked to stop, and its continuation."""
    method, ema = ncsn(), EMA([64], ramp=1.0)
    method.loss = signal_to_the_last(method)
    logger = RunLogger("tiny", run_dir=folder / "interrupted")
    logger.clock = method.clock
    keys = {"limit_val_batches": 1.0, **many}
    stop = None
    try:
        callbacks = [ema, Samples(every_n_steps=2, count=4, film_columns=0), Checkpoint()]
        fit(method, digits_data(), folder, 96, callbacks=callbacks, logger=logger, **keys)
    except Interrupted as caught:
        stop = caught
    finally:
        interrupts._asked = None
    assert stop is not None
    ended = {"step": method.clock.steps, "said": str(stop), "exit_code": stop.exit_code, "quiet": stop.quiet}
    again, ema = ncsn(seed=1), EMA([64], ramp=1.0)
    callbacks = [ema, Samples(every_n_steps=2, count=4, film_columns=0), Checkpoint()]
    logger = RunLogger("tiny", run_dir=folder / "interrupted", continues=True)
    logger.clock = again.clock
    path = folder / "interrupted" / "checkpoints" / "last.ckpt"
    fit(again, digits_data(), folder, 96, callbacks=callbacks, logger=logger, ckpt_path=path, **keys)
    return {**ended, "weights": weights(again), "average": ema.shadows[0]}


def full_disk(folder: Path, many: dict) -> tuple[str, str]:
    """What each process says where the first cannot write its second checkpoint."""
    method, save = ncsn(), torch.save

    def fails_later(*args):
        if method.clock.steps == 2:
            raise OSError(28, "No space left on device")
        save(*args)

    with patch.object(torch, "save", fails_later):
        keys = {"callbacks": [Checkpoint(every_n_steps=1)], **many}
        return said(lambda: fit(method, digits_data(), folder / "full", 96, **keys), UserError)


def sampling_that_ends(of_the_last: str, rank: int) -> tuple[str, str, int]:
    """Sampling on several processes of which the last diverges, or is asked to stop, in its second batch of three."""
    method, walk, made = ncsn(), Fixed(), []
    method.data_spec = digits_data().data_spec
    if of_the_last == "diverged":
        walk.lost = 6 if rank else 1000

    def all_of_it():
        for batch in generate_in_batches(method, Shard.of(12, 2, rank, 2), 0, 2, walk, show_progress=False):
            made.append(batch.indices)
            if of_the_last == "interrupted" and rank:
                interrupts._asked = "SIGUSR1"

    try:
        return *said(all_of_it, DivergedError, Interrupted), len(made)
    finally:
        interrupts._asked = None


def failing(folder: Path, many: dict, name: str, target: str, rank: int, after: int = 0) -> dict:
    """A training that evaluates and draws, where something fails on one process only, from a call on."""
    module, _, attribute = target.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original, calls = getattr(owner, attribute), []

    def fails(*arguments, **keys):
        calls.append(None)
        if len(calls) > after:
            raise ValueError(f"injected on process {rank}")
        return original(*arguments, **keys)

    method, logger = unet() if many["strategy"] == "fsdp" else ncsn(), RunLogger(name, root=folder)
    logger.clock = method.clock
    evaluator = Evaluator(every_n_steps=1, samples=8, batch_size=2, metrics=["fid", "memorisation"])
    callbacks = [EMA([64]), Samples(every_n_steps=1, count=4), evaluator, Telemetry(every_n_steps=1), Checkpoint()]
    with patch.object(owner, attribute, fails) if int(os.environ["RANK"]) == rank else nullcontext():
        fit(method, digits_data(), folder, 64, callbacks=callbacks, logger=logger, **many)
    whole_weights = {key: full_tensor(value).clone() for key, value in weights(method).items()}
    return {"failed": dict(logger.failed), "weights": whole_weights, "run_dir": str(logger.run_dir)}


FAILING = {
    # On one process only: where it fails, on which, from which call on, and the event's name.
    "update": ("lit_diffusion.metrics.scores.Scores.update", 1, 1, "evaluation"),
    "compute": ("lit_diffusion.metrics.frechet.FrechetDistance.compute", 1, 0, "evaluation/fid"),
    "recording": ("lit_diffusion.callbacks.evaluator.Evaluator._write", 0, 0, "evaluation"),
    "generating": ("lit_diffusion.samplers.langevin.AnnealedLangevin.step", 1, 1, "samples"),
    "grid": ("lit_diffusion.callbacks.samples.image_grid", 0, 0, "samples"),
    "telemetry": ("lit_diffusion.callbacks.progress.Telemetry._add_up", 1, 0, "telemetry"),
}


def everything(folder: Path, many: dict) -> dict:
    """All cases, on one process or on each of two."""
    results = {
        "plain": run(folder, "plain", many),
        "micro": run(folder, "micro", many, {"micro_batch_size": 5, "flip": True, "dequantize": True}),
        "nan": run(folder, "nan", many, loss=nan_on_the_last_process),
        "clipped": run(folder, "clipped", many, method={"gradient_clip": 5.0, "warmup_steps": 3}),
        # Four levels: the law is uneven from the second step on.
        "second_moment": run(
            folder, "second_moment", many, make=ddpm, method={"time_law": "second_moment", "num_timesteps": 4}
        ),
        # Gradients of two losses, averaged by the step itself; twenty steps, in parts.
        "two_networks": run(folder, "two_networks", many, {"micro_batch_size": 6}, images=640, make=two_networks),
        "coupled": coupled(folder, many),
        "unequal": unequal_shards(folder, many),
    }
    # What one process began the other number of processes goes on with.
    begun = ncsn()
    if (folder / "begun.ckpt").exists():
        results["continued"] = run(folder, "continued", many, ckpt_path=folder / "begun.ckpt")
    else:
        fit(begun, digits_data(), folder, 32, callbacks=[EMA([64], ramp=1.0)]).save_checkpoint(folder / "begun.ckpt")
    results["odd"] = evaluated(folder, "odd", many, samples=37, batch_size=4)
    results["few"] = evaluated(folder, "few", many, samples=1, batch_size=4, metrics=["memorisation"], keep=0)
    # Of two processes the second alone has sample 35.
    results["diverged"] = evaluated(folder, "diverged", many, samples=36, batch_size=4, lost=35)
    results["auto"] = chosen(folder, many)
    predicted(folder, many)
    results["refused"] = refused(folder, many)
    results["interrupted"] = interrupted(folder, many)
    results["full_disk"] = full_disk(folder, many)
    return results


def work(folder: Path) -> None:
    """One of two processes."""
    results = everything(folder, {"devices": 2, "strategy": "ddp"})
    rank = int(os.environ["RANK"])
    results |= {
        end: sampling_that_ends(end.removesuffix("_walk"), rank) for end in ("diverged_walk", "interrupted_walk")
    }
    for name, (target, on, after, _) in FAILING.items():
        results[name] = failing(folder, {"devices": 2, "strategy": "ddp"}, name, target, on, after)
    fsdp = {"devices": 2, "strategy": "fsdp"}
    results["fsdp update"] = failing(folder, fsdp, "fsdp_update", *FAILING["update"][:3])
    results["fsdp"] = of_a_unet(folder, "fsdp", {**fsdp, "channels_last": True}, micro_batch_size=5)
    results["fsdp begun"] = of_a_unet(folder, "fsdp_begun", fsdp, 64)
    results["fsdp continued"] = of_a_unet(folder, "fsdp_continued", fsdp, ckpt_path=folder / "begun_unet.ckpt")
    results["fsdp refused"] = refused_with_fsdp(folder, fsdp)
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """All cases on one process."""
    folder = tmp_path_factory.mktemp("one")
    results = everything(folder, {})
    results["unet"] = of_a_unet(folder, "unet", {})
    begun = Path(of_a_unet(folder, "begun_unet", {}, 64)["run_dir"])
    (folder / "begun_unet.ckpt").write_bytes((begun / "checkpoints" / "last.ckpt").read_bytes())
    return folder, results


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    """All cases on two: the folder and what each found."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("begun.ckpt", "begun_unet.ckpt"):
        (folder / name).write_bytes((one[0] / name).read_bytes())
    # The statistics of the real data are theirs too.
    group(2, work, folder, folder=folder, LIT_DIFFUSION_CACHE=str(folder / "cache"))
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def close(first, second, tolerance=1e-5):
    return all(torch.allclose(value, second[name], atol=tolerance) for name, value in first.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_and_averages_are_those_of_one_process(one, two, name):
    single, (first, second) = one[1][name], (results[name] for results in two[1])
    assert close(single["weights"], first["weights"])
    assert close(single["average"], first["average"])
    for kind in ("weights", "average"):
        assert all(torch.equal(first[kind][key], second[kind][key]) for key in first[kind])
    assert not close(single["weights"], weights(MADE_BY.get(name, ncsn)()), 1e-3)  # it moved


@pytest.mark.parametrize("name", NAMES)
def test_every_event_is_written_once_and_says_the_same(one, two, name):
    (single,) = (one[0] / name).iterdir()
    (shared,) = (two[0] / name).iterdir()  # one directory for both
    expected, found = events(single), events(shared)
    assert [(e["event"], e["step"], e["images"]) for e in found] == [
        (e["event"], e["step"], e["images"]) for e in expected
    ]
    for mine, theirs in zip(expected, found, strict=True):
        for key in ("loss", "gradient_norm", "learning_rate", "val/loss", "skipped_steps"):
            if isinstance(mine.get(key), float | int):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (mine, theirs)
    assert len({results[name]["run_id"] for results in two[1]}) == 1
    assert {results[name]["run_dir"] for results in two[1]} == {str(shared)}
    assert sorted(path.name for path in (shared / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert len(list((shared / "samples").iterdir())) == 1


def test_the_law_of_the_levels_remembers_the_losses_of_all_processes_in_the_batchs_order(one, two):
    single, *others = (results["second_moment"]["remembered"] for results in (one[1], *two[1]))
    for remembered in others:
        for name, value in single.items():
            assert torch.allclose(value, remembered[name], rtol=1e-4), name
    assert all(torch.equal(value, others[1][name]) for name, value in others[0].items())
    assert int(single["objective.time_law.counts"].sum()) == 96
    assert int(single["objective.time_law.counts"].min()) >= 10


def test_what_losses_keep_is_that_of_all_processes_in_the_batchs_order(one, two):
    single, *others = (results["two_networks"]["remembered"]["remembered"] for results in (one[1], *two[1]))
    assert len(single) == 32
    assert all(torch.allclose(single, other, rtol=1e-4) for other in others)


def test_noise_is_paired_with_the_data_of_all_processes_whatever_the_parts(one, two):
    single, first, second = (results["coupled"]["pairs"] for results in (one[1], *two[1]))
    assert len(single) == 96
    assert not first.keys() & second.keys()
    shared = first | second
    assert shared.keys() == single.keys()
    assert all(torch.equal(eps, shared[number]) for number, eps in single.items())
    # Some of it belongs to data of the other process.
    own = {n: keyed_normal(0, "noise", torch.tensor([n]), (1, 8, 8))[0] for n in single}
    given = [next(n for n, noise in own.items() if torch.equal(noise, eps)) for eps in first.values()]
    assert sorted(given) != sorted(first)


def test_the_processes_see_different_images(two):
    assert two[1][0]["plain"]["local_loss"] != two[1][1]["plain"]["local_loss"]
    assert two[1][0]["plain"]["norm"] == two[1][1]["plain"]["norm"]


def test_a_nan_on_one_process_skips_the_step_on_both(one, two):
    assert one[1]["nan"]["skipped"] == 1
    assert [results["nan"]["skipped"] for results in two[1]] == [1, 1]


def test_the_image_that_spoilt_a_step_is_named_whoever_had_it(one, two):
    said = []
    for folder in (one[0], two[0]):
        (run_dir,) = (folder / "nan").iterdir()
        (event,) = events(run_dir, "skipped")
        said.append(event["reason"])
    assert said[0] == said[1]
    assert said[0].startswith("the loss of image 63 is nan at noise level")


def test_a_signal_to_one_process_stops_both_after_the_same_step(one, two):
    stops = [results["interrupted"] for results in two[1]]
    assert [stop["step"] for stop in stops] == [2, 2]
    assert [stop["exit_code"] for stop in stops] == [75, 75]
    assert [stop["quiet"] for stop in stops] == [False, True]
    assert stops[0]["said"].startswith("stopped by another process's signal after 64 images")
    assert stops[1]["said"].startswith("stopped by SIGTERM after 64 images")


def test_and_the_continued_run_is_one_that_was_not_stopped(one, two):
    for results in (one[1], *two[1]):
        assert close(one[1]["plain"]["weights"], results["interrupted"]["weights"])
        assert close(one[1]["plain"]["average"], results["interrupted"]["average"])
    for folder in (one[0], two[0]):
        shown = sorted(path.name for path in (folder / "interrupted" / "samples").iterdir())
        assert shown == ["samples-0000000064.png", "samples-0000000096.png"]
        assert [e["images"] for e in events(folder / "interrupted", "picture")] == [64, 96]


def test_a_disk_that_is_full_for_the_first_process_ends_both(one, two):
    for kind, line in (one[1]["full_disk"], *(results["full_disk"] for results in two[1])):
        assert kind == "UserError"
        assert "No space left on device" in line
        assert "the one before is untouched" in line
        assert "\n" not in line
    assert read_checkpoint(two[0] / "full" / "checkpoints" / "last.ckpt")["lit_diffusion"]["images_seen"] == 32


def test_sampling_that_ends_on_one_process_ends_on_both_after_the_same_batch(two):
    first, second = (results["diverged_walk"] for results in two[1])
    assert first == ("DivergedError", "the sampler diverged on another process", 1)
    assert second[0] == "DivergedError"
    assert "among samples 5 to 7" in second[1]
    assert second[2] == 1
    first, second = (results["interrupted_walk"] for results in two[1])
    assert first == ("Interrupted", "another process was asked to stop", 1)
    assert second == ("Interrupted", "stopped by SIGUSR1 while sampling", 1)


@pytest.mark.parametrize("name", [*FAILING, "fsdp update"])
def test_a_failure_of_one_process_is_survived_by_both(two, name):
    """Both go on together, count the same, and train to the same weights."""
    _, rank, _, told = FAILING[name.removeprefix("fsdp ")]
    first, second = (results[name] for results in two[1])
    assert first["failed"] == second["failed"]
    assert first["failed"][told] == 2
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
    if not name.startswith("fsdp"):
        assert close(first["weights"], two[1][0]["grid"]["weights"], 0.0)
    run_dir = Path(first["run_dir"])
    failed = [event for event in events(run_dir, "failed") if event["name"] == told]
    assert [event["error"] for event in failed] == [f"ValueError: injected on process {rank}"] * 2
    assert all(event.get("processes", [0]) == [rank] for event in failed)
    (end,) = events(run_dir, "end")
    assert (end["status"], end["failed"]) == ("success", first["failed"])
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["lit_diffusion"]["images_seen"] == 64


# ---- sharded -----------------------------------------------------------------------------------------------------


def moments(run_dir):
    """The optimizer's state in a run's last checkpoint, in one row."""
    (state,) = read_checkpoint(Path(run_dir) / "checkpoints" / "last.ckpt")["optimizer_states"]
    return {f"{number} {key}": value for number, each in state["state"].items() for key, value in each.items()}


@pytest.mark.parametrize("name", ["fsdp", "fsdp continued"])
def test_sharded_weights_averages_and_moments_are_those_of_one_process(one, two, name):
    single, results = one[1]["unet"], [results[name] for results in two[1]]
    for result in results:
        assert close(single["weights"], result["weights"])
        assert close(single["average"], result["average"])
        assert result["loss"] == pytest.approx(single["loss"], rel=1e-4)
    assert not close(single["weights"], weights(unet()), 1e-3)  # It moved.
    assert single["own"] == sum(result["own"] for result in results)  # Each has a part, and nothing is there twice.
    assert min(result["own"] for result in results) > 0.3 * single["own"]
    expected, found = moments(single["run_dir"]), moments(results[0]["run_dir"])
    assert len(expected) > 20
    assert expected.keys() == found.keys()
    assert close({key: torch.as_tensor(value) for key, value in expected.items()}, found)


def test_a_sharded_run_writes_the_events_and_pictures_of_one_process(one, two):
    single, shared = Path(one[1]["unet"]["run_dir"]), Path(two[1][0]["fsdp"]["run_dir"])
    assert [results["fsdp"]["run_dir"] for results in two[1]] == [str(shared)] * 2
    expected = [e for e in events(single) if "noise" not in e["event"] and e.get("name") != "noise-levels"]
    found = events(shared)
    assert [(e["event"], e["step"], e.get("name")) for e in found] == [
        (e["event"], e["step"], e.get("name")) for e in expected
    ]
    for mine, theirs in zip(expected, found, strict=True):
        numbers = {
            key: value
            for key, value in mine.items()
            if isinstance(value, float) and (key.startswith(("loss", "gradient", "val/")) or "/digits-" in key)
        }
        assert {key: theirs[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    assert len([e for e in expected if e["event"] == "evaluation"]) == 2
    pictures = [path for path in (single / "samples").iterdir() if not path.name.startswith("noise-levels")]
    assert {path.name for path in pictures} == {path.name for path in (shared / "samples").iterdir()}
    assert len(pictures) >= 5
    for path in pictures:
        if path.suffix == ".png":
            assert path.read_bytes() == (shared / "samples" / path.name).read_bytes(), path.name


def test_a_sharded_checkpoint_is_one_of_one_process(one, two, tmp_path):
    """The same keys, shapes and kinds; and one process continues it to the same weights."""
    single, shared = (Path(run["run_dir"]) / "checkpoints" for run in (one[1]["unet"], two[1][0]["fsdp"]))
    expected, found = (read_checkpoint(folder / "last.ckpt") for folder in (single, shared))
    assert expected.keys() == found.keys()
    assert {key: value.shape for key, value in expected["state_dict"].items()} == {
        key: value.shape for key, value in found["state_dict"].items()
    }
    assert close(expected["state_dict"], found["state_dict"])
    assert {path.name for path in single.iterdir()} == {path.name for path in shared.iterdir()}
    begun = Path(two[1][0]["fsdp begun"]["run_dir"]) / "checkpoints" / "last.ckpt"
    again = of_a_unet(tmp_path, "again", {}, ckpt_path=begun)
    assert close(one[1]["unet"]["weights"], again["weights"])
    assert close(one[1]["unet"]["average"], again["average"])


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("compile", "trainer.strategy fsdp does not go with trainer.compile"),
        ("16-mixed", "trainer.strategy fsdp does not go with precision 16-mixed"),
        ("adaptive", "ProbabilityFlow chooses its own steps, and with trainer.strategy fsdp"),
        ("outside", "NCSN: the parameter more requires a gradient, and no optimizer holds it"),
        (
            "two networks",
            "fsdp shards one backbone with one loss, and TwoNetworks trains denoiser, autoencoder with",
        ),
        ("likelihood", "likelihoods are not measured with trainer.strategy fsdp"),
    ],
)
def test_what_does_not_go_with_sharding_is_one_line_on_each_process(two, what, line):
    for results in two[1]:
        kind, said = results["fsdp refused"][what]
        assert kind == "UserError"
        assert line in said
        assert "\n" not in said


def test_the_held_out_loss_counts_every_image_once(one, two):
    single, shared = one[1]["unequal"], two[1][0]["unequal"]
    assert shared["in_fit"] == pytest.approx(single["in_fit"], rel=1e-5)
    assert shared["alone"] == pytest.approx(single["alone"], rel=1e-6)


def test_a_run_of_one_process_is_continued_by_two(one, two):
    assert close(one[1]["plain"]["weights"], two[1][0]["continued"]["weights"])
    assert close(one[1]["plain"]["average"], two[1][0]["continued"]["average"])


@pytest.mark.parametrize(("name", "stages"), [("odd", ["fit", "fit", "test", "test"]), ("few", ["fit", "fit"])])
def test_the_figures_are_those_of_one_process(one, two, name, stages):
    """Of an odd number of samples, and of fewer than there are processes; every event once."""
    (single,), (shared,) = (list((folder / name).iterdir()) for folder in (one[0], two[0]))
    expected, found = events(single, "evaluation"), events(shared, "evaluation")
    assert [event["protocol"]["stage"] for event in expected] == stages
    for mine, theirs in zip(expected, found, strict=True):
        values = {key: value for key, value in mine.items() if "/digits-" in key}
        assert len(values) == (11 if name == "odd" else 4)
        assert {key: theirs[key] for key in values} == pytest.approx(values, rel=1e-6, abs=1e-6)
        assert theirs["errors"] == pytest.approx(mine["errors"], rel=1e-6, abs=1e-6)
        assert theirs["protocol"] == mine["protocol"]
        kept = [np.load(run_dir / mine["samples_file"])["arr_0"] for run_dir in (single, shared)]
        assert np.array_equal(*kept)
    for process in two[1]:
        assert process[name]["last"]["values"] == pytest.approx(one[1][name]["last"]["values"], rel=1e-6, abs=1e-6)
        assert process[name]["tested"]["values"] == pytest.approx(one[1][name]["tested"]["values"], rel=1e-6, abs=1e-6)
    shown = [sorted(path.name for path in (run_dir / "samples").iterdir()) for run_dir in (single, shared)]
    assert shown[0] == shown[1]
    for path in (single / "samples").glob("neighbours-*.png"):
        assert path.read_bytes() == (shared / "samples" / path.name).read_bytes()
    assert [event["event"] for event in events(shared)] == [event["event"] for event in events(single)]


def test_the_best_of_two_processes_are_those_of_one(one, two):
    lists = []
    for folder in (one[0], two[0]):
        (checkpoints,) = (folder / "odd").glob("*/checkpoints")
        lists.append([(e["file"], e["images"]) for e in json.loads((checkpoints / "best.json").read_text())])
        assert {path.name for path in checkpoints.glob("best-*.ckpt")} == {name for name, _ in lists[-1]}
    assert lists[0] == lists[1]
    assert [images for _, images in lists[0]] == [32, 64]


def test_auto_is_one_choice_for_all(one, two):
    for results in (one[1], *two[1]):
        assert results["auto"]["last"]["protocol"]["n_fake"] == 40


def test_a_sampler_that_diverges_on_one_process_is_a_note_on_both(one, two):
    for _, results in (one, (two[0], two[1][0]), (two[0], two[1][1])):
        run = results["diverged"]
        assert run["last"] == {}
        assert events(Path(run["run_dir"]), "evaluation") == []
        assert events(Path(run["run_dir"]))[-1]["status"] == "success"


def test_nothing_but_speaking_is_left_to_the_first_process():
    """What the others pass over is no place for a metric: they would wait for it, or lack it."""
    root, found = Path(lit_diffusion.__file__).parent, []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = ast.unparse(node) if isinstance(node, ast.FunctionDef) else ""
            if "rank_zero" in words or re.search(r"(?<!def )is_first_process\(", words):
                found.append(node.name)
    assert sorted(found) == ["_hold", "drop_lost_events", "print_note"]


def test_predict_gives_the_same_samples(one, two):
    images = []
    for folder in (one[0], two[0]):
        (path,) = folder.glob("predict/*/samples/predict.npz")
        images.append(np.load(path)["arr_0"].astype(int))
    assert images[0].shape == (7, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1
    assert len({image.tobytes() for image in images[0]}) == 7


def test_a_refusal_of_the_first_process_reaches_the_other(one, two):
    assert "already holds a run" in one[1]["refused"]
    assert ["already holds a run" in results["refused"] for results in two[1]] == [True, True]


def test_the_command_line_with_two_devices(tmp_path, monkeypatch):
    """It starts its second process itself, with ``python -m``; both agree on one directory."""
    config = {**CONFIG, **LEVELS, "trainer": {**CONFIG["trainer"], "devices": 2, "strategy": "ddp"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    said = tmp_path / "said.txt"
    paths = [str(Path(lit_diffusion.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.chdir(tmp_path)
    first = start(
        *(command_line, "fit", "--config", "two.yaml"),
        log=said,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        first.join(120)
    finally:
        first.kill()
    assert first.exitcode == 0, said.read_text()
    (run_dir,) = (tmp_path / "runs" / "two").iterdir()
    assert [event["event"] for event in events(run_dir)] == ["start", "metrics", "noise_levels", "picture", "end"]
    assert torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["lit_diffusion"]["images_seen"] == 64
    assert said.read_text().count("done: 64 images in 2 steps") == 1
