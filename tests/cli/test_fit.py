"""What a run writes, that it can be run again, continued and started from."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import TINY, events

import lit_diffusion
from lit_diffusion.checks import recipe
from lit_diffusion.errors import UserError


def state(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def test_help_is_quick_without_torch_and_names_every_command():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lit_diffusion", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 3.0
    for command in ("fit", "validate", "test", "predict", "sample", "fetch"):
        assert f"\n  {command} " in done.stdout
    check = "import lit_diffusion.__main__, sys; assert not {'torch', 'lightning', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_run_writes_what_the_contract_says(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["format_version"] == 1
    assert config["experiment"] == "tiny"
    assert config["model"]["init_args"]["backbone"]["init_args"]["data_shape"] == [1, 8, 8]
    all_events = events(trained)
    assert all_events[0]["event"] == "start"
    assert all_events[0]["format_version"] == 1
    assert all_events[0]["run_id"] == (trained / "run_id").read_text().strip()
    assert all({"step", "images", "time"} <= event.keys() for event in all_events)
    assert all_events[-1] == {**all_events[-1], "event": "end", "status": "success", "images": 128, "step": 4}
    assert len(list((trained / "samples").glob("samples-*.png"))) == 1
    assert len(list((trained / "samples").glob("film-*.png"))) == 1
    checkpoint = state(trained)
    assert checkpoint["lit_diffusion"]["format_version"] == 1
    assert checkpoint["lit_diffusion"]["images_seen"] == 128
    assert not (trained / "wandb").exists()


def test_config_yaml_runs_again_as_it_is_with_the_same_bits(trained, run, workdir):
    run("fit", "--config", trained / "config.yaml")
    (again,) = (workdir / "runs" / "tiny").iterdir()
    first, second = state(trained)["state_dict"], state(again)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again / "config.yaml").read_text() == (trained / "config.yaml").read_text()


def test_it_says_the_doctors_warnings_that_take_no_time(run, workdir, capsys):
    """A schedule of 100 levels with the betas of 1000, and all else that makes it learn or sample something else."""
    sampler = {"class_path": "Ancestral", "init_args": {"variance": "beta_tilde"}}
    config = {**TINY, "samples": {"count": 0}, "trainer": {**TINY["trainer"], "max_images": 32}}
    backbone = TINY["model"]["init_args"]["backbone"]
    config["model"] = {
        "class_path": "DDPM",
        "init_args": {"num_timesteps": 100, "backbone": backbone, "sampler": sampler},
    }
    (workdir / "short.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config", "short.yaml", "--run_dir", "short")
    lines = capsys.readouterr().out.splitlines()
    made, _ = recipe.prepare(["--config", "short.yaml"])
    warned = [str(found) for found in recipe.findings(made, recipe.SAID_BY_FIT) if found.severity == "warning"]
    assert [line for line in lines if line.startswith("warning")] == warned
    schedule, uncentred, chain, half_lives = warned
    assert schedule.startswith("warning  at t = 1 the data weigh alpha = 0.6")
    assert "raise the last beta" in schedule
    assert "not centred" in uncentred
    assert "variance is beta, and the sampler's is beta_tilde" in chain
    assert "half-life 500, 2,000" in half_lives
    run("fit", "--config", "short.yaml", "--run_dir", "short", "--resume", "auto", "--trainer.max_images", 64)
    assert "warning" not in capsys.readouterr().out  # They were said when it started.


def test_two_runs_of_one_config_never_collide(run, workdir):
    for _ in range(2):
        run("fit", "--config", "tiny.yaml", "--trainer.max_images", 32, "--samples.count", 0)
    assert len(list((workdir / "runs" / "tiny").iterdir())) == 2


def test_a_directory_that_holds_a_run_is_refused(trained, run):
    with pytest.raises(UserError, match="already holds a run"):
        run("fit", "--config", "tiny.yaml", "--run_dir", trained)


def test_continuing_equals_not_stopping(run, workdir):
    common = ["--config", "tiny.yaml", "--samples.count", 0]
    run("fit", *common, "--run_dir", "straight", "--trainer.max_images", 192)
    run("fit", *common, "--run_dir", "broken", "--trainer.max_images", 96)
    run(
        "fit",
        *common,
        "--run_dir",
        "broken",
        "--ckpt_path",
        "broken/checkpoints/last.ckpt",
        "--trainer.max_images",
        192,
    )
    straight, broken = state(workdir / "straight"), state(workdir / "broken")
    assert straight["lit_diffusion"]["images_seen"] == broken["lit_diffusion"]["images_seen"] == 192
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, broken["state_dict"][name]), name
    for mine, theirs in zip(
        straight["callbacks"]["EMA"]["shadows"], broken["callbacks"]["EMA"]["shadows"], strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    first, second = straight["optimizer_states"][0]["state"], broken["optimizer_states"][0]["state"]
    assert all(torch.equal(first[k]["exp_avg_sq"], second[k]["exp_avg_sq"]) for k in first)
    starts = events(workdir / "broken", "start")
    assert [start["resumed"] for start in starts] == [False, True]
    assert starts[0]["run_id"] == starts[1]["run_id"]


def test_precedence_checkpoint_files_command_line(trained, run, workdir, capsys):
    (workdir / "more.yaml").write_text(yaml.safe_dump({"data": {"flip": True}, "samples": {"count": 0}}))
    run(
        "fit",
        *("--config", "more.yaml", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--run_dir", "next"),
        *("--trainer.max_images", 160, "--model.optimizer.lr", 0.777),
    )
    config = yaml.safe_load((workdir / "next" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.777  # command line over checkpoint
    assert config["data"]["flip"] is True  # file over checkpoint
    assert config["model"]["init_args"]["num_levels"] == 3  # checkpoint over the default 10
    assert state(workdir / "next")["optimizer_states"][0]["param_groups"][0]["lr"] == 0.777
    said = capsys.readouterr().out
    assert "data.flip: False there, True now" in said
    assert "model.init_args.optimizer.init_args.lr: 0.01 there, 0.777 now" in said
    assert "levels" not in said


def test_precedence_holds_for_two_files_and_the_last_wins(run, workdir):
    (workdir / "a.yaml").write_text(yaml.safe_dump({"samples": {"count": 0, "seed": 5}, "seed_everything": 3}))
    (workdir / "b.yaml").write_text(yaml.safe_dump({"seed_everything": 4}))
    run("fit", *("--config", "tiny.yaml", "--config", "a.yaml", "--config", "b.yaml"), "--run_dir", "r")
    config = yaml.safe_load((workdir / "r" / "config.yaml").read_text())
    assert (config["seed_everything"], config["samples"]["seed"]) == (4, 5)


def test_interpolations_follow_the_command_line(run, workdir):
    tiny = yaml.safe_load(yaml.safe_dump(TINY))
    tiny["model"]["init_args"]["sampler"]["init_args"]["num_levels"] = "${model.init_args.num_levels}"
    (workdir / "interpolated.yaml").write_text(yaml.safe_dump(tiny))
    run("fit", "--config", "interpolated.yaml", "--model.num_levels", 5, "--run_dir", "r", "--samples.count", 0)
    config = yaml.safe_load((workdir / "r" / "config.yaml").read_text())
    assert config["model"]["init_args"]["sampler"]["init_args"]["num_levels"] == 5


def test_user_callbacks_do_not_drop_the_required_ones(run, workdir):
    (workdir / "callbacks.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]}})
    )
    run("fit", "--config", "tiny.yaml", "--config", "callbacks.yaml", "--run_dir", "r", "--samples.count", 0)
    assert state(workdir / "r")["callbacks"]["EMA"]["half_lives"] == [500, 2000]


def test_init_from_takes_weights_only(trained, run, workdir):
    run(
        "fit",
        *("--config", "tiny.yaml", "--init_from", trained / "checkpoints" / "last.ckpt", "--run_dir", "r"),
        *("--trainer.max_images", 32, "--model.optimizer.lr", 0.0, "--samples.count", 0),
    )
    before, after = state(trained), state(workdir / "r")
    assert after["lit_diffusion"]["images_seen"] == 32  # a clock of its own
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())


def test_validate_test_and_predict(trained, run, workdir):
    for command, weights in (("validate", ()), ("test", ("--likelihood.weights", "raw", "--eval.metrics", []))):
        run(command, "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--run_dir", command, *weights)
    (validated,) = events(workdir / "validate", "metrics")
    (tested,) = events(workdir / "test", "metrics")
    assert validated["val/loss"] == tested["test/loss"]
    (at_the_end,) = events(trained, "metrics")
    assert validated["val/loss"] == pytest.approx(at_the_end["val/loss"], rel=1e-6)
    run("predict", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--run_dir", "p", "--data.predict_samples", 5)
    images = np.load(workdir / "p" / "samples" / "predict.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8


def test_load_gives_a_method_ready_for_a_notebook(trained):
    method = lit_diffusion.load(trained / "checkpoints" / "last.ckpt")
    assert not method.training
    x = method.generate(torch.arange(3), seed=1).x
    assert x.shape == (3, 1, 8, 8)
    raw = lit_diffusion.load(trained / "checkpoints" / "last.ckpt", weights="raw")
    assert not torch.equal(raw.generate(torch.arange(3), seed=1).x, x)


def test_wandb_offline_changes_nothing_else_and_shows_the_same_pixels(run, workdir, trained, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("fit", "--config", trained / "config.yaml", "--run_dir", "offline", "--wandb.mode", "offline")
    first, second = state(trained)["state_dict"], state(workdir / "offline")["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    kinds = [event["event"] for event in events(trained)]
    assert [event["event"] for event in events(workdir / "offline")] == kinds
    from PIL import Image

    (grid,) = (workdir / "offline" / "samples").glob("samples-*.png")
    (shown,) = (workdir / "offline" / "wandb").glob("offline-run-*/files/media/images/pictures/samples_*.png")
    assert np.array_equal(np.asarray(Image.open(grid)), np.asarray(Image.open(shown)))


def test_a_runs_directory_is_its_last_checkpoint_for_every_command(trained, run, workdir, capsys, monkeypatch):
    last = trained / "checkpoints" / "last.ckpt"
    run("sample", "--ckpt_path", trained, "--num_samples", 2, "--out", "run.npz")
    assert f"{trained}: taking {last}, 128 images seen" in capsys.readouterr().out
    run("sample", "--ckpt_path", last, "--num_samples", 2, "--out", "file.npz")
    assert "taking" not in capsys.readouterr().out
    assert (workdir / "file.npz").read_bytes() == (workdir / "run.npz").read_bytes()
    more = ("--trainer.max_images", 160, "--samples.count", 0, "--eval.metrics", "[]")
    run("fit", "--ckpt_path", trained, "--run_dir", "continued", *more)
    said = capsys.readouterr().out
    assert f"{trained}: taking {last}, 128 images seen" in said
    assert f"checkpoint {last}: 128 images seen" in said
    assert [event["images"] for event in events(workdir / "continued", "start")] == [128]
    for command in (("sample", "--num_samples", 2, "--out", "no.npz", "--ckpt_path"), ("fit", "--ckpt_path")):
        with pytest.raises(UserError, match="is a directory without a checkpoint of a run"):
            run(*command, workdir)

    def opened(given):
        raise UserError(f"opened {given}")

    monkeypatch.setattr("lit_diffusion.cli.lightning_cli.open_checkpoint", opened)
    for command in (("validate",), ("test",), ("predict",), ("fit", "--config", "tiny.yaml", "--run_dir", "x")):
        with pytest.raises(UserError, match=f"opened {trained}"):
            run(*command, "--init_from" if "--config" in command else "--ckpt_path", trained)
    for option in ("--samples", "--reference"):  # Its pictures are no samples.
        other = {"--samples": "--reference", "--reference": "--samples"}[option]
        with pytest.raises(UserError, match=r"is a run's directory, not images: .*sample --ckpt_path"):
            run("evaluate", option, trained, other, "run.npz")
