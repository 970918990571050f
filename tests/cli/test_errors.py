"""Bad input gets one line that says what and how to fix it, exit code 2, and nothing already saved is lost."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import forked
from helpers.tiny import TINY
from PIL import Image

from lit_diffusion.__main__ import as_one_line, dispatch, main
from lit_diffusion.errors import UserError


def changed(workdir, change):
    """``changed.yaml``: the tiny configuration after ``change(config)``."""
    config = yaml.safe_load(yaml.safe_dump(TINY))
    change(config)
    (workdir / "changed.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", "changed.yaml"]


def sde(config, process, **keys):
    """The model section of a score-SDE with the tiny configuration's network."""
    init_args = {"backbone": config["model"]["init_args"]["backbone"], "c_noise": "time_999"}
    return {
        "class_path": "ScoreSDE",
        "init_args": {**init_args, "process": {"class_path": process, "init_args": keys}},
    }


def refusal(arguments) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        dispatch([str(argument) for argument in arguments])
    line = as_one_line(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


def test_the_process_exits_with_2_and_one_line(workdir):
    process = forked.start(forked.command_line, "fit", "--config", "nowhere.yaml", log=workdir / "said.txt")
    process.join(60)
    said = (workdir / "said.txt").read_text()
    assert process.exitcode == 2
    assert said.strip().splitlines()[-1].startswith("lit_diffusion: error: configuration file nowhere.yaml")
    assert "Traceback" not in said


def test_main_returns_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lit_diffusion", "fitt"])
    assert main() == 2
    assert capsys.readouterr().err == "lit_diffusion: error: there is no command 'fitt'; did you mean 'fit'?\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["model"]["init_args"].update(num_levelz=3), ["'num_levelz'", "did you mean 'num_levels'"]),
        (lambda c: c["model"]["init_args"]["backbone"]["init_args"].update(chanels=3), ["'chanels'", "'channels'"]),
        (lambda c: c["data"].update(global_batchsize=3), ["data.global_batchsize", "data.global_batch_size"]),
        (lambda c: c.update(samplez=3), ["'samplez'", "'samples'"]),
        (lambda c: c["model"]["init_args"].update(num_levels="many"), ["model.num_levels is 'many'", "whole number"]),
        (
            lambda c: c["model"]["init_args"]["sampler"]["init_args"].update(eta="big"),
            ["model.sampler.eta", "a number"],
        ),
        (lambda c: c["model"]["init_args"].update(parametrization="epsilon"), ["parametrization", "'eps'"]),
        (lambda c: c["model"].update(class_path="NCSM"), ["'NCSM'", "NCSN"]),
        (
            lambda c: c.update(likelihood={"metrics": "bpd"}),
            ["likelihood.metrics is 'bpd'", "a list in brackets", "'bpd_ode'"],
        ),
        (lambda c: c.update(likelihood={"metrics": ["fid"]}), ["likelihood.metrics is 'fid'", "'bpd_ode'"]),
        (
            lambda c: c.update(model=sde(c, "VQ")),
            ["there is no class 'VQ'", "SubVP, VE, VP"],
        ),
        (lambda c: c.update(model=sde(c, "VE")), ["not given: sigma_min, sigma_max"]),
        (lambda c: c.update(model=sde(c, "VP", beta_min=30.0)), ["beta_min 30 and beta_max 20"]),
        (lambda c: c.update(model=sde(c, "VP", t_min=0.0)), ["t_min is 0", "between 0 and 1"]),
        (lambda c: c["data"]["source"].update(class_path="Digitz"), ["'Digitz'", "Digits"]),
        (lambda c: c["data"].update(global_batch_size="${nope.x}"), ["nope.x"]),
        (lambda c: c.update(format_version=99), ["format_version 99", "reads 1"]),
        (lambda c: c["model"]["init_args"]["sampler"]["init_args"].update(eta=0.04), ["eta 0.04", "4 sigma^2"]),
        (lambda c: c["model"]["init_args"].update(sigma_min=3.0), ["sigma_min 3", "sigma_max 2"]),
        (lambda c: c["model"]["init_args"]["backbone"]["init_args"].update(mult=[1, 1, 1, 1, 1]), ["8", "mult"]),
        (
            lambda c: c["data"].update(source={"class_path": "ImageFolder", "init_args": {"path": "no", "size": 8}}),
            ["no"],
        ),
        (lambda c: c["data"].update(source={"class_path": "CIFAR10"}), ["fetch data CIFAR10"]),
        (lambda c: c["trainer"].update(precision="64-true"), ["precision", "bf16-mixed"]),
        (lambda c: c["trainer"].update(strategy="fsdp_cpu_offload"), ["FSDPStrategy is not supported", "give fsdp"]),
        (lambda c: c["trainer"].update(gradient_clip_val=1.0), ["gradient_clip"]),
        (lambda c: c["trainer"].update(max_images=None), ["needs an end", "trainer.max_images"]),
        (lambda c: c["trainer"].update(max_images=0), ["trainer.max_images is 0"]),
        (
            lambda c: (
                c["checkpoint"].update(every_n_steps=0)
                if "checkpoint" in c
                else c.update(checkpoint={"every_n_steps": 0})
            ),
            ["checkpoint.every_n_steps is 0"],
        ),
        (lambda c: c["ema"].update(half_lives_steps=[3]), ["half_lives_images or half_lives_steps"]),
        (lambda c: c["samples"].update(weights="ema:3"), ["ema:3", "ema:500"]),
    ],
)
def test_a_wrong_configuration(workdir, change, said):
    line = refusal(changed(workdir, change))
    for words in said:
        assert words in line
    assert not list(workdir.glob("runs/*/*/checkpoints/last.ckpt"))


def test_files_that_are_no_configuration(workdir):
    (workdir / "broken.yaml").write_text("model: [1, 2\n")
    assert "not valid YAML" in refusal(["fit", "--config", "broken.yaml"])
    (workdir / "text.yaml").write_text("just text\n")
    assert "not valid YAML" in refusal(["fit", "--config", "text.yaml"])
    assert "not given: data.source, model" in refusal(["fit"])


def test_checkpoints_that_cannot_be_used(workdir, trained):
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    (workdir / "torn.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}}, workdir / "foreign.ckpt")
    (workdir / "text.ckpt").write_text("not a checkpoint")
    newer = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    newer["lit_diffusion"]["format_version"] = 99
    torch.save(newer, workdir / "newer.ckpt")
    torch.save({"model": torch.nn.Linear(2, 2)}, workdir / "pickle.ckpt")
    expected = {
        "missing.ckpt": "does not exist",
        "torn.ckpt": "truncated",
        "text.ckpt": "not a checkpoint",
        "pickle.ckpt": "not a checkpoint",
        "foreign.ckpt": "was not written by lit_diffusion",
        "newer.ckpt": "format_version 99",
    }
    for name, words in expected.items():
        for command in (["sample", "--num_samples", 1, "--out", "a.npz"], ["fit", "--config", "tiny.yaml"], ["test"]):
            line = refusal([*command, "--ckpt_path", name])
            assert words in line, (name, command)
            assert name in line


def test_a_checkpoint_of_another_width_or_method(workdir, trained):
    ckpt = trained / "checkpoints" / "last.ckpt"
    line = refusal(["fit", "--config", "tiny.yaml", "--ckpt_path", ckpt, "--model.backbone.channels", 16])
    assert "does not fit this model" in line
    assert "[8" in line
    line = refusal(["fit", "--config", "tiny.yaml", "--init_from", ckpt, "--model.backbone.blocks", 2])
    assert "the checkpoint has no denoiser.backbone" in line


def test_an_unwritable_run_directory(workdir):
    (workdir / "file").write_text("")
    assert "choose another with --run_dir" in refusal(["fit", "--config", "tiny.yaml", "--run_dir", "file/run"])


def test_a_corrupt_image_is_named_whoever_loads_it(workdir):
    (workdir / "images").mkdir()
    for n in range(40):
        Image.fromarray(np.full((8, 8), n, np.uint8)).save(workdir / "images" / f"{n:02d}.png")
    (workdir / "images" / "07.png").write_bytes(b"\x89PNG broken")
    source = {"class_path": "ImageFolder", "init_args": {"path": "images", "size": 8, "channels": 1}}
    for workers in (0, 1):
        arguments = changed(workdir, lambda c, n=workers: c["data"].update(source=source, num_workers=n))
        assert "07.png" in refusal(arguments)


@pytest.mark.parametrize("before", [(), ("notes.txt", "samples/mine.png")])
def test_what_is_refused_once_the_run_has_its_directory_leaves_nothing_in_it(workdir, before):
    for name in before:
        (workdir / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / "r" / name).write_text("mine")
    asked = ["--eval.every_n_steps", 1, "--eval.extractor", "vgg16", "--eval.weights_path", "nowhere.pth"]
    line = refusal(["fit", "--config", "tiny.yaml", "--run_dir", "r", *asked])
    assert "nowhere.pth" in line
    assert sorted(path.relative_to(workdir / "r").as_posix() for path in (workdir / "r").rglob("*.*")) == list(before)
    assert (workdir / "r").exists() == bool(before)
    assert "nowhere.pth" in refusal(["fit", "--config", "tiny.yaml", *asked])
    assert not (workdir / "runs").exists()


def test_a_nan_loss_three_times_stops_with_the_last_checkpoint_intact(workdir, run):
    with pytest.raises(UserError, match=r"diverged.*3 times in a row") as caught:
        run(
            *("fit", "--config", "tiny.yaml", "--run_dir", "r", "--checkpoint.every_n_steps", 1, "--samples.count", 0),
            *("--model.optimizer.lr", 1e30, "--trainer.max_images", 3200),
        )
    assert "\n" not in str(caught.value)
    saved = torch.load(workdir / "r" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())
    last = json.loads((workdir / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "end"
    assert last["status"] == "failed"


def test_a_full_disk_is_reported_and_the_checkpoint_before_kept(workdir, run, monkeypatch):
    save = torch.save
    calls = []

    def fails_the_second_time(state, file):
        calls.append(file)
        if len(calls) > 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fails_the_second_time)
    with pytest.raises(UserError, match=r"No space left on device.*the one before is untouched"):
        run("fit", "--config", "tiny.yaml", "--run_dir", "r", "--checkpoint.every_n_steps", 1, "--samples.count", 0)
    saved = torch.load(workdir / "r" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["lit_diffusion"]["images_seen"] == 32
    assert [file.name for file in (workdir / "r" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_fetch_says_what_it_takes():
    assert "fetch data CIFAR10" in refusal(["fetch", "data"])
    assert "weights is 'imagenet'; choose one of inception, vgg16" in refusal(["fetch", "weights", "imagenet"])
    assert "imagenet" in refusal(["fetch", "data", "imagenet"]).lower()


# ---- classes -----------------------------------------------------------------------------------------------------


def class_folders(root, names, count=4):
    """A folder of images for each name."""
    shade = np.random.default_rng(0)
    for name in names:
        for number in range(count):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shade.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return root


def folders(key, path):
    """The options for a source of class folders."""
    source = {"class_path": "ImageFolder", "init_args": {"path": str(path), "size": 8, "channels": 1, "classes": True}}
    return [f"--data.{key}", json.dumps(source)]


def test_a_model_of_fewer_classes_than_the_data_leaves_nothing_behind(workdir):
    key = "model.init_args.backbone.init_args.num_classes"
    line = refusal(["fit", "--config", "tiny.yaml", "--model.backbone.num_classes", 5])
    assert f"the backbone has 5 classes and the data digits have 10: set {key} 10" in line
    assert not (workdir / "runs").exists()
    plain = {"class_path": "Npz", "init_args": {"path": "x.npz"}}
    np.savez(workdir / "x.npz", np.zeros((9, 8, 8), np.uint8))
    none = ["fit", "--config", "tiny.yaml", "--data.source", json.dumps(plain), f"--{key}", 10]
    assert "the backbone has 10 classes" in refusal(none)
    assert not (workdir / "runs").exists()


def test_classes_that_are_no_longer_those_of_the_training_are_refused(workdir):
    path = class_folders(workdir / "pets", ["cat", "dog"])
    arguments = ["--config", "tiny.yaml", "--model.backbone.num_classes", "3", "--data.global_batch_size", "4"]
    rest = [*folders("source", path), "--samples.count", "0", "--eval.metrics", "[]", "--trainer.max_images", "4"]
    dispatch(["fit", *arguments, *rest, "--run_dir", "run"])
    class_folders(workdir / "pets", ["bird"])
    line = refusal(["validate", "--ckpt_path", "run/checkpoints/last.ckpt"])
    assert "was trained on the classes cat, dog, and data.source has bird, cat, dog" in line


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(
        f'{sys.executable} -c \'import runpy, sys, time; time.sleep(0.3); sys.argv[1:] = ["--help"]; '
        f'runpy.run_module("lit_diffusion", run_name="__main__")\' | true',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
