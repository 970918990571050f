"""An interrupted run becomes one Weights & Biases run, each step once, in order, with its pictures."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.tiny import LEVELS, TINY, events
from PIL import Image

from lit_diffusion.__main__ import as_one_line, dispatch
from lit_diffusion.errors import UserError

BLOCK = 32768
PARTS = (96, 160, 192)
"""Images at which the three parts of the run end."""


def logged(path: Path) -> list:
    """The records of a .wandb file: a LevelDB log (blocks of 32 kB, records split over them) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, piece, place = [], b"", 7
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    assert not piece
    return records


def history(records: list) -> list[dict]:
    """The rows of the history."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    return rows


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of three parts; the second was killed after its last checkpoint, so that some events are lost."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **LEVELS, "telemetry": {"every_n_steps": 1}}))
    run = folder / "run"
    always = ["fit", "--config", str(folder / "tiny.yaml"), "--run_dir", str(run), "--eval.metrics", "[]"]
    dispatch([*always, "--trainer.max_images", str(PARTS[0])])
    for images in PARTS[1:]:
        with (run / "metrics.jsonl").open("a") as file:  # of steps that no checkpoint has
            seen = events(run)[-1]["images"]
            lost = {"event": "train", "step": 99, "images": seen + 1, "time": 1e9, "loss": 1e6}
            file.write(json.dumps(lost) + '\n{"event": "train", "st')
        again = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.max_images", str(images)]
        dispatch([*always, *again])
    assert len(events(run, "start")) == 3
    return run


class FakeRun:
    """wandb's run, as far as it is used."""

    def __init__(self, given):
        self.given, self.logged, self.finished = given, [], []
        self.dir = str(Path(given["dir"]) / "wandb" / "offline-run" / "files")
        self.url = "https://example.org/run"

    def define_metric(self, *args, **keys):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """wandb without its service; a server that has one run already, by the id ``there``."""
    runs = []

    def init(**given):
        if given["id"] == "there" and given["resume"] == "never" and given["mode"] == "online":
            raise RuntimeError("Run (there) already exists, but your `resume` setting does not allow resuming\nmore")
        runs.append(FakeRun(given))
        return runs[-1]

    fake = SimpleNamespace(
        init=init,
        runs=runs,
        Settings=lambda **keys: keys,
        Image=lambda pixels, caption: SimpleNamespace(pixels=pixels, caption=caption),
        api=SimpleNamespace(api_key="a key"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        dispatch(["wandb-sync", *map(str, arguments)])
    line = as_one_line(caught.value)
    assert line == str(caught.value)
    assert len(line) < 400
    return line


def test_three_parts_are_one_run_each_step_once(interrupted, wandb, capsys):
    dispatch(["wandb-sync", str(interrupted)])
    (run,) = wandb.runs
    run_id = (interrupted / "run_id").read_text().strip()
    assert run.given["id"] == run_id
    assert run.given["name"] == f"tiny/{run_id}"
    assert (run.given["mode"], run.given["resume"], run.given["project"]) == ("online", "never", "lit_diffusion")
    assert run.given["config"] == yaml.safe_load((interrupted / "config.yaml").read_text())
    train = [row for row in run.logged if "train/loss" in row]
    assert [row["images"] for row in train] == list(range(32, PARTS[-1] + 1, 32))
    assert [row["trainer/global_step"] for row in train] == list(range(1, PARTS[-1] // 32 + 1))
    recorded = events(interrupted, "train")
    assert [row["train/loss"] for row in train] == [event["loss"] for event in recorded]
    assert [row["_timestamp"] for row in train] == [event["time"] for event in recorded]
    images = [row["images"] for row in run.logged]
    assert images == sorted(images)
    assert run.finished == [0]
    said = capsys.readouterr().out
    assert "https://example.org/run" in said
    assert "torn" not in said


def test_pictures_are_those_of_the_run(interrupted, wandb):
    dispatch(["wandb-sync", str(interrupted)])
    shown = [(key, row[key], row["images"]) for row in wandb.runs[0].logged for key in row if key[:9] == "pictures/"]
    recorded = events(interrupted, "picture")
    assert len(shown) == len(recorded) >= 3
    for (key, image, images), event in zip(shown, recorded, strict=True):
        assert (key, images) == (f"pictures/{event['name']}", event["images"])
        assert image.caption == event["caption"]
        assert np.array_equal(image.pixels, np.asarray(Image.open(interrupted / event["file"])))


def test_it_shows_what_was_shown_live(wandb, tmp_path):
    """The same rows as the dashboard had while the run went on, a test's measured images among them."""
    from lit_diffusion.runs.dashboard import Dashboard
    from lit_diffusion.runs.logger import RunLogger

    logger = RunLogger("live", "experiment: live\n", run_dir=tmp_path / "run", dashboard=Dashboard("online"))
    logger.clock.images, logger.clock.steps = 640, 20
    logger.record("train", {"loss": 2.5, "bad": float("nan"), "loss@0.05": 1.0})
    logger.log_metrics({"val/loss": 3.0})
    logger.record("evaluation", {"fd/digits-500": 1.0, "errors": {"a": 1.0}, "protocol": {"seed": 0}})
    logger.record("test", {"bpd_ode": 2.0, "images": 180, "seed": 0})
    logger.record("test", {"fd/digits-500/mean": 2.0, "protocol": {"seeds": [0]}})
    logger.picture("grid", np.zeros((4, 4, 1), np.uint8), "a caption")
    logger.finalize("failed")
    dispatch(["wandb-sync", str(tmp_path / "run"), "--id", "another"])
    live, again = wandb.runs
    assert again.given["id"] == "another"
    rows = [{key: value for key, value in row.items() if key != "_timestamp"} for row in again.logged]
    for row in (*live.logged, *rows):
        if "pictures/grid" in row:
            row["pictures/grid"] = (row["pictures/grid"].pixels.tolist(), row["pictures/grid"].caption)
    assert rows == live.logged
    assert again.finished == [1]


def test_a_run_that_is_on_the_server_is_not_added_to(interrupted, wandb):
    line = refusal(interrupted, "--id", "there")
    assert "already exists" in line
    assert "--id" in line
    assert wandb.runs == []
    dispatch(["wandb-sync", str(interrupted), "--id", "new", "--project", "p", "--entity", "e"])
    given = wandb.runs[0].given
    assert (given["id"], given["project"], given["entity"]) == ("new", "p", "e")


def test_trouble_is_one_line(interrupted, wandb, tmp_path, monkeypatch):
    assert "is no run's directory" in refusal(tmp_path)
    assert "takes a run's directory" in refusal()
    wandb.api.api_key = None
    assert "wandb login" in refusal(interrupted)
    dispatch(["wandb-sync", str(interrupted), "--mode", "offline"])  # needs no login
    wandb.api.api_key = "a key"
    copy = shutil.copytree(interrupted, tmp_path / "copy")
    (copy / "config.yaml").write_text("[")
    assert "config.yaml cannot be read (no YAML)" in refusal(copy)
    (copy / "metrics.jsonl").write_text(json.dumps({"event": "start", "images": 0, "time": 1, "format_version": 9}))
    assert "format_version 9, this lit_diffusion reads 1" in refusal(copy)
    monkeypatch.setattr(FakeRun, "log", lambda self, values: 1 / 0)
    assert "refused the replay (division by zero)" in refusal(interrupted)
    assert wandb.runs[-1].finished == [1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb cannot be used" in refusal(interrupted)


def test_what_is_missing_is_said(interrupted, wandb, tmp_path, capsys):
    copy = shutil.copytree(interrupted, tmp_path / "copy")
    for path in (copy / "samples").glob("film-*.png"):
        path.unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')
    capsys.readouterr()
    dispatch(["wandb-sync", str(copy)])
    said = capsys.readouterr().out
    films = [event for event in events(interrupted, "picture") if event["name"] == "film"]
    assert f"{len(films)} recorded pictures are not there any more" in said
    assert "1 torn lines were left out" in said
    assert not any("pictures/film" in row for row in wandb.runs[0].logged)


def test_the_real_wandb_writes_one_run_with_every_step_once(interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = shutil.copytree(interrupted, tmp_path / "run")
    dispatch(["wandb-sync", str(run_dir), "--mode", "offline"])
    (folder,) = (run_dir / "wandb-sync" / "wandb").glob("offline-run-*")
    assert f"upload: wandb sync {folder.resolve()}" in capsys.readouterr().out
    (path,) = folder.glob("run-*.wandb")
    records = logged(path)
    ids = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    assert ids == {(run_dir / "run_id").read_text().strip()}
    rows = history(records)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    train = [row for row in rows if "train/loss" in row]
    assert [row["images"] for row in train] == list(range(32, PARTS[-1] + 1, 32))
    assert [row["train/loss"] for row in train] == [event["loss"] for event in events(run_dir, "train")]
    assert [row["_timestamp"] for row in train] == [event["time"] for event in events(run_dir, "train")]
    shown = [np.asarray(Image.open(path)) for path in (folder / "files").rglob("*.png")]
    for event in events(run_dir, "picture"):
        pixels = np.asarray(Image.open(run_dir / event["file"]))
        assert any(np.array_equal(pixels, each) for each in shown)
    assert len(shown) == len(events(run_dir, "picture"))
