"""``interpolate``: its picture, its round trip, its refusals."""

import pytest
import yaml
from helpers.tiny import TINY

from lit_diffusion.__main__ import dispatch
from lit_diffusion.commands import interpolate as command
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation.interpolation import interpolate

DDPM = {
    **TINY,
    "model": {
        "class_path": "DDPM",
        "init_args": {"num_timesteps": 20, "beta_T": 0.4, "backbone": TINY["model"]["init_args"]["backbone"]},
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm")
    (folder / "ddpm.yaml").write_text(yaml.safe_dump(DDPM))
    dispatch(["fit", "--config", str(folder / "ddpm.yaml"), "--run_dir", str(folder / "run")])
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_between_samples(run, workdir, checkpoint, capsys):
    run("interpolate", "--ckpt_path", checkpoint, "--out", "a.png", "--pairs", 3, "--columns", 5, "--sampler.steps", 4)
    assert "wrote 3 rows of 5 images to a.png (4 evaluations each)" in capsys.readouterr().out
    first = (workdir / "a.png").read_bytes()
    run("interpolate", "--ckpt_path", checkpoint, "--out", "b.png", "--pairs", 3, "--columns", 5, "--sampler.steps", 4)
    assert (workdir / "b.png").read_bytes() == first
    run(
        "interpolate",
        "--ckpt_path",
        checkpoint,
        "--out",
        "c.png",
        "--pairs",
        3,
        "--columns",
        5,
        "--sampler.steps",
        4,
        "--seed",
        1,
    )
    assert (workdir / "c.png").read_bytes() != first


def test_between_held_out_images(run, workdir, checkpoint, capsys):
    arguments = ("--between", "images", "--pairs", 2, "--columns", 3, "--sampler.steps", 20)
    run("interpolate", "--ckpt_path", checkpoint.parent.parent, "--out", "a.png", *arguments)
    out = capsys.readouterr().out
    assert out.count(f"taking {checkpoint}") == 1
    assert "wrote 2 rows of 5 images" in out  # an image, three points, an image
    difference = float(out.split("differ from themselves by ")[1].split()[0])
    assert 0.0 < difference < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.jpg"], "ends in .png"),
        (["--out", "a.png", "--columns", "1"], "two ends"),
        (["--out", "a.png", "--pairs", "0"], "pairs is 0"),
        (["--out", "a.png", "--sampler", "ancestral"], "deterministic sampler"),
        (["--out", "a.png", "--sampler.eta", "0.5"], "deterministic sampler"),
        (["--out", "a.png", "--between", "images", "--pairs", "500", "--sampler.steps", "5"], "fewer --pairs"),
        (["--out", "a.png", "--sampler.steps", "50"], "20"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, workdir, checkpoint, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        run("interpolate", "--ckpt_path", checkpoint, *arguments)
    assert "\n" not in str(caught.value)
    assert not (workdir / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "labels", "others"),
    [
        (["--between", "samples"], [0, 1], None),
        (["--between", "samples", "--label", "cat"], [0, 0], None),
        (["--between", "images"], [1, 1], [1, 1]),  # all of them dogs, whose number is training's
        (["--between", "images", "--label", "dog"], [1, 1], [1, 1]),
    ],
)
def test_the_classes_between(run, workdir, of_cats_and_dogs, monkeypatch, arguments, labels, others):
    told = []

    def recorded(method, first, second, columns, sampler, cond, second_cond=None):
        told.extend(None if each is None else each.label.tolist() for each in (cond, second_cond))
        return interpolate(method, first, second, columns, sampler, cond, second_cond)

    monkeypatch.setattr(command, "interpolate", recorded)
    run("interpolate", "--ckpt_path", of_cats_and_dogs, "--out", "a.png", "--pairs", 2, "--columns", 3, *arguments)
    assert told == [labels, others]


def test_images_of_a_class_that_is_not_held_out(run, workdir, of_cats_and_dogs):
    for label, message in (("cat", "0 held-out images of the class cat, 2 are"), ("cow", "by name cat, dog")):
        arguments = ("--between", "images", "--label", label, "--pairs", 1)
        with pytest.raises(UserError, match=message):
            run("interpolate", "--ckpt_path", of_cats_and_dogs, "--out", "a.png", *arguments)
