"""Tiny runs through the real command line, in this process."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import yaml
from helpers.tiny import LEVELS, TINY
from PIL import Image

from lit_diffusion.__main__ import dispatch
from lit_diffusion.cli.lightning_cli import CLI
from lit_diffusion.cli.lightning_cli import main as run_cli
from lit_diffusion.config.parser import Parser


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
    """The directory of one tiny finished run, with all pictures."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, **LEVELS}))
    dispatch(["fit", "--config", str(config), "--run_dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="session")
def of_cats_and_dogs(tmp_path_factory):
    """The directory of a tiny class-conditional diffusion, of 27 cats and 3 dogs; held out are 6 dogs."""
    folder = tmp_path_factory.mktemp("named")
    shade = np.random.default_rng(0)
    sources = []
    for part, counts in (("pets", {"cat": 27, "dog": 3}), ("more", {"dog": 6})):
        for name, count in counts.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                grey = shade.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(grey).save(folder / part / name / f"{number:02d}.png")
        keys = {"path": str(folder / part), "size": 8, "channels": 1, "classes": "folders"}
        sources.append({"class_path": "ImageFolder", "init_args": keys})
    network = {"class_path": "UNet", "init_args": {**TINY["model"]["init_args"]["backbone"]["init_args"]}}
    network["init_args"]["num_classes"] = 2
    keys = {"num_timesteps": 20, "beta_T": 0.4, "backbone": network}
    config = {
        **TINY,
        "model": {
            "class_path": "DDIM",
            "init_args": {**keys, "sampler": {"class_path": "DDIM", "init_args": {"steps": 2}}},
        },
        "data": {"source": sources[0], "held_out": sources[1], "global_batch_size": 8},
        "trainer": {**TINY["trainer"], "max_images": 16},
        "samples": {"count": 0},
    }
    (folder / "named.yaml").write_text(yaml.safe_dump(config))
    dispatch(["fit", "--config", str(folder / "named.yaml"), "--run_dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="session")
def parser_of(tmp_path_factory):
    """The parser of fit, validate, test or predict; each made once."""

    class Parsed(CLI):
        def instantiate_classes(self) -> None:
            """Nothing: the parser is all that is wanted."""

        def run_command(self, subcommand: str) -> None:
            """Nothing."""

    config = tmp_path_factory.mktemp("parser") / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))

    @cache
    def made(command: str) -> Parser:
        return run_cli([command, "--config", str(config)], Parsed).parser

    return made


@pytest.fixture(scope="session")
def fit_parser(parser_of):
    """That of fit."""
    return parser_of("fit")
