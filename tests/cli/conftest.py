"""Tiny runs through the real command line, in this process."""

from __future__ import annotations

import pytest
import yaml
from tiny import TINY

from lit_diffusion.__main__ import dispatch


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working directory with ``tiny.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.fixture
def run(workdir):
    """Run a command line; ``run("fit", "--config", "tiny.yaml", ...)``."""

    def call(*arguments: str) -> None:
        dispatch([str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The directory of one tiny finished run."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    dispatch(["fit", "--config", str(config), "--run_dir", str(folder / "run")])
    return folder / "run"
