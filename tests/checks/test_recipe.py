"""Each check of a recipe, on one that is sound and on one that is not."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import ddpm, digits, digits_data, ncsn, points_data, run_logger, score_sde, toy_dsm, trainer
from lightning.pytorch.accelerators import MPSAccelerator

from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, NoiseLevels, Samples, Telemetry
from lit_diffusion.checks import machine, recipe
from lit_diffusion.checks.recipe import Recipe
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.processes import VP
from lit_diffusion.reverse import gaussian_kl
from lit_diffusion.runs.clock import Cadence, Clock
from lit_diffusion.runs.dashboard import Dashboard
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.samplers import DDIM, Ancestral
from lit_diffusion.training.datamodule import DataModule


@pytest.fixture
def make(tmp_path):
    """A recipe of a method, data and callbacks, for 960 images where nothing else is said."""

    def build(method=None, data=None, callbacks=(), images=960, logger=None, dashboard=None, **keys):
        method = ncsn() if method is None else method
        data = digits_data() if data is None else data
        method.data_spec, method.clock.batch = data.data_spec, data.global_batch_size
        made = trainer(tmp_path, images, callbacks, **keys)
        return Recipe(method, data, made, logger or run_logger(tmp_path, method), dashboard or Dashboard("disabled"))

    return build


def said(check, *arguments) -> dict[str, str]:
    """The findings of a check by their level, which each has once."""
    found = list(check(*arguments))
    assert len({finding.severity for finding in found}) == len(found)
    return {finding.severity: str(finding) for finding in found}


def images(values, levels=256):
    return DataModule(InMemory(np.asarray(values, np.uint8), num_grey_levels=levels), 8)


# ---- data --------------------------------------------------------------------------------------------------------


def test_data_found(make):
    assert said(recipe.data_found, make())["ok"] == (
        "ok       data digits: 1761 to train on, 36 held out, 1 x 8 x 8, 17 grey levels, 10 classes"
    )
    assert "held_out_fraction" in said(recipe.data_found, make(data=points_data(held_out_fraction=0.0)))["note"]


def test_classes(make):
    assert said(recipe.classes, make()) == {}  # an unconditional model
    ten = said(recipe.classes, make(ncsn(network={"num_classes": 10})))
    assert ten["ok"] == "ok       the model is conditioned on 10 classes, of 170 to 181 training data each"
    more = said(recipe.classes, make(ncsn(network={"num_classes": 12})))
    assert "has 12 classes, the data 10: the others are not trained; set" in more["note"]
    gaps = InMemory(np.stack([digits().value(i) for i in range(40)]), np.array([0, 3] * 20), "gaps", 17, 5)
    found = said(recipe.classes, make(ncsn(network={"num_classes": 5}), DataModule(gaps, 8)))
    assert set(found) == {"warning"}
    assert "no training data of the classes 1, 2, 4" in found["warning"]


def test_data_range(make):
    assert set(said(recipe.data_range, make())) == {"ok"}
    assert set(said(recipe.data_range, make(data=digits_data(dequantize=True, value_range=(-1.0, 1.0))))) == {"ok"}
    assert set(said(recipe.data_range, make(data=points_data()))) == {"ok"}
    black = images(np.zeros((20, 1, 8, 8)))
    assert "all the same" in said(recipe.data_range, make(data=black))["problem"]
    few = images(np.random.default_rng(0).integers(0, 2, (20, 1, 8, 8)))
    assert "declares 256 grey levels" in said(recipe.data_range, make(data=few))["warning"]
    broken = DataModule(InMemory(np.full((20, 2), np.nan, np.float32), num_grey_levels=None), 8)
    assert "not finite" in said(recipe.data_range, make(data=broken))["problem"]
    outside = make()
    outside.first = outside.first * 1.5
    assert "outside data.value_range" in said(recipe.data_range, outside)["problem"]


def test_a_source_that_lies_is_a_problem_of_its_own_words(make):
    lies = make(data=images(np.full((20, 1, 8, 8), 200), levels=17))
    found = [finding for finding in recipe.findings(lies) if finding.severity == "problem"]
    assert "yields grey level 200 but declares grey levels 0..16" in found[0].what


def test_the_first_data_are_those_that_training_sees_first(make):
    made = make()
    batch = next(iter(made.data.train_dataloader()))
    assert torch.equal(made.first[:32], made.data.prepare(batch["value"], batch["label"], batch["index"], True).x)


def test_sigma_data(make):
    assert said(recipe.sigma_data, make(ncsn(sigma_data=9.0))) == {}  # not used
    assert set(said(recipe.sigma_data, make(ncsn(c_in="unit_variance", sigma_data=0.35)))) == {"ok"}
    bad = said(recipe.sigma_data, make(ncsn(c_in="unit_variance", sigma_data=1.0)))
    assert bad["warning"].endswith("set model.init_args.sigma_data 0.38")


def test_largest_noise(make):
    assert set(said(recipe.largest_noise, make(ncsn(sigma_max=6.0)))) == {"ok"}
    assert "technique 1 would raise it" in said(recipe.largest_noise, make(ncsn(sigma_max=2.0)))["note"]
    low = said(recipe.largest_noise, make(ncsn(sigma_max=0.5)))["warning"]
    assert "sigma_max is 0.5, below the data's 0.8" in low
    assert "raise it to 4.74, the largest distance among the first 512 data" in low
    assert said(recipe.largest_noise, make(toy_dsm(), points_data())) == {}  # one level is no ladder
    assert said(recipe.largest_noise, make(ddpm())) == {}


def test_largest_noise_of_more_dimensions_than_data(make):
    """By the other of two matrices that have the same eigenvalues."""
    few, many = make(), make()
    few.first, many.first = few.first[:20], few.first[:20].repeat(40, 1, 1, 1)  # 20 and 800 rows of 64 numbers
    widest = [said(recipe.largest_noise, each)["note"].partition("deviation ")[2][:4] for each in (few, many)]
    assert abs(float(widest[0]) / float(widest[1]) - (20 / 19) ** 0.5) < 0.02


def test_prior_mismatch(make):
    centred = digits_data(value_range=(-1.0, 1.0))
    assert set(said(recipe.prior_mismatch, make(ddpm(num_timesteps=1000, beta_1=1e-4, beta_T=0.02), centred))) == {"ok"}
    assert set(said(recipe.prior_mismatch, make(score_sde(VP()), centred))) == {"ok"}
    short = said(recipe.prior_mismatch, make(ddpm(num_timesteps=100, beta_1=1e-4, beta_T=0.02), centred))
    assert "times 1000 / T" in short["warning"]
    assert said(recipe.prior_mismatch, make(ncsn())) == {}
    found = said(recipe.prior_mismatch, make(score_sde(VP()), digits_data(value_range=(0.0, 1.0))))
    assert found["warning"].endswith("set data.value_range [-1, 1]")


def test_the_gap_to_the_prior_is_the_bounds_prior_term(make):
    made = make(ddpm(num_timesteps=100, beta_1=1e-4, beta_T=0.02), digits_data(value_range=(-1.0, 1.0)))
    end = made.method.denoiser.process.coefficients(torch.ones(1, dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.float64)
    nats = gaussian_kl(end.alpha * made.first.double(), 2.0 * end.sigma.log(), zero, zero)
    assert (
        f"{float(nats.mean()) / math.log(2.0):.2g} bits per dimension" in said(recipe.prior_mismatch, made)["warning"]
    )


def test_reverse_chain(make):
    assert said(recipe.reverse_chain, make(ncsn(sampler=Ancestral()))) == {}  # It trains no chain.
    assert said(recipe.reverse_chain, make(ddpm(sampler=DDIM(4)))) == {}
    assert set(said(recipe.reverse_chain, make(ddpm(variance="beta_tilde")))) == {"ok"}
    assert set(said(recipe.reverse_chain, make(ddpm(variance="learned", loss="hybrid", sampler=Ancestral(4))))) == {
        "ok"
    }
    differs = said(recipe.reverse_chain, make(ddpm(variance="beta_tilde", sampler=Ancestral(4))))["warning"]
    assert "variance is beta_tilde, and the sampler's is beta: samples" in differs
    assert "set model.init_args.sampler.init_args.variance beta_tilde" in differs


# ---- the length of the run ---------------------------------------------------------------------------------------


def test_length(make):
    assert said(recipe.length, make())["ok"].endswith("960 images, 30 steps of 32, 0.545 times through the data")
    assert make(max_steps=10).length == 320
    assert make(images=None, max_steps=10).length == 320
    assert "needs an end" in said(recipe.length, make(images=None))["problem"]
    assert "only time" in said(recipe.length, make(images=None, max_time="00:01:00:00"))["note"]


def test_averages(make):
    assert set(said(recipe.averages, make(callbacks=[EMA([100])]))) == {"ok"}
    assert set(said(recipe.averages, make(callbacks=[EMA(half_lives_steps=[3])]))) == {"ok"}  # 96 images
    for long in (EMA([100, 200]), EMA(half_lives_steps=[7])):
        assert "about [48]" in said(recipe.averages, make(callbacks=[long]))["warning"]
    assert set(said(recipe.averages, make())) == {"note"}
    assert said(recipe.averages, make(images=None, callbacks=[EMA([100])])) == {}


def test_warmup(make):
    assert said(recipe.warmup, make()) == {}
    assert set(said(recipe.warmup, make(ncsn(warmup_images=96)))) == {"ok"}
    assert set(said(recipe.warmup, make(ncsn(warmup_steps=3)))) == {"ok"}
    for long in (ncsn(warmup_images=960), ncsn(warmup_steps=16)):
        assert "of 960 images" in said(recipe.warmup, make(long))["warning"]


def each(**cadences):
    """The callbacks that have one, each due so often: in images."""
    kinds = {"checkpoint": Checkpoint, "eval": Evaluator, "samples": Samples, "telemetry": Telemetry}
    kinds["noise_levels"] = NoiseLevels
    keys = {"every_n_steps": None}
    return [kind(every_n_images=cadences.get(name, 240), **keys) for name, kind in kinds.items()]


def test_cadences(make):
    every = "number of times due: checkpoint 4, eval 4, samples 4, noise_levels 4, telemetry 4"
    assert said(recipe.cadences, make(callbacks=each())) == {"ok": f"ok       {every}"}
    for name, severity in (("checkpoint", "warning"), ("telemetry", "warning"), ("eval", "note"), ("samples", "note")):
        found = said(recipe.cadences, make(callbacks=each(**{name: 100_000})))
        assert f"lower {name}.every_n_images below 960" in found[severity]
    for name in ("checkpoint", "eval", "samples", "noise_levels"):
        found = said(recipe.cadences, make(callbacks=each(**{name: 32}), images=64_000))
        assert f"{name} is due 2,000 times in 64,000 images; raise {name}.every_n_images to 1280" in found["warning"]
    assert "warning" not in said(recipe.cadences, make(callbacks=each(telemetry=32), images=64_000))
    seldom = dict.fromkeys(("checkpoint", "eval", "samples", "noise_levels"), 10**6)
    found = said(recipe.cadences, make(callbacks=each(telemetry=32, **seldom), images=32 * 10**6))
    assert "telemetry is due 1,000,000 times" in found["warning"]
    assert "checkpoint has no cadence" in said(recipe.cadences, make(callbacks=each(checkpoint=None)))["note"]
    assert said(recipe.cadences, make(callbacks=each(), images=None)) == {}


@pytest.mark.parametrize("cadence", [Cadence(100, None), Cadence(32, None), Cadence(7, None), Cadence(None, 4)])
@pytest.mark.parametrize("length", [960, 950])
def test_how_often_is_what_the_clock_says(cadence, length):
    clock, times = Clock(batch=32), 0
    while clock.images < length:
        clock.tick()
        times += cadence.due(clock)
    assert recipe.how_often(cadence, length, 32) == times > 0


# ---- batches and processes ---------------------------------------------------------------------------------------


def test_batches(make):
    assert said(recipe.batches, make())["ok"].endswith("batch 32 on 1 process: 32 each, in 1 part")
    two = make(devices=3, strategy="ddp")
    assert "set it to 33" in said(recipe.batches, two)["problem"]
    assert said(recipe.batches, make(devices=2, strategy="ddp"))["ok"].endswith("2 processes: 16 each, in 1 part")
    few = digits_data()
    few.held_out_indices = few.held_out_indices[:1]
    assert "1 held-out images" in said(recipe.batches, make(data=few, devices=2, strategy="ddp"))["problem"]
    assert "the last part has 2" in said(recipe.batches, make(data=digits_data(micro_batch_size=10)))["note"]
    assert "changes nothing" in said(recipe.batches, make(data=digits_data(micro_batch_size=64)))["note"]
    assert set(said(recipe.batches, make(data=digits_data(micro_batch_size=8)))) == {"ok"}
    assert "1761 training data" in said(recipe.batches, make(data=digits_data(4096)))["note"]


# ---- evaluation and sampling -------------------------------------------------------------------------------------


def test_samplers(make):
    assert set(said(recipe.samplers, make())) == {"ok"}
    found = [finding for finding in recipe.findings(make(ncsn(sampler=Ancestral(steps=99)))) if "99" in finding.what]
    assert [finding.severity for finding in found] == ["problem"]
    with pytest.raises(UserError, match="ema:7"):
        said(recipe.samplers, make(callbacks=[Samples(weights="ema:7")]))


def evaluator(**keys):
    return [Evaluator(every_n_images=320, **{"samples": 500, **keys})]


def test_evaluation(make):
    found = said(recipe.evaluation, make(callbacks=evaluator()))
    assert found["ok"].endswith("of 500 samples in features of digits, against 1761 data")
    assert "no metrics" in said(recipe.evaluation, make())["note"]
    assert "fewer than the" in said(recipe.evaluation, make(callbacks=evaluator(samples=20)))["note"]
    assert "first evaluation" in said(recipe.evaluation, make(callbacks=evaluator(samples="auto")))["note"]
    few = [finding.what for finding in recipe.evaluation(make(callbacks=evaluator(samples=5)))]
    assert any("coverage (5 nearest neighbors need more than 5 samples and data)" in what for what in few)
    for keys, reason in (
        ({"best": "fid_infinity"}, "eval.best is 'fid_infinity'"),
        ({"metrics": ["precision"], "best": "precision", "samples": 3}, "precision cannot be measured"),
        ({"sampler": DDIM(steps=99)}, "99"),
        ({"weights": "ema:7"}, "ema:7"),
        ({"extractor": "inception"}, "fetch weights inception"),
    ):
        with pytest.raises(UserError, match=reason):
            said(recipe.evaluation, make(callbacks=evaluator(**keys)))
    none = digits_data()
    none.held_out_indices = none.held_out_indices[:1]
    with pytest.raises(UserError, match="held_out: there are 1"):
        said(recipe.evaluation, make(data=none, callbacks=evaluator(reference="held_out")))
    held_out = said(recipe.evaluation, make(callbacks=evaluator(reference="held_out", metrics=["fid"])))
    assert "36 real data are fewer than" in held_out["note"]


# ---- what it runs on ---------------------------------------------------------------------------------------------


def test_precision(make, monkeypatch):
    monkeypatch.setattr(machine, "fast_bf16_on_cpu", lambda: True)
    on_cpu = make()
    assert said(recipe.precision, on_cpu)["ok"].endswith("trains on CPU in 32-true")
    assert set(said(recipe.precision, make(precision="bf16-mixed"))) == {"ok"}
    assert "slower than float32" in said(recipe.precision, make(precision="16-mixed"))["warning"]
    monkeypatch.setattr(machine, "fast_bf16_on_cpu", lambda: False)
    assert "without bfloat16" in said(recipe.precision, make(precision="bf16-mixed"))["warning"]
    monkeypatch.setattr(machine, "fast_bf16_on_cpu", lambda: None)
    assert set(said(recipe.precision, make(precision="bf16-mixed"))) == {"ok"}  # nothing is known against it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "there is a GPU" in said(recipe.precision, on_cpu)["note"]


@pytest.mark.parametrize(
    ("precision", "capability", "severity"),
    [
        ("bf16-mixed", (9, 0), "ok"),
        ("bf16-mixed", (7, 5), "warning"),
        ("16-mixed", (7, 5), "ok"),
        ("16-mixed", (6, 1), "warning"),
        ("32-true", (6, 1), "ok"),
    ],
)
def test_precision_on_a_gpu(make, monkeypatch, precision, capability, severity):
    made = make(precision=precision)
    monkeypatch.setattr(Recipe, "on_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert set(said(recipe.precision, made)) == {severity}


def test_compiling(make, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "compiler", lambda on_gpu: "no C++ compiler (g++)")
    assert said(recipe.compiling, make()) == {}
    assert "no C++ compiler" in said(recipe.compiling, make(compile=True))["problem"]
    monkeypatch.setattr(machine, "compiler", lambda on_gpu: None)
    monkeypatch.setattr(recipe.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "headers" in said(recipe.compiling, make(compile=True))["warning"]
    (tmp_path / "Python.h").write_text("")
    assert set(said(recipe.compiling, make(compile=True))) == {"ok"}


def test_states_of_optimisers():
    sgd = torch.optim.SGD
    assert recipe.states_of(ncsn().make_optimizer) == 2  # Adam
    assert recipe.states_of(ncsn(optimizer=lambda parameters: sgd(parameters, 1e-2, momentum=0.9)).make_optimizer) == 1
    assert recipe.states_of(ncsn(optimizer=lambda parameters: sgd(parameters, 1e-2)).make_optimizer) == 0


def test_a_checkpoint_is_as_large_as_it_was_said_to_be(make, tmp_path):
    wide = ncsn({"channels": 4000})
    made = make(wide, images=32, callbacks=[EMA([100, 200]), Checkpoint()])
    count, size, need = recipe.sizes(made)
    assert count == sum(p.numel() for p in wide.parameters()) > 70_000
    made.trainer.fit(wide, datamodule=made.data)
    (path,) = tmp_path.rglob("last.ckpt")
    assert size < path.stat().st_size < 1.02 * size
    assert need == size + 2 * 4 * count


def test_memory(make, monkeypatch):
    made = make()
    need = recipe.sizes(made)[2]
    assert set(said(recipe.memory, made)) == {"ok"}
    for share, severity in ((1.2, "warning"), (0.9, "problem")):
        monkeypatch.setattr(machine, "memory", lambda share=share: int(share * need))
        assert set(said(recipe.memory, made)) == {severity}
    monkeypatch.setattr(Recipe, "on_cuda", True)
    properties = SimpleNamespace(total_memory=need // 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert "the GPU has" in said(recipe.memory, made)["problem"]


def test_disk(make, monkeypatch):
    size = recipe.sizes(make())[1]
    # The last, the one before it, and the one that is written.
    assert "3 checkpoints of" in said(recipe.disk, make())["ok"]
    kept = make(callbacks=evaluator(keep=3))
    assert "6 checkpoints of" in said(recipe.disk, kept)["ok"]
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * size))
    assert "6 checkpoints of" in said(recipe.disk, kept)["problem"]


def test_run_directory(make, tmp_path):
    assert said(recipe.run_directory, make())["ok"].endswith(f"{tmp_path}/run")
    free = RunLogger("tiny", root=tmp_path / "runs")
    assert said(recipe.run_directory, make(logger=free))["ok"].endswith("/tiny/<run id>")
    (tmp_path / "file").write_text("")
    bad = RunLogger("tiny", run_dir=tmp_path / "file" / "run")
    assert "is a file" in said(recipe.run_directory, make(logger=bad))["problem"]
    RunLogger("tiny", run_dir=tmp_path / "run").open()
    assert "already holds a run" in said(recipe.run_directory, make())["problem"]
    again = RunLogger("tiny", run_dir=tmp_path / "run", continues=True)
    assert "continues the run" in said(recipe.run_directory, make(logger=again))["ok"]
    (tmp_path / "run" / "metrics.jsonl").write_text("no event\n")
    with pytest.raises(UserError, match="cannot continue"):
        said(recipe.run_directory, make(logger=again))
    (tmp_path / "run" / "metrics.jsonl").unlink()  # Killed before its first event.
    assert "continues the run" in said(recipe.run_directory, make(logger=again))["ok"]


def test_what_workers_need(make, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=64e6))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (256, 4096))
    levels = lambda workers: [f.severity for f in recipe.shared_memory(make(data=digits_data(num_workers=workers)))]
    assert levels(0) == ["note", "note"]
    assert levels(2) == ["warning", "warning"]


@pytest.mark.parametrize(
    ("mode", "key", "severity", "words"),
    [
        ("disabled", None, "note", "disabled"),
        ("auto", None, "note", "offline"),
        ("auto", "a key", "ok", "online"),
        ("online", None, "warning", "wandb login"),
        ("offline", "a key", "note", "offline"),
    ],
)
def test_weights_and_biases(monkeypatch, mode, key, severity, words):
    fake = SimpleNamespace(api=SimpleNamespace(api_key=key))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert words in said(recipe.weights_and_biases, Dashboard(mode))[severity]


def test_weights_and_biases_that_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "cannot be used" in said(recipe.weights_and_biases, Dashboard())["warning"]
    assert set(said(recipe.weights_and_biases, Dashboard("disabled"))) == {"note"}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    assert "disabled" in said(recipe.weights_and_biases, Dashboard())["note"]


# ---- all of them -------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_is_a_line_and_the_others_go_on(make, monkeypatch):
    def breaks(made):
        yield recipe.ok("before")
        raise ValueError("what\nmore")

    monkeypatch.setattr(recipe, "CHECKS", (breaks, recipe.length))
    first, second, third = recipe.findings(make())
    assert (first.what, third.severity) == ("before", "ok")
    assert (second.severity, second.what) == ("warning", "the check 'breaks' broke (ValueError: what)")


def test_another_accelerator_is_named(make):
    made = make()
    made.trainer = SimpleNamespace(accelerator=MPSAccelerator(), autocast_dtype=None)
    assert said(recipe.precision, made)["ok"].endswith("trains on MPS in 32-true")
