"""Which value counts where a configuration file, a checkpoint and a command line each have one."""

from __future__ import annotations

import shutil

import pytest
import yaml

from lit_diffusion.checks.recipe import prepare
from lit_diffusion.cli.arguments import in_order


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_value_before_its_file_counts(command, workdir, parser_of):
    (workdir / "more.yaml").write_text(yaml.safe_dump({"trainer": {"max_images": 99}, "seed_everything": 9}))
    arguments = ["--trainer.max_images", "640", "--config", "tiny.yaml", "--seed_everything=7", "--config=more.yaml"]
    section = parser_of(command).parse_args(in_order([command, *arguments]))[command]
    assert (section.trainer.max_images, section.seed_everything) == (640, 7)


def test_files_given_to_a_key_count_before_the_keys_inside(workdir, fit_parser):
    (workdir / "trainer.yaml").write_text("max_images: 77\ndevices: 1\n")
    (workdir / "heun.yaml").write_text("class_path: Heun\ninit_args: {steps: 5}\n")
    (workdir / "data.yaml").write_text("global_batch_size: 8\nflip: true\n")
    section = fit_parser.parse_args(
        in_order(
            [
                *("fit", "--trainer.max_images", "5", "--trainer", "trainer.yaml", "--model.sampler.steps=3"),
                *("--model.sampler", "heun.yaml", "--data.global_batch_size=4", "--data=data.yaml"),
                *("--config", "tiny.yaml"),
            ]
        )
    ).fit
    assert (section.trainer.max_images, section.trainer.devices) == (5, 1)
    assert section.model.init_args.sampler.class_path.endswith(".Heun")
    assert section.model.init_args.sampler.init_args.steps == 3
    assert (section.data.global_batch_size, section.data.flip) == (4, True)


def test_a_class_counts_before_its_arguments(workdir, fit_parser):
    arguments = ["fit", "--model.sampler.steps", "3", "--model.sampler", "Heun", "--config", "tiny.yaml"]
    sampler = fit_parser.parse_args(in_order(arguments)).fit.model.init_args.sampler
    assert (sampler.class_path.rpartition(".")[2], sampler.init_args.steps) == ("Heun", 3)


def test_items_that_are_appended_keep_their_own_arguments(workdir, fit_parser):
    callbacks = "lightning.pytorch.callbacks"
    section = fit_parser.parse_args(
        in_order(
            [
                *("fit", f"--trainer.callbacks+={callbacks}.LearningRateMonitor"),
                *("--trainer.callbacks.logging_interval", "step"),
                *(f"--trainer.callbacks+={callbacks}.TQDMProgressBar", "--trainer.callbacks.refresh_rate", "3"),
                *("--config", "tiny.yaml"),
            ]
        )
    ).fit
    first, second = section.trainer.callbacks
    assert (first.init_args.logging_interval, second.init_args.refresh_rate) == ("step", 3)


def test_it_counts_above_a_checkpoint_too(trained, workdir):
    shutil.copytree(trained, workdir / "run")
    values = ["--trainer.max_images", "640", "--model.optimizer.lr=0.5", "--samples.count", "0"]
    for where in (["--ckpt_path", "run/checkpoints/last.ckpt"], ["--run_dir=run", "--resume", "auto"]):
        recipe, _ = prepare([*values, *where, "--config", "tiny.yaml"])
        assert recipe.trainer.max_images == 640
        assert recipe.method.run_config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
