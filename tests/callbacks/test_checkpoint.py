"""last.ckpt is whole or the one before; it holds tensors and plain types only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny import digits_data, fit, ncsn, run_logger, same, trainer

from lit_diffusion.callbacks import EMA, Checkpoint, Samples, Telemetry
from lit_diffusion.clock import Clock
from lit_diffusion.errors import UserError


def seen(path: Path) -> int:
    return torch.load(path, weights_only=True)["lit_diffusion"]["images_seen"]


def saves(monkeypatch):
    """The images seen at each save."""
    noted = []
    save = Checkpoint.save

    def note(self, trainer, method):
        noted.append(method.clock.images)
        save(self, trainer, method)

    monkeypatch.setattr(Checkpoint, "save", note)
    return noted


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [160]),
        ({"every_n_images": 64}, [64, 128, 160]),
        ({"every_n_images": 80}, [96, 160]),  # the first step that reaches a multiple
        ({"every_n_images": 1}, [32, 64, 96, 128, 160]),
        ({"every_n_steps": 2}, [64, 128, 160]),
        ({"every_n_images": 96, "every_n_steps": 2}, [64, 96, 128, 160]),
    ],
)
def test_the_cadence_and_always_the_end_once(tmp_path, monkeypatch, keys, expected):
    noted = saves(monkeypatch)
    method, callback = ncsn(), Checkpoint(**keys)
    fit(method, digits_data(), tmp_path, 160, callbacks=[callback], logger=run_logger(tmp_path, method))
    assert noted == expected
    assert callback.last == tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert seen(callback.last) == 160
    assert os.listdir(callback.last.parent) == ["last.ckpt"]


def test_the_cadence_does_not_drift_over_a_resume(tmp_path, monkeypatch):
    noted = saves(monkeypatch)
    first = ncsn()
    fit(first, digits_data(), tmp_path, 96, callbacks=[Checkpoint(every_n_images=64)])
    fit(
        ncsn(),
        digits_data(),
        tmp_path,
        192,
        callbacks=[Checkpoint(64)],
        ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
    )
    assert noted == [64, 96, 128, 192]


def test_a_bare_trainer_saves_below_its_root(tmp_path):
    fit(ncsn(), digits_data(), tmp_path, 32, callbacks=[Checkpoint()])
    assert seen(tmp_path / "checkpoints" / "last.ckpt") == 32


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(plain(item) for item in value)
    return value is None or type(value) in (int, float, bool, str, torch.Tensor)


def test_it_holds_tensors_and_plain_types_and_what_a_rebuild_needs(tmp_path):
    method = ncsn()
    method.run_config = {"model": {"class_path": "NCSN"}}
    callbacks = [EMA([64]), Samples(count=0), Telemetry(), Checkpoint()]
    fit(method, digits_data(), tmp_path, 64, callbacks=callbacks, logger=run_logger(tmp_path, method))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert plain(saved)
    assert saved["lit_diffusion"] == {
        "format_version": 1,
        "config": {"model": {"class_path": "NCSN"}},
        "facts": {
            "source": "digits",
            "shape": [1, 8, 8],
            "levels": 17,
            "value_range": [0.0, 1.0],
            "num_classes": 10,
            "dequantised": False,
        },
        "images_seen": 64,
        "steps": 2,
        "skipped_steps": 0,
    }
    assert same(saved["state_dict"], method.state_dict())
    assert not any("_orig_mod" in name or name.startswith("module.") for name in saved["state_dict"])


@pytest.mark.parametrize("where", ["trainer", "torch", "stream"])
def test_a_failing_write_leaves_the_file_before_and_nothing_else(tmp_path, monkeypatch, where):
    """A full disk: noticed while the Trainer writes, by torch.save, or by torch's zip writer (a RuntimeError)."""
    method = ncsn()
    logger = run_logger(tmp_path, method)
    folder = tmp_path / "run" / "checkpoints"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if where == "trainer":
        target, name = pl.Trainer, "save_checkpoint"
    else:
        target, name = torch, "save"
        if where == "stream":
            full = RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")
    whole = getattr(target, name)
    calls = []

    def fails_the_second_time(*args, **kwargs):
        calls.append(args)
        if len(calls) < 2:
            return whole(*args, **kwargs)
        (folder / ".last.ckpt.tmp").write_bytes(b"half")
        raise full

    monkeypatch.setattr(target, name, fails_the_second_time)
    with pytest.raises(UserError, match="the one before is untouched") as caught:
        fit(method, digits_data(), tmp_path, 96, callbacks=[Checkpoint(every_n_steps=1)], logger=logger)
    assert "\n" not in str(caught.value)
    assert str(folder / "last.ckpt") in str(caught.value)
    assert len(calls) == 2
    monkeypatch.undo()
    assert os.listdir(folder) == ["last.ckpt"]
    assert seen(folder / "last.ckpt") == 32


def test_a_kill_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    method = ncsn()
    logger = run_logger(tmp_path, method)
    folder = tmp_path / "run" / "checkpoints"
    whole = pl.Trainer.save_checkpoint

    def killed(self, path, *args, **kwargs):
        whole(self, path, *args, **kwargs)
        if method.clock.steps == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(method, digits_data(), tmp_path, 96, callbacks=[Checkpoint(every_n_steps=1)], logger=logger)
    assert seen(folder / "last.ckpt") == 32
    monkeypatch.undo()
    again = ncsn()  # what is left of the torn one is in nobody's way
    logger = run_logger(tmp_path, again, continues=True)
    fit(again, digits_data(), tmp_path, 64, callbacks=[Checkpoint()], logger=logger, ckpt_path=folder / "last.ckpt")
    assert seen(folder / "last.ckpt") == 64
    assert os.listdir(folder) == ["last.ckpt"]


def test_a_bug_of_ours_is_not_a_full_disk(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", broken)
    with pytest.raises(RuntimeError, match="something else"):
        fit(ncsn(), digits_data(), tmp_path, 32, callbacks=[Checkpoint()])


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fit(ncsn(), digits_data(), tmp_path / "file", 32, callbacks=[Checkpoint()])


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A finite gradient times a huge learning rate: the step itself leaves the range of float32."""
    method = ncsn(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    callback = Checkpoint(every_n_steps=1)
    made = trainer(tmp_path, 640, callbacks=[callback])

    class TooFast(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for group in trainer.optimizers[0].param_groups:
                group["initial_lr"] = 1e38 if pl_module.clock.steps >= 2 else 1e-3

    made.callbacks.insert(0, TooFast())
    with pytest.raises(UserError, match=r"weights are not finite at step 3 \(96 images\)"):
        made.fit(method, datamodule=digits_data())
    saved = torch.load(callback.last, weights_only=True)
    assert saved["lit_diffusion"]["images_seen"] == 64
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_weights_that_are_large_but_finite_are_saved(tmp_path):
    method = ncsn(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    method.denoiser.backbone.second.bias.data.fill_(3e38)
    callback = Checkpoint()
    made = trainer(tmp_path, 32, callbacks=[callback])
    made.strategy.connect(method)
    method.clock = Clock(32, 1, 32)
    made.save_checkpoint = lambda path: path.write_bytes(b"saved")
    callback.save(made, method)
    assert callback.last.read_bytes() == b"saved"


@pytest.mark.parametrize("keys", [{"every_n_images": 0}, {"every_n_steps": -2}])
def test_a_wrong_cadence(keys):
    (key,) = keys
    with pytest.raises(UserError, match=rf"checkpoint\.{key} is"):
        Checkpoint(**keys)
