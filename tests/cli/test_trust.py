"""Files of strangers: a configuration or a checkpoint imports nothing and runs nothing that is not allowed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import TINY

import lit_diffusion
from lit_diffusion.__main__ import dispatch
from lit_diffusion.errors import UserError

MODULE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
from lit_diffusion.samplers import AnnealedLangevin
class Walk(AnnealedLangevin):
    "As its parent."
"""


NAMES = itertools.count()


@pytest.fixture
def stranger(workdir, monkeypatch):
    """The name of a package on the path; of each test its own, since what is allowed stays so in a process."""
    name = f"stranger{next(NAMES)}"
    (workdir / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delenv("LIT_DIFFUSION_ALLOW", raising=False)
    return name


def was_imported(name: str) -> bool:
    """It leaves a trace in the working directory."""
    return name in sys.modules or Path("imported").exists()


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        dispatch(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


FIT = ("fit", "--config", "tiny.yaml")


def test_a_class_of_another_package_is_neither_imported_nor_made(stranger):
    said = refusal(*FIT, "--model.sampler", f"{stranger}.Walk")
    assert f"'{stranger}.Walk' is not in lit_diffusion, torch.optim, lightning.pytorch" in said
    assert f"LIT_DIFFUSION_ALLOW={stranger}.Walk" in said
    assert not was_imported(stranger)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("--model.optimizer", "os.system"),
        ("--model.optimizer", "torch.load"),
        ("--model.optimizer", "builtins.eval"),
        ("--model.backbone", "torch.hub.load"),
        ("--model.class_path", "subprocess.Popen"),
        ("--data.source", "antigravity.Source"),
        ("--trainer.callbacks+", "shutil.rmtree"),
        ("--trainer.logger", "webbrowser.open"),
    ],
)
def test_nothing_that_runs_commands_or_code_can_be_named(workdir, key, value):
    assert f"{value!r} is not in lit_diffusion" in refusal(*FIT, f"{key}={value}")
    assert "antigravity" not in sys.modules


def test_a_configuration_file_is_no_better_than_the_command_line(stranger):
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    config["model"]["init_args"]["sampler"] = {"class_path": f"{stranger}.Walk"}
    Path("theirs.yaml").write_text(yaml.safe_dump(config))
    assert f"'{stranger}.Walk' is not in" in refusal("fit", "--config", "theirs.yaml")
    assert not was_imported(stranger)


def test_nor_is_what_a_checkpoint_says_of_its_model(stranger, trained):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["lit_diffusion"]["config"]["model"]["init_args"]["sampler"] = {"class_path": f"{stranger}.Walk"}
    torch.save(checkpoint, "theirs.ckpt")
    with pytest.raises(UserError, match=rf"'{stranger}\.Walk' is not in"):
        lit_diffusion.load("theirs.ckpt")
    for command in ("sample --num_samples=1 --out=x.npz", "fit --run_dir=again"):
        assert f"'{stranger}.Walk' is not in" in refusal(*command.split(), "--ckpt_path", "theirs.ckpt")
    assert not was_imported(stranger)


@pytest.mark.parametrize("allowed", ["{}", "some.other, {}.Walk"])
def test_what_is_allowed_by_name_is_used(stranger, monkeypatch, allowed):
    monkeypatch.setenv("LIT_DIFFUSION_ALLOW", allowed.format(stranger))
    walk = ("--model.sampler", f"{stranger}.Walk", "--model.sampler.steps_per_level", "1")
    dispatch([*FIT, "--run_dir", "run", *walk])
    assert was_imported(stranger)
    assert lit_diffusion.load("run/checkpoints/last.ckpt").sampler.steps_per_level == 1


def test_a_class_of_the_wrong_kind_is_refused_even_if_it_is_allowed(workdir):
    said = refusal(*FIT, "--model.sampler", "lit_diffusion.backbones.UNet")
    assert "sampler" in said
    assert TINY["model"]["init_args"]["sampler"]["class_path"] == "AnnealedLangevin"


def test_a_list_that_is_none(workdir, monkeypatch):
    monkeypatch.setenv("LIT_DIFFUSION_ALLOW", "my-lab/*")
    assert "LIT_DIFFUSION_ALLOW is 'my-lab/*'; give names of packages" in refusal(*FIT)
