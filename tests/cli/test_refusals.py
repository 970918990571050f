"""Every mistake on a command line or in a configuration is one plain sentence that names the key and the fix."""

from __future__ import annotations

import re

import pytest
import yaml
from helpers.tiny import TINY

import lit_diffusion.config.parser
from lit_diffusion.__main__ import as_one_line, dispatch
from lit_diffusion.cli.arguments import in_order
from lit_diffusion.commands.options import choose_sampler
from lit_diffusion.config.messages import REPORTS, takes_of
from lit_diffusion.errors import UserError
from lit_diffusion.samplers import Heun

MACHINERY = ("Union", "subtype", "ubclass", "Namespace", "NestedArg", "jsonargparse", "<class", "Literal", "None")


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    line = as_one_line(caught.value)
    assert "\n" not in str(caught.value)
    assert len(line) < 400
    for word in MACHINERY:
        assert word not in line, line
    if guess := re.search(r"no (?:key|class) '([^']+)'.*did you mean '([^']+)'", line):
        assert guess[1].rpartition(".")[2] != guess[2].rpartition(".")[2] or "." in guess[2]
        assert guess[1] != guess[2]
    return line


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--eval null", ["eval is 'null'", "--eval.every_n_images null", "evaluates nothing"]),
        ("--samples null", ["samples is 'null'", "--samples.count 0"]),
        ("--trainer nowhere.yaml", ["trainer is 'nowhere.yaml'", "no such file"]),
        ("--trainer.max_images lots", ["trainer.max_images is 'lots'; it must be a whole number or null"]),
        ("--trainer.max_images 1.5", ["trainer.max_images is '1.5'; it must be a whole number or null"]),
        ("--trainer.max_images=", ["trainer.max_images is ''; it must be a whole number"]),
        ("--trainer.max_images [1]", ["trainer.max_images is '[1]'; it must be a whole number"]),
        ("--trainer.max_images", ["--trainer.max_images needs a value"]),
        ("--trainer.max_images.x 5", ["no key 'trainer.max_images.x'", "has no keys of its own"]),
        ("--model.num_levels.x 5", ["no key 'model.num_levels.x'", "model.num_levels takes a whole number"]),
        ("--model.num_levels 1.5", ["model.num_levels is '1.5'; it must be a whole number"]),
        ("--model.backbone.channels null", ["model.backbone.channels is 'null'; it must be a whole number"]),
        ("--model.sampler.eta x", ["model.sampler.eta is 'x'; it must be a number"]),
        ("--data.flip maybe", ["data.flip is 'maybe'; it must be true or false"]),
        ("--model.backbone.mult 3", ["model.backbone.mult is '3'; it must be a list in brackets of whole numbers"]),
        ("--model.backbone.mult [1,x]", ["model.backbone.mult is 'x'; it must be a list in brackets"]),
        ("--model.optimizer.betas [0.9]", ["model.optimizer.betas is '[0.9]'", "2 values in brackets, each a number"]),
        ("--model.optimizer.betas [0.9,x]", ["model.optimizer.betas is 'x'", "2 values in brackets"]),
        ("--model.optimizer.lr big", ["model.optimizer.lr is 'big'; it must be a number"]),
        ("--model.optimizer Adm", ["model.optimizer", "no class 'Adm'", "did you mean 'Adam'?"]),
        ("--model.optimizer.lrr 3", ["model.optimizer: Adam has no key 'lrr'; did you mean 'lr'?"]),
        ("--wandb.mode maybe", ["wandb.mode is 'maybe'; it must be one of 'auto', 'online'"]),
        ("--eval.metrics fid", ["eval.metrics is 'fid'; it must be a list in brackets of any of 'fid'"]),
        ("--resume always", ["resume is 'always'; it must be 'auto' or null"]),
        ("--model NCSM", ["model: there is no class 'NCSM'; did you mean 'NCSN'?"]),
        ("--model.sampler heunn", ["no class 'heunn'; did you mean 'Heun'?", "Ancestral"]),
        (
            "--model.sampler DDIM --model.sampler.steps_per_level 3",
            ["DDIM has no key 'steps_per_level'", "(AnnealedLangevin has it)", "it has steps"],
        ),
        (
            "--data.source ImageFolder --data.source.labels true",
            ["data.source: ImageFolder has no key 'labels'", "'classes'", "path, size"],
        ),
        ("--data.source ImageFolder", ["data.source: not given: path, size", "--data.source.path VALUE"]),
        ("--model.init_args 5", ["model.init_args is no mapping"]),
        ("--max_images 3", ["no key 'max_images'; did you mean 'trainer.max_images'?"]),
        ("--channels 3", ["no key 'channels'; did you mean 'model.backbone.channels'?"]),
        ("--trainer.acceleratr cpu", ["did you mean 'trainer.accelerator'?"]),
        ("--trainer.max_im 3", ["no key 'trainer.max_im'; did you mean 'trainer.max_images'?"]),
        ("--trainer.callbacks Foo", ["trainer.callbacks: there is no class 'Foo'", "classes)"]),
        ("stray", ["'stray' is no argument here"]),
    ],
)
def test_a_wrong_argument(typed, said, workdir, fit_parser):
    line = refusal(fit_parser.parse_args, in_order(["fit", "--config", "tiny.yaml", *typed.split(" ")]))
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(eval=None), ["eval is 'null'", "evaluates nothing"]),
        (lambda c: c.update(data=5), ["data is '5'; it takes its keys one by one"]),
        (lambda c: c["trainer"].update(max_images={"x": 5}), ["trainer.max_images is", "whole number"]),
        (lambda c: c["model"].update(foo=3), ["no key 'model.foo' beside class_path and init_args"]),
        (lambda c: c["model"].update(class_path=5), ["model.class_path is 5"]),
        (lambda c: c["model"].update(init_args=None), ["model.init_args is no mapping"]),
        (lambda c: c["model"]["init_args"].update(backbone=5), ["model.backbone is '5'; it must be one of MLP"]),
        (lambda c: c["model"]["init_args"].update(backbone="no.yaml"), ["model.backbone is 'no.yaml'", "no such file"]),
        (lambda c: c.update(model={"num_levels": 4}), ["'num_levels' is given and no class; give class_path"]),
        (lambda c: c["trainer"].update(foo=3), ["there is no key 'trainer.foo'; --help lists the keys"]),
        (lambda c: c.update({1: 3}), ["changed.yaml: a key of the configuration is 1; keys are words"]),
    ],
)
def test_a_wrong_value_in_a_file(change, said, workdir, fit_parser):
    config = yaml.safe_load(yaml.safe_dump(TINY))
    change(config)
    (workdir / "changed.yaml").write_text(yaml.safe_dump(config))
    line = refusal(fit_parser.parse_args, ["fit", "--config", "changed.yaml"])
    for words in said:
        assert words in line


@pytest.mark.parametrize("key", ["trainer", "model.backbone", "model.sampler", "model.optimizer", "data.source"])
def test_a_key_that_a_file_below_has_twice_is_refused_with_both_files(key, workdir, fit_parser):
    (workdir / "below.yaml").write_text("devices: ${seed_everything}\nx: 1\ndevices: 2\n")
    twice = "below.yaml{}: the key 'devices' is given twice, in lines 1 and 3"
    arguments = ["fit", "--config", "tiny.yaml"]
    assert twice.format("") in refusal(fit_parser.parse_args, [*arguments, f"--{key}", "below.yaml"])
    (workdir / "above.yaml").write_text(
        yaml.safe_dump({"model.init_args." + key[6:] if "model." in key else key: "below.yaml"})
    )
    assert twice.format(", which above.yaml names") in refusal(
        fit_parser.parse_args, [*arguments, "--config", "above.yaml"]
    )


def test_every_report_is_still_one_of_jsonargparses(workdir, fit_parser, monkeypatch):
    files = {
        "twice": "eta: 1\neta: 2",
        "unknown": "foo: 3",
        "circle": "trainer: circle.yaml",
        "torn": "a: [1",
        "numbers": "1: 2",
    }
    for name, text in files.items():
        (workdir / f"{name}.yaml").write_text(text)
    mistakes = [
        "--model.backbone os.system",
        "--model.sampler twice.yaml",
        "--trainer.max_images",
        "--data.source ImageFolder",
        "--config unknown.yaml",
        "--model.levelz 3",
        "--foo 3",
        "--config circle.yaml",
        "--trainer 5",
        "--config torn.yaml",
        "--config numbers.yaml",
        "--print_config=x",
        "--model.init_args 5",
        "--model.backbone torch.optim.Adam",
        "--model.optimizer lit_diffusion.processes.VE",
        "--model.backbone lit_diffusion.backbones.base.Backbone",
        "--model.backbone lit_diffusion.nowhere.X",
        "--model.backbone a-b.c",
        "--model NCSM",
        "--trainer.max_images lots",
    ]
    messages: list[str] = []
    explain = lit_diffusion.config.messages.explain
    monkeypatch.setattr(
        lit_diffusion.config.parser, "explain", lambda parser, text: (messages.append(text), explain(parser, text))[1]
    )
    for pattern, mistake in zip(REPORTS, mistakes, strict=True):
        messages.clear()
        refusal(fit_parser.parse_args, ["fit", "--config", "tiny.yaml", *mistake.split(" ")])
        firsts = [next((each for each in REPORTS if re.search(each, message)), None) for message in messages]
        assert pattern in firsts, (mistake, messages)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (int | None, "a whole number or null"),
        (float | list[float], "a number or a list in brackets of numbers"),
        (tuple[int, int] | None, "2 values in brackets, each a whole number or null"),
        (tuple[int, ...], "a list in brackets of whole numbers"),
        (dict[str, int], "keys and values in braces"),
        (bool | str, "true or false or text"),
    ],
)
def test_what_a_key_takes_in_words(hint, words):
    assert takes_of(hint) == words


@pytest.mark.parametrize(
    "typed",
    ["--seed_everything -5", f"--seed_everything {2**32}", "--trainer.val_check_interval 0.5", "--trainer.devices 0"],
)
def test_what_lightning_would_break_on_leaves_nothing_behind(typed, workdir):
    line = refusal(dispatch, ["fit", "--config", "tiny.yaml", *typed.split(" ")])
    assert typed.split(" ")[0].lstrip("-").rpartition(".")[2] in line
    assert [path.name for path in workdir.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("smaple", ["there is no command 'smaple'; did you mean 'sample'?"]),
        ("sample", ["not given: ckpt_path, num_samples, out"]),
        ("sample --num_samples x", ["num_samples is 'x'; it must be a whole number"]),
        ("sample --num_sample 3", ["there is no key 'num_sample'; did you mean 'num_samples'?"]),
        ("sample --num_samples", ["--num_samples needs a value"]),
        ("sample stray --num_samples 3 --ckpt_path a --out b.npz", ["'stray' is no argument here"]),
        ("evaluate", ["not given: samples, reference"]),
        ("evaluate --samples a --reference b --metric x", ["there is no key 'metric'; did you mean 'metrics'?"]),
        ("evaluate --samples a --reference b --extractor inc", ["extractor is 'inc'; it must be one of 'auto'"]),
        ("interpolate --pears 3", ["there is no key 'pears'; did you mean 'pairs'?"]),
        ("gallery --count x", ["count is 'x'; it must be a whole number"]),
        ("report a b", ["'b' is no argument here"]),
        ("report a --outt x", ["there is no key 'outt'; did you mean 'out'?"]),
        ("wandb-sync a --projct x", ["there is no key 'projct'; did you mean 'project'?"]),
        ("fetch dat x", ["fetch takes data or weights, and a name"]),
        ("predict --bogus 3", ["there is no key 'bogus'; --help lists the keys"]),
    ],
)
def test_every_command_says_what_is_wrong_with_its_arguments(typed, said, workdir):
    line = refusal(dispatch, typed.split(" "))
    for words in said:
        assert words in line
    assert [path.name for path in workdir.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("heunn", {}, ["there is no sampler 'heunn'; did you mean 'heun'? Choose one of"]),
        ("heun", {"eta": "0.5"}, ["sampler: Heun has no key 'eta'", "DDIM", "it has steps"]),
        ("heun", {"stepz": "5"}, ["sampler: Heun has no key 'stepz'; did you mean 'steps'?"]),
        ("heun", {"steps": "many"}, ["sampler.steps is 'many'; it must be a whole number"]),
    ],
)
def test_a_wrong_sampler(name, keys, said):
    line = refusal(choose_sampler, Heun(), name, keys)
    for words in said:
        assert words in line
