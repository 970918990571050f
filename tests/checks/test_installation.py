"""What is installed: versions, builds, and a broken library said in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from packaging.requirements import Requirement

from lit_diffusion.checks import Finding, first_line, in_bytes, installation, problem


def levels(found):
    return [finding.severity for finding in found]


def test_a_finding_is_one_line():
    assert str(problem("a\nb", "fix")) == "problem  a b; fix"
    assert str(Finding("ok", "fine")) == "ok       fine"
    assert first_line(RuntimeError("\n\n  what\nmore")) == "RuntimeError: what"
    assert first_line(KeyError()) == "KeyError"
    assert [in_bytes(n) for n in (7, 1234, 1.5e9, 2e13)] == ["7 bytes", "1.23 kB", "1.5 GB", "20 TB"]


def test_this_installation_fits():
    found = list(installation.versions())
    assert set(levels(found)) == {"ok"}
    assert [name for name in installation.NAMED if not any(f.what.startswith(f"{name} ") for f in found)] == []
    assert set(levels(installation.imports())) == {"ok"}


def test_what_is_required_is_what_pyproject_says(monkeypatch, tmp_path):
    names = {Requirement(line).name for line in installation.declared()[0]}
    assert {"torch", "lightning", "wandb"} <= names
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "a" / "b" / "c.py"))  # no checkout: the metadata
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=999"])
    assert installation.declared()[0] == ["torch>=999"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert installation.declared()[0] == ["torch>=999"]
    (bad,) = [finding for finding in installation.versions() if finding.severity == "problem"]
    assert bad.what.startswith("torch ")
    assert 'pip install "torch>=999"' in bad.fix


def test_neither_checkout_nor_package_is_a_note(monkeypatch):
    def none():
        raise metadata.PackageNotFoundError("lit-diffusion")

    monkeypatch.setattr(installation, "declared", none)
    (found,) = installation.versions()
    assert found.severity == "note"


def test_without_packaging_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (found,) = installation.versions()
    assert found == problem("packaging is not installed, so that lightning cannot work either", "pip install packaging")


@pytest.mark.parametrize(
    ("version", "severity", "said"),
    [
        ("2.6.6", "ok", "lightning 2.6.6"),
        ("2.5.0", "problem", "is not"),
        ("2.7.0", "problem", "is not"),
        ("2.6.2", "problem", "malicious"),
        ("2.6.3", "problem", "malicious"),
        (None, "problem", "not installed"),
    ],
)
def test_lightning(monkeypatch, version, severity, said):
    monkeypatch.setattr(installation, "installed", lambda name: version)
    (found,) = installation.version_of("lightning", ">=2.6.6,<2.7", "pip install lightning")
    assert found.severity == severity
    assert said in found.what
    assert severity == "ok" or "pip install lightning" in found.fix


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(installation.platform, "python_version", lambda: "3.9.1")
    assert next(installation.versions()).what == "Python 3.9.1 is not >=3.11"


def test_builds(monkeypatch):
    (found,) = installation.builds(torch, torchvision)
    assert found.severity == "ok"
    cuda, cpu = (SimpleNamespace(__version__=version, tensor=torch.tensor) for version in ("2.9.0+cu130", "0.24.0+cpu"))
    (found,) = installation.builds(cuda, cpu)
    assert (found.severity, "cu130 and cpu" in found.what) == ("warning", True)
    monkeypatch.setattr("torchvision.ops.nms", lambda boxes, scores, share: torch.tensor([0, 1]))
    (found,) = installation.builds(torch, torchvision)
    assert (found.severity, "keeps boxes [0, 1]" in found.what) == ("problem", True)

    def fails(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.ops.nms", fails)
    (found,) = installation.builds(torch, torchvision)
    assert found.severity == "problem"
    assert "torchvision::nms does not exist" in found.what


@pytest.mark.parametrize("name", ["torch", "torchmetrics", "lightning.pytorch"])
def test_the_first_library_that_is_broken_is_the_last_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    *before, last = installation.imports()
    assert set(levels(before)) <= {"ok"}
    assert last.severity == "problem"
    assert last.what.startswith(f"{name} cannot be imported")


def test_a_torchvision_that_does_not_fit_is_one_line_and_exit_code_2(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    root = str(Path(installation.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "lit_diffusion", "doctor", "--config", "experiments/ncsn.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert f"torchvision {torchvision.__version__.partition('+')[0]}" in line
    assert f"torch {torch.__version__}" in line
    assert "operator torchvision::nms does not exist" in line
    assert "pip install" in line
    assert done.stdout.splitlines()[-1].startswith("1 problem, 0 warnings, 1 note, ")


def test_the_command_can_be_imported_without_torch():
    code = (
        "import sys; import lit_diffusion.commands.doctor; "
        "assert not {'torch', 'lightning', 'numpy', 'jsonargparse', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
