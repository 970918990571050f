"""Every shipped configuration instantiates, as it is and through the installed package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml

from lit_diffusion.cli import lightning_cli
from lit_diffusion.cli.arguments import packaged_experiment

ROOT = Path(__file__).parent.parent / "experiments"
SHIPPED = sorted(path for path in ROOT.rglob("*.yaml") if "fragments" not in path.parts)


@pytest.fixture(scope="module")
def instantiate(tmp_path_factory):
    """Each configuration is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("instantiated"))
        patch.setattr(lightning_cli.CLI, "run_command", lambda self, subcommand: None)

        @cache
        def call(path, *arguments):
            return lightning_cli.main(["fit", "--config", str(path), *arguments])

        yield call


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_instantiates(path, instantiate):
    made = instantiate(path)
    made.model.sampler.check(made.model.denoiser)
    config = yaml.safe_load(made.run_logger.config_text)
    assert config["experiment"] == yaml.safe_load(path.read_text())["experiment"]
    assert "auto" not in {
        value for key, value in lightning_cli.flatten(config["model"]).items() if isinstance(value, str)
    }
    assert config["ema"]["half_lives_images"]
    assert config["eval"]["every_n_images"]
    assert isinstance(config["eval"]["samples"], int)  # recipes give the count, so that runs are comparable


def test_nothing_is_forgotten():
    assert {path.relative_to(ROOT).as_posix() for path in SHIPPED} >= {
        "ncsn.yaml",
        "ncsnv2.yaml",
        "ddpm.yaml",
        "ddim.yaml",
        "edm.yaml",
        "score_sde_ve.yaml",
        "score_sde_vp.yaml",
        "score_sde_subvp.yaml",
        "flow_matching.yaml",
        "toy/score_field.yaml",
        "toy/annealed_langevin.yaml",
    }
    text = "".join(path.read_text() for path in SHIPPED)
    for fragment in (ROOT / "fragments").glob("*.yaml"):
        assert f"fragments/{fragment.name}" in text


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_value_is_explained_where_it_stands(path):
    """Each line that gives a value has a comment; a class, its name or a group above says enough."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        bare = key.strip().removeprefix("- ")
        if not value.strip() or line.lstrip().startswith("#") or bare == "class_path":
            continue
        assert "#" in line, f"{path.name}: {line}"


def test_a_packaged_experiment_is_found_from_anywhere(instantiate):
    assert packaged_experiment("experiments/ncsn.yaml") is not None
    assert packaged_experiment("experiments/none.yaml") is None
    assert packaged_experiment("elsewhere/ncsn.yaml") is None
    made = instantiate("experiments/ncsn.yaml", "--model.num_levels", "7")
    assert made.model.denoiser.process.num_timesteps == 7


def test_ncsnv2_finds_its_numbers_and_a_continued_run_keeps_them(instantiate):
    made = instantiate(ROOT / "ncsnv2.yaml")
    found = yaml.safe_load(made.run_logger.config_text)["model"]["init_args"]
    assert 4.0 < found["sigma_max"] < 8.0
    assert found["num_levels"] > 10
    assert 0.0 < found["eta"] < 4 * found["sigma_min"] ** 2
    assert made.model.sampler.eta == found["eta"]


@pytest.fixture(scope="module")
def resolved(instantiate):
    return lambda name: yaml.safe_load(instantiate(ROOT / f"{name}.yaml").run_logger.config_text)


@pytest.mark.parametrize(
    "name", ["ncsnv2", "ddpm", "ddim", "edm", "score_sde_ve", "score_sde_vp", "score_sde_subvp", "flow_matching"]
)
def test_the_digits_experiments_share_all_but_the_method(name, resolved):
    """One backbone, one data set, one budget, the same callbacks: what differs is the model and the data's range."""
    first, other = resolved("ncsn"), resolved(name)
    for config in (first, other):
        del config["experiment"], config["data"]["value_range"]
    optimizers = [config["model"]["init_args"]["optimizer"] for config in (first, other)]
    networks = [config["model"]["init_args"]["backbone"] for config in (first, other)]
    assert optimizers[0] == optimizers[1]
    if name != "ncsnv2":  # whose network is unconditional on the noise level
        assert networks[0] == networks[1]
    samplers = [config["eval"].pop("sampler") for config in (first, other)]  # that fit the model's noise levels
    assert (None in samplers) == (name == "edm")  # whose own is short
    del first["model"], other["model"]
    assert first == other


def test_ddim_is_ddpm_with_another_sampler(resolved):
    ddpm, ddim = resolved("ddpm"), resolved("ddim")
    assert ddpm["model"]["class_path"].endswith("DDPM")
    assert ddim["model"]["class_path"].endswith("DDIM")
    for config in (ddpm, ddim):
        del config["model"]["class_path"], config["model"]["init_args"]["sampler"], config["experiment"]
    assert ddpm == ddim
