"""There is always a whole checkpoint, the last or the one before; it holds tensors and plain types only."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import digits_data, fit, ncsn, run_logger, same, trainer, weights

from lit_diffusion.callbacks import EMA, Checkpoint, Samples, Telemetry
from lit_diffusion.checkpoints import newest_checkpoint
from lit_diffusion.errors import UserError
from lit_diffusion.runs.clock import Clock


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
    kept = {"last.ckpt": 160} if len(expected) == 1 else {"last.ckpt": 160, "previous.ckpt": expected[-2]}
    assert {path.name: seen(path) for path in callback.last.parent.iterdir()} == kept


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
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 64, callbacks=callbacks, logger=logger)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert plain(saved)
    assert saved["lit_diffusion"] == {
        "format_version": 1,
        "run_id": logger.version,
        "config": {"model": {"class_path": "NCSN"}},
        "data_spec": {
            "source": "digits",
            "shape": [1, 8, 8],
            "num_grey_levels": 17,
            "value_range": [0.0, 1.0],
            "num_classes": 10,
            "dequantized": False,
            "class_names": None,
            "class_counts": list(digits_data().data_spec.class_counts),
        },
        "images_seen": 64,
        "steps": 2,
        "skipped_steps": 0,
        "non_finite_in_a_row": 0,
        "validation_due": False,
    }
    assert same(saved["state_dict"], method.state_dict())
    assert not any("_orig_mod" in name or name.startswith("module.") for name in saved["state_dict"])


@pytest.mark.parametrize("where", ["save", "stream", "sync", "rename"])
def test_a_failing_write_leaves_the_file_before_and_nothing_else(tmp_path, monkeypatch, where):
    """A full disk: noticed by torch.save, by torch's zip writer (a RuntimeError), when it is synced, when renamed."""
    method = ncsn()
    logger = run_logger(tmp_path, method)
    folder = tmp_path / "run" / "checkpoints"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if where == "stream":
        full = RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file")
    target, name = {"sync": (os, "fsync"), "rename": (Path, "replace")}.get(where, (torch, "save"))
    whole, failed = getattr(target, name), []

    def fails_the_second_time(*args, **kwargs):
        halves = folder / ".last.ckpt.tmp"
        if method.clock.steps < 2 or not halves.exists() or (where == "rename" and args[0] != halves):
            return whole(*args, **kwargs)
        failed.append(method.clock.steps)
        halves.write_bytes(b"half")
        raise full

    monkeypatch.setattr(target, name, fails_the_second_time)
    with pytest.raises(UserError, match="the one before is untouched") as caught:
        fit(method, digits_data(), tmp_path, 96, callbacks=[Checkpoint(every_n_steps=1)], logger=logger)
    assert "\n" not in str(caught.value)
    assert str(folder / "last.ckpt") in str(caught.value)
    assert failed == [2]
    monkeypatch.undo()
    assert not [path.name for path in folder.iterdir() if path.name not in ("last.ckpt", "previous.ckpt")]
    assert seen(folder / "last.ckpt") == 32


def test_a_kill_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    method = ncsn()
    logger = run_logger(tmp_path, method)
    folder = tmp_path / "run" / "checkpoints"
    whole = torch.save

    def killed(state, file):
        if method.clock.steps < 2:
            whole(state, file)
            return
        file.write(b"PK half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(method, digits_data(), tmp_path, 96, callbacks=[Checkpoint(every_n_steps=1)], logger=logger)
    assert seen(folder / "last.ckpt") == 32
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == [".last.ckpt.tmp", "last.ckpt"]
    again = ncsn()  # what is left of the torn one does no harm
    logger = run_logger(tmp_path, again, continues=True)
    fit(again, digits_data(), tmp_path, 64, callbacks=[Checkpoint()], logger=logger, ckpt_path=folder / "last.ckpt")
    assert {path.name: seen(path) for path in folder.iterdir()} == {"last.ckpt": 64, "previous.ckpt": 32}


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, links):
    """Before each thing that a save asks of the disk, with and without hard links."""
    method, callback = ncsn(), Checkpoint()
    made = fit(method, digits_data(), tmp_path, 32, callbacks=[callback])
    left = [10**9]

    def at_risk(whole, works=True):
        def operation(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            if not works:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return whole(*args, **kwargs)

        return operation

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", at_risk(os.link, links))
        for target, name in ((torch, "save"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(target, name, at_risk(getattr(target, name)))
        for before in range(100):
            newest = method.clock.images
            method.clock.images += 32
            left[0] = before
            try:
                callback.save(made, method)
            except Killed:
                kills += 1
            found, saved = newest_checkpoint(tmp_path)
            assert saved["lit_diffusion"]["images_seen"] in (newest, method.clock.images)
            method.clock.images = saved["lit_diffusion"]["images_seen"]
            if left[0] >= 0:
                break
    assert kills >= 6
    assert found.name == "last.ckpt"
    assert seen(found.with_name("previous.ckpt")) == newest
    assert sorted(os.listdir(found.parent)) == ["last.ckpt", "previous.ckpt"]


def test_the_one_before_continues_as_the_last_does(tmp_path):
    method = ncsn()
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 128, callbacks=[EMA([64]), Checkpoint(every_n_steps=1)], logger=logger)
    ends = []
    for name in ("last.ckpt", "previous.ckpt"):
        again, ema = ncsn(seed=1), EMA([64])
        path = tmp_path / "run" / "checkpoints" / name
        fit(again, digits_data(), tmp_path, 192, callbacks=[ema], ckpt_path=path)
        ends.append({**weights(again), **{f"ema {key}": value for key, value in ema.shadows[0].items()}})
    assert same(*ends)


def test_a_damaged_last_one_does_not_take_the_place_of_the_one_before(tmp_path, monkeypatch):
    """A run that was continued from previous.ckpt keeps it until the next is whole under its name."""
    method = ncsn()
    logger = run_logger(tmp_path, method)
    fit(method, digits_data(), tmp_path, 64, callbacks=[Checkpoint(every_n_steps=1)], logger=logger)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "last.ckpt").write_bytes(b"damaged")
    path, _ = newest_checkpoint(tmp_path / "run")
    assert path == folder / "previous.ckpt"
    again = ncsn()
    logger = run_logger(tmp_path, again, continues=True)
    callback = Checkpoint(every_n_steps=1)
    fit(again, digits_data(), tmp_path, 64, callbacks=[callback], logger=logger, ckpt_path=path)
    assert {path.name: seen(path) for path in folder.iterdir()} == {"last.ckpt": 64, "previous.ckpt": 32}


def test_a_bug_of_ours_is_not_a_full_disk(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
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
    made._checkpoint_connector.dump_checkpoint = lambda weights_only: {"weights_only": weights_only}
    callback.save(made, method)
    assert torch.load(callback.last, weights_only=True) == {"weights_only": False}


@pytest.mark.parametrize("keys", [{"every_n_images": 0}, {"every_n_steps": -2}])
def test_a_wrong_cadence(keys):
    (key,) = keys
    with pytest.raises(UserError, match=rf"checkpoint\.{key} is"):
        Checkpoint(**keys)
