"""A run owns its directory; metrics.jsonl has every event once, whatever the dashboard does."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import CONFIG, LEVELS, digits_data, events, fit, ncsn, run_logger, trainer
from PIL import Image

from lit_diffusion.__main__ import dispatch
from lit_diffusion.callbacks import Telemetry
from lit_diffusion.errors import UserError
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.console import print_note
from lit_diffusion.runs.dashboard import Dashboard
from lit_diffusion.runs.events import drop_lost_events
from lit_diffusion.runs.logger import RunLogger, new_run_id, run_logger_of


def refusal(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the directory -----------------------------------------------------------------------------------------------


def test_run_ids_are_unique_and_sort_by_time():
    ids = [new_run_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", run_id) for run_id in ids)
    torch.manual_seed(0)
    np.random.seed(0)  # not from a seed
    assert new_run_id() not in ids


def test_nothing_is_written_before_it_is_asked_for(tmp_path):
    logger = RunLogger("tiny", root=tmp_path)
    logger.finalize("failed")
    assert logger.name == "tiny"
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_has_a_directory_of_its_own(tmp_path):
    logger = RunLogger("tiny", "seed: 3\n", root=tmp_path)
    run_dir = tmp_path / "tiny" / logger.version
    assert logger.run_dir == run_dir.resolve()
    assert logger.save_dir == str(logger.run_dir)
    assert (run_dir / "run_id").read_text() == f"{logger.version}\n"
    assert (run_dir / "config.yaml").read_text() == "seed: 3\n"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lock",
        "metrics.jsonl",
        "run_id",
        "samples",
    ]
    (start,) = events(run_dir)
    assert start["event"] == "start"
    assert start["format_version"] == 1
    assert start["run_id"] == logger.version
    assert start["resumed"] is False
    assert RunLogger("tiny", root=tmp_path).run_dir != logger.run_dir


def test_the_directory_is_absolute_so_that_a_change_of_folder_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = RunLogger("tiny")
    logger.record("a", {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    logger.record("b", {})
    assert [event["event"] for event in events(logger.run_dir)] == ["start", "a", "b"]
    assert logger.run_dir.is_absolute()
    monkeypatch.chdir(tmp_path)
    again = RunLogger("tiny", run_dir=logger.run_dir.relative_to(tmp_path), continues=True)
    assert again.run_dir == logger.run_dir


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run_id"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert "already holds a run" in refusal(RunLogger("tiny", run_dir=tmp_path).open)
    assert (tmp_path / name).read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_with_other_things_in_it_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert RunLogger("tiny", run_dir=tmp_path).run_dir == tmp_path.resolve()


def test_a_place_where_there_can_be_none(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another with --run_dir" in refusal(RunLogger("tiny", run_dir=tmp_path / "file" / "run").open)


# ---- events ------------------------------------------------------------------------------------------------------


def test_every_event_says_when(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.clock = Clock(images=64, steps=2, batch=32)
    logger.record("mine", {"value": 1.5})
    logger.clock.tick()
    logger.log_metrics({"val/loss": 3.0, "epoch": 0}, step=77)
    logger.finalize("success")
    start, mine, metrics, end = events(tmp_path)
    assert mine == {"event": "mine", "step": 2, "images": 64, "time": mine["time"], "value": 1.5}
    assert metrics["time"] >= mine["time"]
    del metrics["time"]
    assert metrics == {"event": "metrics", "step": 3, "images": 96, "val/loss": 3.0, "weights": "raw"}
    assert (end["event"], end["status"]) == ("end", "success")
    assert start["time"] <= mine["time"] <= end["time"]
    assert abs(mine["time"] - os.stat(tmp_path / "metrics.jsonl").st_mtime) < 5


def test_values_are_plain_json_and_what_is_not_finite_is_text(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.record(
        "mine",
        {
            "a": torch.tensor(1.5),
            "b": np.float64(2.5),
            "c": np.int64(3),
            "d": math.nan,
            "e": -math.inf,
            "f": torch.tensor(math.inf),
            "g": None,
            "h": "text\nof two lines",
            "i": True,
        },
    )
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]

    def no_constant(name):
        raise AssertionError(name)

    values = json.loads(line, parse_constant=no_constant)
    assert [values[key] for key in "abcdefghi"] == [1.5, 2.5, 3, "nan", "-inf", "inf", None, "text\nof two lines", True]


def test_a_picture_is_saved_recorded_and_named_after_the_images_seen(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.clock = Clock(images=640, steps=20, batch=32)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = logger.picture("grid", pixels, "a caption", {"seed": 3})
    assert path == tmp_path.resolve() / "samples" / "grid-0000000640.png"
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    (event,) = events(tmp_path, "picture")
    assert event["name"] == "grid"
    assert event["file"] == "samples/grid-0000000640.png"
    assert (event["caption"], event["seed"], event["images"]) == ("a caption", 3, 640)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.open()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in refusal(lambda: logger.record("mine", {}))


def test_the_trainer_knows_its_runs_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = RunLogger("tiny", run_dir=tmp_path / "run")
    assert run_logger_of(trainer(tmp_path, logger=[CSVLogger(tmp_path), logger])) is logger
    assert run_logger_of(trainer(tmp_path)) is None


def test_a_run_through_the_trainer_has_every_event_once(tmp_path):
    method = ncsn()
    logger, data = run_logger(tmp_path, method), digits_data()
    made = fit(method, data, tmp_path, 96, callbacks=[Telemetry(every_n_steps=1)], logger=logger, limit_val_batches=1.0)
    written = [(event["event"], event["step"], event["images"]) for event in events(tmp_path / "run")]
    train = [("train", 1, 32), ("train", 2, 64), ("train", 3, 96)]
    assert written == [("start", 0, 0), *train, ("metrics", 3, 96), ("end", 3, 96)]
    made.test(method, datamodule=data, verbose=False)  # in the same process, after the end of fit
    assert [event["event"] for event in events(tmp_path / "run")[-2:]] == ["metrics", "end"]
    assert "test/loss" in events(tmp_path / "run")[-2]


def test_a_failed_run_says_so(tmp_path):
    method = ncsn()
    method.loss = lambda batch, seed: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(method, digits_data(), tmp_path, 96, logger=run_logger(tmp_path, method))
    assert events(tmp_path / "run")[-1]["status"] == "failed"


# ---- continuing --------------------------------------------------------------------------------------------------


def written(folder, lines):
    """A metrics.jsonl of these (event, images) and raw lines."""
    start = {"event": "start", "step": 0, "images": 0, "format_version": 1}
    made = [json.dumps(start)]
    made += [json.dumps({"event": line[0], "images": line[1]}) if isinstance(line, tuple) else line for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(made) + "\n")
    return folder / "metrics.jsonl"


def kinds(path):
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_events_after_the_checkpoint_are_set_aside(tmp_path):
    path = written(tmp_path, [("a", 32), ("b", 64), ("c", 65), ("d", 96), ("e", 64)])
    assert drop_lost_events(tmp_path, 64) == 2
    assert kinds(path) == ["start", "a", "b", "e"]
    assert kinds(tmp_path / "metrics.lost.jsonl") == ["c", "d"]
    assert drop_lost_events(tmp_path, 64) == 0
    assert drop_lost_events(tmp_path, 32) == 2
    assert kinds(path) == ["start", "a"]
    assert kinds(tmp_path / "metrics.lost.jsonl") == ["c", "d", "b", "e"]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.lost.jsonl"]


def test_of_several_processes_only_the_first_moves_them_and_speaks(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, [("a", 96)])
    monkeypatch.setenv("RANK", "1")
    assert drop_lost_events(tmp_path, 64) == 0
    print_note("hello")
    assert kinds(path) == ["start", "a"]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert drop_lost_events(tmp_path, 64) == 1
    print_note("hello")
    assert capsys.readouterr().out == "hello\n"


def test_nothing_lost_nothing_touched(tmp_path):
    path = written(tmp_path, [("a", 32)])
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert drop_lost_events(tmp_path, 32) == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not (tmp_path / "metrics.lost.jsonl").exists()


@pytest.mark.parametrize("torn", ['{"event": "c", "ima', '{"event": "c"}', "3", "[]", '{"images": null}', "\x00\x00"])
def test_a_torn_last_line_is_set_aside_and_the_next_event_is_whole(tmp_path, torn):
    path = written(tmp_path, [("a", 32)])
    with path.open("a") as file:
        file.write(torn)  # no end of line: the process was killed
    assert drop_lost_events(tmp_path, 64) == 1
    assert kinds(path) == ["start", "a"]
    assert (tmp_path / "metrics.lost.jsonl").read_text() == torn + "\n"
    (tmp_path / "run_id").write_text("an-id\n")
    logger = RunLogger("tiny", run_dir=tmp_path, continues=True)
    logger.record("b", {})
    assert kinds(path) == ["start", "a", "start", "b"]


def test_a_continued_run_keeps_its_id_and_what_is_there(tmp_path):
    first = RunLogger("tiny", "first: 1\n", run_dir=tmp_path)
    first.record("a", {})
    again = RunLogger("tiny", "second: 2\n", run_dir=tmp_path, continues=True)
    again.record("b", {})
    assert again.version == first.version
    assert [event["event"] for event in events(tmp_path)] == ["start", "a", "start", "b"]
    assert events(tmp_path, "start")[1]["resumed"] is True
    assert (tmp_path / "config.yaml").read_text() == "first: 1\n"


def test_the_first_event_of_a_continued_run_says_where_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    fit_it = ["fit", "--config", "tiny.yaml", "--run_dir", "run"]
    dispatch(fit_it)
    dispatch([*fit_it, "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_images", "128"])
    starts = events(tmp_path / "run", "start")
    assert [(start["images"], start["step"], start["resumed"]) for start in starts] == [(0, 0, False), (64, 2, True)]


def test_metrics_of_an_unknown_format_are_refused_and_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "run_id").write_text("an-id\n")
    for first, said in (
        ({"event": "start", "images": 0, "format_version": 2}, "format_version 2, this lit_diffusion reads 1"),
        ({"event": "start", "images": 0}, "format_version None"),
        ([], "format_version None"),
    ):
        path.write_text(json.dumps(first) + '\n{"event": "a", "images": 99}\n')
        before = path.read_bytes()
        assert said in refusal(RunLogger("tiny", run_dir=tmp_path, continues=True).open)
        assert said in refusal(lambda: drop_lost_events(tmp_path, 32))
        assert path.read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "run_id"]


def test_a_directory_that_is_no_run_cannot_be_continued(tmp_path):
    for make in (RunLogger("tiny", run_dir=tmp_path, continues=True).open, lambda: drop_lost_events(tmp_path, 32)):
        assert "cannot continue the run" in refusal(make)
    written(tmp_path, [])
    assert "run_id" in refusal(RunLogger("tiny", run_dir=tmp_path, continues=True).open)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "cannot continue the run" in refusal(lambda: drop_lost_events(tmp_path, 32))


# ---- Weights & Biases --------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, **given):
        self.given, self.logged, self.metrics, self.finished = given, [], [], None

    def define_metric(self, name, step_metric=None, summary=None):
        self.metrics.append((name, step_metric, summary))

    def log(self, values, **keys):
        assert not keys  # never a step of wandb's own
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """wandb as far as it is used, without its service."""
    runs = []

    def init(**given):
        runs.append(FakeRun(**given))
        return runs[-1]

    fake = SimpleNamespace(
        init=init,
        runs=runs,
        Settings=lambda **keys: keys,
        Image=lambda pixels, caption: ("image", pixels, caption),
        api=SimpleNamespace(api_key=None),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_auto_is_online_for_who_is_logged_in(wandb):
    assert Dashboard().resolved_mode() == "offline"
    wandb.api.api_key = "a key"
    assert Dashboard().resolved_mode() == "online"


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_the_variable_settles_auto_and_nothing_else(wandb, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert Dashboard("auto").resolved_mode() == mode
    assert Dashboard("offline").resolved_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert Dashboard("auto").resolved_mode() == "offline"


def test_the_view_of_a_run(wandb, tmp_path):
    logger = RunLogger("tiny", config={"seed": 3}, run_dir=tmp_path, dashboard=Dashboard("offline", "p", "me", ["x"]))
    logger.clock = Clock(images=64, steps=2, batch=32)
    logger.record("train", {"loss": 2.5, "weights": "ema", "bad": math.nan})
    pixels = np.zeros((4, 4, 1), np.uint8)
    logger.picture("grid", pixels, "a caption")
    logger.finalize("success")
    (run,) = wandb.runs
    assert run.given["mode"] == "offline"
    assert run.given["id"] == logger.version
    assert run.given["name"] == f"tiny/{logger.version}"
    assert (run.given["project"], run.given["entity"], run.given["tags"]) == ("p", "me", ["x"])
    assert run.given["dir"] == str(logger.run_dir)
    assert run.given["config"] == {"seed": 3}
    assert run.given["resume"] == "allow"
    assert run.metrics == [("images", None, None), ("*", "images", None)]
    train, picture = run.logged
    assert train == {"train/loss": 2.5, "images": 64, "trainer/global_step": 2}
    kind, shown, caption = picture.pop("pictures/grid")
    assert (kind, shown.shape, shown.dtype, caption) == ("image", (4, 4), np.uint8, "a caption")
    assert picture == {"images": 64, "trainer/global_step": 2}
    assert run.finished == 0


EVALUATION = {
    **{
        f"{name}-2k": 1.0 for name in ("fid", "fid_infinity", "kid", "is", "precision", "recall", "density", "coverage")
    },
    **{
        f"{name}/digits-500": 0.5
        for name in ("fd", "fd_infinity", "kd", "is", "near_copies", "memorised", "nn_ratio", "authenticity")
    },
    "seconds": 12.3,
    "samples_file": "samples/evaluation-0000000064.npz",
    "protocol": {"sampler": "ancestral", "extractor": "digits", "seed": 0},
}


def test_an_event_is_a_section_and_an_evaluation_brings_its_protocol(wandb, tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path, dashboard=Dashboard("offline"))
    logger.clock = Clock(images=64, steps=2, batch=32)
    when = {"images": 64, "trainer/global_step": 2}
    logger.log_metrics({"val/loss": 3.0, "mine": 1.0, "epoch": 0})
    logger.record("evaluation", EVALUATION)
    logger.record("test", {"bpd_ode": 2.0, "bpd_ode_error": 0.1, "images": 180, "seed": 0, "rtol": 1e-5, "t_min": 1e-3})
    logger.record("predict", {"file": "x", "seed": 0})  # settings alone are no event of the dashboard's
    logger.picture("grid", np.zeros((4, 4, 3), np.uint8), "", {"seed": 0, "network_evaluations": 9})
    (run,) = wandb.runs
    metrics, evaluation, test, picture = run.logged
    assert metrics == {"val/loss": 3.0, "mine": 1.0, **when}
    protocol = evaluation.pop("evaluation/protocol")
    assert json.loads(protocol) == EVALUATION["protocol"]
    numbers = {key: value for key, value in EVALUATION.items() if isinstance(value, float)}
    assert evaluation == {**{f"evaluation/{key}": value for key, value in numbers.items()}, **when}
    assert test == {"test/bpd_ode": 2.0, "test/bpd_ode_error": 0.1, "test/images": 180, **when}
    assert set(picture) == {"pictures/grid", *when}
    assert events(tmp_path, "evaluation")[0]["protocol"] == EVALUATION["protocol"]
    assert "bpd_ode" in events(tmp_path, "test")[0]  # sections are the dashboard's alone


def test_the_best_of_what_has_a_direction_is_in_the_summary(wandb, tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path, dashboard=Dashboard("offline"))
    for _ in range(2):
        logger.record("evaluation", EVALUATION)
        logger.record("train", {"loss": 1.0})
        logger.log_metrics({"val/loss": 3.0})
    defined = wandb.runs[0].metrics
    assert defined[:2] == [("images", None, None), ("*", "images", None)]
    assert all(step == "images" for _, step, _ in defined[2:])
    assert len({name for name, _, _ in defined}) == len(defined)  # each once
    best = {name: summary for name, _, summary in defined[2:]}
    least = [
        "val/loss",
        *(f"evaluation/{key}" for key in ("fid-2k", "fid_infinity-2k", "kid-2k", "fd/digits-500")),
        *(f"evaluation/{key}" for key in ("fd_infinity/digits-500", "kd/digits-500")),
    ]
    most = ["is-2k", "precision-2k", "recall-2k", "density-2k", "coverage-2k", "is/digits-500"]
    assert best == {
        **dict.fromkeys(least, "last,min"),
        **dict.fromkeys([f"evaluation/{key}" for key in most], "last,max"),
    }


def test_pictures_are_bytes_or_refused(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    with pytest.raises(TypeError, match="grid is float32, not uint8"):
        logger.picture("grid", np.zeros((4, 4, 3), np.float32), "")
    assert list(tmp_path.rglob("*.png")) == []


def documented_panels():
    """The table of docs/dashboard.md: section, keys as regular expressions with their choices apart, x axis."""
    text = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text()
    table = text.split("<!-- panels -->")[1].split("<!-- end -->")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.strip().splitlines()[2:]]
    for section, key, axis, *_ in ([cell.strip() for cell in row] for row in rows):
        pattern = key.strip("`").replace("\\|", "|")
        pattern = pattern if pattern.startswith("^") else f"^{re.escape(pattern)}$"
        choices = re.search(r"\(([^()]*)\)", pattern)
        each = choices[1].split("|") if choices else [""]
        yield section, [pattern.replace(choices[0], choice) if choices else pattern for choice in each], axis


def test_what_the_documentation_says_is_what_a_run_logs(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = CONFIG["model"]["init_args"]["backbone"]
    method = {"class_path": "DDPM", "init_args": {"num_timesteps": 20, "beta_T": 0.4, "backbone": backbone}}
    config = {**CONFIG, **LEVELS, "model": method, "samples": {"count": 4}, "telemetry": {"every_n_steps": 1}}
    config["wandb"] = {"mode": "offline"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    dispatch(["fit", "--config", "tiny.yaml", "--run_dir", "run"])
    few = ["--eval.test_samples", "64", "--eval.test_seeds", "[0]"]
    dispatch(["test", "--ckpt_path", "run/checkpoints/last.ckpt", "--run_dir", "test", *few])
    logger = RunLogger("tiny", run_dir=tmp_path / "evaluated", dashboard=Dashboard("offline"))
    logger.record("evaluation", EVALUATION)
    logger.record("test", {"fd/digits-500/mean": 0.5, "fd/digits-500/min": 0.4, "protocol": {"seeds": [0, 1]}})
    logger.record("skipped", {"reason": "a loss", "t": 0.5, "sigma_over_alpha": 1.0, "overflow": False})
    logger.picture("neighbours", np.zeros((4, 4, 3), np.uint8), "")
    assert len(wandb.runs) == 3
    logged = {key for run in wandb.runs for row in run.logged for key in row} - {"images", "trainer/global_step"}
    panels = list(documented_panels())
    assert len(panels) > 20
    for section, patterns, axis in panels:
        assert axis == "images"
        for pattern in patterns:
            fitting = [key for key in logged if re.search(pattern, key)]
            assert fitting, f"docs/dashboard.md: nothing logs {pattern}"
            assert all(key.startswith(f"{section}/") for key in fitting)
    for key in logged:
        if key.partition("/")[0] in {section for section, _, _ in panels}:
            assert any(re.search(pattern, key) for _, patterns, _ in panels for pattern in patterns), key


def test_each_part_of_an_offline_run_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    for part in range(2):
        logger = RunLogger("tiny", run_dir=tmp_path / "run", dashboard=Dashboard("offline"), continues=part > 0)
        logger.record("evaluation", EVALUATION)
        logger.picture("grid", pixels[part], "")
        logger.finalize("success")
    parts = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{logger.version}*"))
    assert len(parts) == 2
    shown = []
    for part in parts:
        (log,) = part.glob("run-*.wandb")
        assert log.stat().st_size > 0
        (picture,) = part.glob("files/media/images/pictures/grid_*.png")
        shown.append(np.asarray(Image.open(picture)))
    assert {picture.tobytes() for picture in shown} == {picture.tobytes() for picture in pixels}


def test_a_failed_run_is_marked_as_one(wandb, tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path, dashboard=Dashboard("offline"))
    logger.open()
    logger.finalize("failed")
    assert wandb.runs[0].finished == 1


@pytest.mark.parametrize("trouble", [RuntimeError("no network\nat all"), ValueError(""), ImportError("no wandb")])
@pytest.mark.parametrize("where", ["init", "api", "define_metric", "log", "Image", "finish", "import"])
def test_trouble_is_a_note_and_not_the_end(wandb, tmp_path, monkeypatch, capsys, trouble, where):
    def fails(*args, **keys):
        raise trouble

    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif where == "api":
        wandb.api = type("Api", (), {"api_key": property(fails)})()
    elif where in ("init", "Image"):
        setattr(wandb, where, fails)
    else:
        monkeypatch.setattr(FakeRun, where, fails)
    logger = RunLogger("tiny", run_dir=tmp_path, dashboard=Dashboard("auto"))
    for step in range(3):
        logger.record("train", {"loss": step})
        logger.picture("grid", np.zeros((4, 4, 3), np.uint8), "")
    logger.finalize("success")
    assert [event["event"] for event in events(tmp_path)] == ["start", *["train", "picture"] * 3, "end"]
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases is off" in line]
    assert "at all" not in note


def test_disabled_does_not_even_import_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    monkeypatch.delenv("WANDB_MODE", raising=False)
    notes = []
    monkeypatch.setattr("lit_diffusion.runs.console.print_note", notes.append)
    for folder, dashboard in (("a", Dashboard("disabled")), ("b", None)):
        method = ncsn()
        logger = run_logger(tmp_path / folder, method, dashboard=dashboard)
        fit(method, digits_data(), tmp_path, 64, callbacks=[Telemetry(every_n_steps=1)], logger=logger)
        logger.picture("grid", np.zeros((4, 4, 3), np.uint8), "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    RunLogger("tiny", run_dir=tmp_path / "c", dashboard=Dashboard("auto")).open()
    assert notes == []
