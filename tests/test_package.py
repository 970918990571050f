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


def above() -> set[str]:
    """Whatever is not free of Lightning, by the README's word."""
    readme = (PACKAGE.parent / "README.md").read_text()
    (said,) = re.findall(r"Everything but (.*?) and the command line is\s+free of Lightning", readme, re.DOTALL)
    named = {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`([\w/.]+)`", said)}
    return named | {"cli", "commands", "__main__", "__init__"}


def is_above(path: str) -> bool:
    """Whether a module, as a path without its ending, is one of those or in one of their folders."""
    return any(f"{path}/".startswith(f"{name}/") for name in above())


CORE = [
    path for path in sorted(PACKAGE.rglob("*.py")) if not is_above(path.relative_to(PACKAGE).with_suffix("").as_posix())
]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_knows_nothing_of_lightning_or_what_stands_on_it(path):
    for name in imported(path):
        assert not name.startswith("lightning")
        if name.startswith("lit_diffusion."):
            assert not is_above(name.removeprefix("lit_diffusion.").replace(".", "/"))


def test_the_core_is_not_small():
    rooms = {path.relative_to(PACKAGE).parts[0] for path in CORE}
    assert {"processes", "denoisers", "objectives", "samplers", "backbones", "metrics", "evaluation", "data"} <= rooms
    assert len(CORE) > 90


def test_the_files_at_the_door_are_these():
    """What has a room stands in it."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        *("__init__", "__main__", "checkpoints", "conditions", "data_spec", "distributed", "errors", "failures"),
        *("files", "images", "interrupts", "likelihood", "randomness", "reverse"),
    }


def started(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    command = [sys.executable, "-c", f"{code}; import sys; print(); print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_evaluations_and_what_only_reads_runs_start_without_lightning():
    loaded = started(
        "import lit_diffusion.evaluation.bits; from lit_diffusion.commands import gallery, report, wandb_sync"
    )
    assert "lit_diffusion.runs.events" in loaded
    assert not {"lightning", "wandb"} & loaded


def test_samplers_can_be_imported_alone():
    loaded = started("import lit_diffusion.samplers")
    heavy = {"lightning", "wandb", "torchvision", "torch_fidelity", "matplotlib", "torchmetrics", "sklearn"}
    assert not heavy & loaded
    # Nor the networks or the sources: what samplers know is a denoiser.
    assert {name for name in loaded if name.startswith(("lit_diffusion.backbones", "lit_diffusion.data."))} == set()
    assert "lit_diffusion.denoisers.network" in loaded


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


@pytest.mark.parametrize("page", ["architecture.md", "adding_a_method.md"])
def test_the_files_that_the_pages_for_developers_name_exist(page):
    root = PACKAGE.parent
    text = (root / "docs" / page).read_text()
    named = set(re.findall(r"`((?:lit_diffusion|experiments|tests|benchmarks)/[\w/.]*)", text))
    assert named
    for name in sorted(named):
        assert (root / name).exists(), name
