"""Checks of the installation: versions and imports. Each library is imported inside a try."""

from __future__ import annotations

import importlib
import platform
import tomllib
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lit_diffusion.checks import Finding, first_line, note, ok, problem, warning

MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
"""Releases that stole credentials (GHSA-w37p-236h-pfx3)."""

NAMED = ("torch", "torchvision", "lightning", "jsonargparse")
"""Packages with a line of their own; the others share one."""

REINSTALL = "install both from one place: pip install --force-reinstall torch torchvision (see pytorch.org for the tag)"


def declared() -> tuple[list[str], str]:
    """Requirements of this project, and of which Python: from a checkout's pyproject.toml, else from the installation.

    An editable installation keeps the requirements of the day it was made; the checkout's are those of its code.

    Raises:
        metadata.PackageNotFoundError: if there is neither.
    """
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text()).get("project", {})
        if project.get("name") == "lit-diffusion":
            return list(project["dependencies"]), str(project["requires-python"])
    return metadata.requires("lit-diffusion") or [], metadata.metadata("lit-diffusion")["Requires-Python"]


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Check the versions of Python and of each requirement."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield problem("packaging is not installed, so that lightning cannot work either", "pip install packaging")
        return
    try:
        lines, python = declared()
    except metadata.PackageNotFoundError:
        yield note("lit-diffusion is not installed: versions are not checked", "pip install -e . in its checkout")
        return
    mine = platform.python_version()
    if SpecifierSet(python).contains(mine, prereleases=True):
        yield ok(f"Python {mine}")
    else:
        yield problem(f"Python {mine} is not {python}", "make the virtual environment with a newer Python")
    required = [Requirement(line) for line in lines]
    required = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    fitting = 0
    for requirement in required:
        found = list(version_of(requirement.name, str(requirement.specifier), f'pip install "{requirement}"'))
        if [finding.severity for finding in found] == ["ok"] and requirement.name not in NAMED:
            fitting += 1
        else:
            yield from found
    yield ok(f"{fitting} other packages have the versions that are required")


def version_of(name: str, specifier: str, command: str) -> Iterator[Finding]:
    """Check the version of one package; ``command`` installs a right one."""
    from packaging.specifiers import SpecifierSet

    version = installed(name)
    if version is None:
        yield problem(f"{name} is not installed", command)
    elif version.partition("+")[0] in MALICIOUS.get(name, ()):
        yield problem(
            f"{name} {version} is a malicious release (GHSA-w37p-236h-pfx3) that stole credentials",
            f"remove it, change every password and key that was on this machine, then {command}",
        )
    elif not SpecifierSet(specifier).contains(version, prereleases=True):
        yield problem(f"{name} {version} is not {specifier}", command)
    else:
        yield ok(f"{name} {version}")


def imports() -> Iterator[Finding]:
    """Check that the libraries can be imported, in the order of their dependence; end at the first that cannot.

    Without this, builds of torch and torchvision that do not fit each other show as a long trace from lightning or
    torchmetrics.
    """
    torch = yield from _imported("torch", "pip install --force-reinstall torch torchvision")
    if torch is None:
        return
    torchvision = yield from _imported("torchvision", REINSTALL, _versions_of_torchvision(torch))
    if torchvision is None:
        return
    yield from builds(torch, torchvision)
    for name in ("torchmetrics", "jsonargparse", "omegaconf", "lightning.pytorch"):
        module = yield from _imported(name, f"pip install --force-reinstall {name.partition('.')[0]}")
        if module is None:
            return
    install = "pip install -e . in its checkout, or pip install lit-diffusion"
    yield from _imported("lit_diffusion.cli.lightning_cli", install)


def _imported(name: str, fix: str, also: str = "") -> Generator[Finding, None, Any]:
    """Import a module; return it, or yield a problem and return None."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # A broken library raises whatever it may: OSError, RuntimeError, AttributeError.
        yield problem(f"{name} cannot be imported{also} ({first_line(error)})", fix)
        return None


def _versions_of_torchvision(torch: Any) -> str:
    return f": torchvision {installed('torchvision')} with torch {getattr(torch, '__version__', installed('torch'))}"


def builds(torch: Any, torchvision: Any) -> Iterator[Finding]:
    """Check that torch and torchvision were built for each other.

    Args:
        torch: the module torch.
        torchvision: the module torchvision.
    """
    pair = f"torch {torch.__version__} and torchvision {torchvision.__version__}"
    try:
        nms = importlib.import_module("torchvision.ops").nms
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
        kept = nms(boxes, torch.tensor([1.0, 0.5]), 0.5)
    except Exception as error:
        yield problem(f"{pair} do not fit: torchvision.ops.nms fails ({first_line(error)})", REINSTALL)
        return
    if kept.tolist() != [0]:
        yield problem(f"{pair} do not fit: torchvision.ops.nms keeps boxes {kept.tolist()} instead of [0]", REINSTALL)
        return
    tags = [str(module.__version__).partition("+")[2] for module in (torch, torchvision)]
    if all(tags) and tags[0] != tags[1]:
        yield warning(f"{pair} are builds for different devices, {tags[0]} and {tags[1]}", REINSTALL)
    else:
        yield ok(f"{pair} fit")
