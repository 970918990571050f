"""``doctor`` as it is typed: every shipped recipe is sound, and nothing is made or moved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from helpers.tiny import LEVELS, TINY

from lit_diffusion.__main__ import dispatch
from lit_diffusion.checks import installation
from lit_diffusion.errors import UserError

ROOT = Path(__file__).parents[2] / "experiments"
SHIPPED = sorted(path for path in ROOT.rglob("*.yaml") if "fragments" not in path.parts)

MACHINE = ("CPU cores", "/dev/shm", "of disk are free", "GPU", "may open", "driver")
"""Words of findings that are not about a recipe."""


@pytest.fixture
def doctor(workdir, capsys):
    """Runs the command; the lines that it prints, whether or not it ends in problems."""

    def call(*arguments) -> list[str]:
        before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
        capsys.readouterr()
        refused = ""
        try:
            dispatch(["doctor", *map(str, arguments)])
        except UserError as error:
            refused = str(error)
        lines = capsys.readouterr().out.splitlines()
        *found, last = lines
        levels = [line.split()[0] for line in found]
        assert set(levels) <= {"ok", "note", "warning", "problem"}
        count = {severity: levels.count(severity) for severity in ("problem", "warning", "note", "ok")}
        assert [int(part.split()[0]) for part in last.split(", ")] == list(count.values())
        assert refused.startswith(f"{count['problem']} problem") == (count["problem"] > 0)
        assert (refused == "") == (count["problem"] == 0)
        assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before
        return found

    return call


def of(severity, lines):
    return [line for line in lines if line.startswith(severity)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_is_sound(path, doctor, monkeypatch):
    monkeypatch.setattr(installation, "versions", lambda: iter(()))  # tested beside
    lines = doctor("--config", path, "--wandb.mode", "disabled")
    assert of("problem", lines) == []
    warnings = [line for line in of("warning", lines) if not any(word in line for word in MACHINE)]
    assert warnings == []
    assert len(of("ok", lines)) > 12


def test_without_a_recipe_it_is_about_the_machine(doctor):
    lines = doctor()
    for words in ("Python 3", "torch ", "CPU cores", "of disk are free", "Weights & Biases", "files"):
        assert any(words in line for line in lines), words


def test_help(capsys):
    dispatch(["doctor", "--help"])
    assert "usage: python -m lit_diffusion doctor" in capsys.readouterr().out


def test_overrides_count_as_for_fit(doctor):
    tiny = ("--config", "tiny.yaml")
    (warned,) = [line for line in doctor(*tiny) if "half-life" in line]
    assert warned.startswith("warning  averages of half-life 500, 2,000 images are long for a run of 128")
    lines = doctor(*tiny, "--ema.half_lives_images", "[16]", "--trainer.max_steps", 2, "--data.global_batch_size", 16)
    assert next(line for line in lines if "half-life" in line).startswith("warning")
    assert any("32 images, 2 steps of 16" in line for line in lines)
    lines = doctor(*tiny, "--trainer.max_images", 100_000)
    assert "ok       averages of half-life 500, 2,000 images" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "configuration file nowhere.yaml does not exist"),
        (
            ["--config", "tiny.yaml", "--model.num_levelz", "3"],
            "NCSN has no key 'num_levelz'; did you mean 'num_levels'?",
        ),
        (["--config", "tiny.yaml", "--data.source", "Npz", "--data.source.path", "none.npz"], "none.npz"),
        (["--config", "tiny.yaml", "--model.sigma_max", "-1"], "sigma_max -1"),
        (["--config", "tiny.yaml", "--trainer.max_images", "null"], "a run needs an end"),
        (
            ["--config", "tiny.yaml", "--trainer.accelerator", "nonsense"],
            "Lightning refuses the keys of trainer: ",
        ),
        (["--config", "tiny.yaml", "--eval.every_n_images", "64", "--eval.extractor", "vgg16"], "fetch weights vgg16"),
        (["--config", "tiny.yaml", "--run_dir", "tiny.yaml"], "tiny.yaml is a file"),
        (["--config", "tiny.yaml", "--model.backbone.num_classes", "5"], "has 5 classes and the data digits have 10"),
    ],
)
def test_what_fit_would_refuse_is_a_problem(doctor, arguments, words):
    (problem,) = of("problem", doctor(*arguments))
    assert words in problem


def test_what_is_found_by_itself_is_said(doctor):
    lines = doctor("--config", "experiments/ncsnv2.yaml")
    (found,) = [line for line in lines if "all pairs compared" in line]
    assert found.startswith("note     sigma_max ")


def test_a_run_that_would_be_continued_is_not_touched(workdir, doctor):
    (workdir / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **LEVELS}))
    dispatch(["fit", "--config", "tiny.yaml", "--run_dir", "run", "--samples.count", "0", "--eval.metrics", "[]"])
    metrics = workdir / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write(json.dumps({"event": "train", "step": 9, "images": 999, "time": 1.0}) + "\n")
    before = metrics.read_bytes()
    (problem,) = of("problem", doctor("--config", "tiny.yaml", "--run_dir", "run"))
    assert "already holds a run" in problem
    lines = doctor("--ckpt_path", "run/checkpoints/last.ckpt", "--run_dir", "run")
    assert of("problem", lines) == []
    assert any("continues the run in run" in line for line in lines)
    assert any("checkpoint run/checkpoints/last.ckpt: 128 images seen" in line for line in of("note", lines))
    assert metrics.read_bytes() == before
    assert not (workdir / "run" / "metrics.lost.jsonl").exists()
    assert sorted(os.listdir(workdir / "run")) == ["checkpoints", "config.yaml", "metrics.jsonl", "run_id", "samples"]
