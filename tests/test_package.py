"""Imports point one way, and what is light stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lit_diffusion

PACKAGE = Path(lit_diffusion.__file__).parent
PYPROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


CORE_FOLDERS = ("backbones", "evaluation", "processes", "denoisers", "objectives", "samplers", "data", "metrics")
CORE = [
    *(PACKAGE / f"{name}.py" for name in ("conditions", "randomness", "images", "figures")),
    *(PACKAGE / f"{name}.py" for name in ("distributed", "likelihood", "reverse")),
    *(path for folder in CORE_FOLDERS for path in (PACKAGE / folder).rglob("*.py")),
]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_knows_nothing_of_lightning_or_what_stands_on_it(path):
    above = {"training", "methods", "callbacks", "datamodule", "trainer", "run", "cli", "commands", "checkpoints"}
    for name in imported(path):
        assert not name.startswith("lightning")
        assert name.removeprefix("lit_diffusion.").partition(".")[0] not in above or not name.startswith(
            "lit_diffusion."
        )


def test_samplers_can_be_imported_alone():
    done = subprocess.run(
        [sys.executable, "-c", "import lit_diffusion.samplers, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    heavy = {"lightning", "wandb", "torchvision", "torch_fidelity", "matplotlib", "torchmetrics", "sklearn"}
    assert not heavy & loaded
    # Nor the networks or the sources: what samplers know is a denoiser.
    assert {name for name in loaded if name.startswith(("lit_diffusion.backbones", "lit_diffusion.data"))} == set()
    assert "lit_diffusion.denoisers.network" in loaded


def test_evaluations_need_no_lightning():
    code = "import lit_diffusion.evaluation.bits, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"lightning", "wandb"} & set(done.stdout.split())


def test_the_malicious_releases_of_lightning_cannot_be_resolved():
    (requirement,) = [r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "lightning"]
    assert not requirement.specifier.contains("2.6.2")
    assert not requirement.specifier.contains("2.6.3")
    assert requirement.specifier.contains("2.6.6")


def test_the_version_is_said_once():
    assert PYPROJECT["project"]["version"] == lit_diffusion.__version__
    assert f"## {lit_diffusion.__version__}" in (PACKAGE.parent / "CHANGELOG.md").read_text()


def test_the_readmes_commands_and_files_exist():
    readme = (PACKAGE.parent / "README.md").read_text()
    for name in re.findall(r"(?:experiments|docs)/[\w/]+\.(?:yaml|md|png)", readme):
        assert (PACKAGE.parent / name).is_file(), name
