"""A run that was stopped has, once it is continued, every picture, figure and event of one that was not, once."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import digits_data, events, fit, ncsn, run_logger, same, weights

from lit_diffusion import interrupts
from lit_diffusion.callbacks import EMA, Checkpoint, Evaluator, NoiseLevels, Samples, Telemetry
from lit_diffusion.interrupts import Interrupted

STEPS = 6
TIMINGS = ("seconds", "images_per_second", "tflops", "memory_gb", "gpu_memory_gb")
"""How a key of what differs from run to run begins."""


class SignalDuring(pl.Callback):
    """A signal comes while a step is made."""

    def __init__(self, patch, step):
        self.patch, self.step = patch, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.clock.steps + 1 == self.step:
            self.patch.setattr(interrupts, "_asked", "SIGTERM")


class SignalWhileDrawing(Samples):
    """A signal comes when the sampler is at work, at the first picture from a step on."""

    def __init__(self, patch, step, **keys):
        super().__init__(**keys)
        self.patch, self.step = patch, step

    state_key = "Samples"

    def draw(self, trainer, method):
        if method.clock.steps >= self.step:
            self.patch.setattr(interrupts, "_asked", "SIGTERM")
        super().draw(trainer, method)


def callbacks(samples=Samples, **keys):
    return [
        EMA([64], ramp=1.0),
        samples(every_n_steps=2, count=4, film_columns=2, **keys),
        NoiseLevels(every_n_steps=3, num_levels=2, images=8),
        Evaluator(every_n_steps=2, samples=8, metrics=["memorisation"], keep=0),
        Telemetry(every_n_steps=2),
        Checkpoint(every_n_steps=4),
    ]


END = {"max_images": {"images": STEPS * 32}, "max_steps": {"images": None, "max_steps": STEPS}}


def reproducible(event):
    """What an event says, but for times."""
    return {
        key: reproducible(value) if isinstance(value, dict) else value
        for key, value in event.items()
        if key != "time" and not key.startswith(TIMINGS)
    }


def left(folder):
    """All that a run left behind: events without their times, pictures' bytes."""
    lines = [reproducible(event) for event in events(folder / "run") if event["event"] not in ("start", "end")]
    shown = {path.name: path.read_bytes() for path in (folder / "run" / "samples").iterdir()}
    return sorted(lines, key=lambda e: (e["images"], e["event"], e.get("name", ""))), shown


def trained(folder, extra=(), made=None, continues=False, **keys):
    method = ncsn({"dropout": 0.3})
    given = [*extra, *(made or callbacks())]
    logger = run_logger(folder, method, continues=continues)
    fit(method, digits_data(), folder, callbacks=given, logger=logger, limit_val_batches=1.0, **keys)
    return method


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights and all that is left of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    method = trained(folder, **END["max_images"])
    return weights(method), left(folder)


def is_the_unbroken_one(folder, method, unbroken, end="max_images"):
    expected, (lines, shown) = unbroken
    if end == "max_steps":  # Where Lightning does not validate at the end.
        lines = [event for event in lines if event["event"] != "metrics"]
    assert same(weights(method), expected)
    found, pictures = left(folder)
    assert [(e["event"], e["step"], e.get("name")) for e in found] == [
        (e["event"], e["step"], e.get("name")) for e in lines
    ]
    assert found == lines
    assert pictures == shown


def stopped(folder, monkeypatch, make, end="max_images", continues=False):
    """A run that a signal stops; ``make`` gives what sends it. Returns the checkpoint."""
    last = folder / "run" / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        keys = {**END[end], **make(patch), "ckpt_path": last if continues else None}
        with pytest.raises(Interrupted, match="stopped by SIGTERM after"):
            trained(folder, continues=continues, **keys)
    assert events(folder / "run")[-1]["status"] == "interrupted"
    return last


def in_step(step):
    return lambda patch: {"extra": [SignalDuring(patch, step)]}


def in_a_picture(step):
    return lambda patch: {"made": callbacks(SignalWhileDrawing, patch=patch, step=step)}


@pytest.mark.parametrize(
    ("step", "end"), [*((step, "max_images") for step in (1, 2, 3, 4, STEPS)), (STEPS, "max_steps")]
)
def test_a_run_stopped_in_a_step_is_made_up_for(tmp_path, monkeypatch, unbroken, step, end):
    """In steps after which nothing, a picture, noise levels, a checkpoint or the end is due."""
    last = stopped(tmp_path, monkeypatch, in_step(step), end)
    assert torch.load(last, weights_only=True)["lit_diffusion"]["steps"] == step
    drawn = [e for e in events(tmp_path / "run") if e["event"] in ("picture", "noise_levels", "evaluation")]
    assert all(event["step"] < step for event in drawn)  # There was no time for any.
    method = trained(tmp_path, continues=True, ckpt_path=last, **END[end])
    is_the_unbroken_one(tmp_path, method, unbroken, end)


@pytest.mark.parametrize(("step", "end"), [(2, "max_images"), (STEPS, "max_images"), (STEPS, "max_steps")])
def test_a_run_stopped_in_a_picture_is_made_up_for(tmp_path, monkeypatch, unbroken, step, end, capsys):
    last = stopped(tmp_path, monkeypatch, in_a_picture(step), end)
    assert "stopped by SIGTERM while sampling; it is made when the run is continued" in capsys.readouterr().out
    assert torch.load(last, weights_only=True)["lit_diffusion"]["steps"] == step
    assert not any(e["step"] >= step for e in events(tmp_path / "run", "picture"))
    method = trained(tmp_path, continues=True, ckpt_path=last, **END[end])
    is_the_unbroken_one(tmp_path, method, unbroken, end)


def test_a_run_stopped_again_while_it_makes_up_is_made_up_for(tmp_path, monkeypatch, unbroken):
    stopped(tmp_path, monkeypatch, in_step(2))
    last = stopped(tmp_path, monkeypatch, in_a_picture(2), continues=True)
    assert torch.load(last, weights_only=True)["lit_diffusion"]["steps"] == 2
    assert events(tmp_path / "run", "picture") == []
    method = trained(tmp_path, continues=True, ckpt_path=last, **END["max_images"])
    is_the_unbroken_one(tmp_path, method, unbroken)


def test_what_is_made_up_for_may_come_before_its_average_in_the_list(tmp_path, monkeypatch):
    """And that average may be a new one, which starts at the raw weights."""
    last = stopped(tmp_path, monkeypatch, in_step(2))
    samples = Samples(every_n_steps=2, count=4, film_columns=0, weights="ema:500")
    trained(
        tmp_path, made=[samples, EMA([64, 500], ramp=1.0), Checkpoint()], continues=True, ckpt_path=last, images=3 * 32
    )
    shown = [(event["step"], event["weights"]) for event in events(tmp_path / "run", "picture")]
    assert shown == [(2, "ema:500"), (3, "ema:500")]


def test_a_run_that_was_not_stopped_draws_nothing_again(tmp_path):
    """It ended at a moment when pictures were due, and goes on."""
    trained(tmp_path, images=4 * 32)
    before = len(events(tmp_path / "run", "picture"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained(tmp_path, continues=True, ckpt_path=last, **END["max_images"])
    shown = [(event["name"], event["step"]) for event in events(tmp_path / "run", "picture")]
    assert len(shown) == len(set(shown)) > before


def test_a_checkpoint_of_before_is_no_stop(tmp_path):
    """One that does not say when it last drew may have drawn."""
    trained(tmp_path, images=2 * 32)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    del saved["callbacks"]["Samples"]
    torch.save(saved, last)
    trained(tmp_path, continues=True, ckpt_path=last, **END["max_images"])
    shown = [(event["name"], event["step"]) for event in events(tmp_path / "run", "picture")]
    assert len(shown) == len(set(shown))
