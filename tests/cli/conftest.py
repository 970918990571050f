"""Tiny runs through the real command line, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_diffusion.__main__ import dispatch

TINY = {
    "model": {
        "class_path": "NCSN",
        "init_args": {
            "sigma_max": 2.0,
            "sigma_min": 0.1,
            "levels": 3,
            "parametrization": "score",
            "noise_input": "log_sigma",
            "backbone": {
                "class_path": "UNet",
                "init_args": {"channels": 8, "mult": [1], "blocks": 1, "attention": [], "middle_attention": False},
            },
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "sampler": {
                "class_path": "AnnealedLangevin",
                "init_args": {"steps_per_level": 2, "eta": 0.001, "denoise": True},
            },
        },
    },
    "data": {"source": {"class_path": "Digits"}, "global_batch_size": 32, "held_out_fraction": 0.02},
    "trainer": {"max_images": 128, "accelerator": "cpu", "devices": 1},
    "ema": {"half_lives_images": [500, 2000]},
    "samples": {"count": 4, "film_columns": 2},
    "wandb": {"mode": "disabled"},
}


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


def events(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The events of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["event"] == kind]
