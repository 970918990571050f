"""Any number of channels, rectangles and vectors: from every source, through training, pictures and commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import CONFIG, Convolutions, fit, run_logger
from PIL import Image

from lit_diffusion.__main__ import dispatch
from lit_diffusion.backbones import MLP
from lit_diffusion.callbacks import EMA, Evaluator, NoiseLevels, Samples
from lit_diffusion.checks.recipe import evaluation, prepare
from lit_diffusion.data import ImageFolder, InMemory, Npz
from lit_diffusion.data.as_given import images_as_given
from lit_diffusion.errors import UserError
from lit_diffusion.methods import NCSN
from lit_diffusion.metrics.extractors import default_extractor, load_extractor
from lit_diffusion.metrics.reference import RealData
from lit_diffusion.plots.figures import scatter
from lit_diffusion.samplers import AnnealedLangevin
from lit_diffusion.training.datamodule import DataModule

SHAPES = [(1, 8, 8), (1, 4, 8), (2, 8, 8), (3, 8, 4), (4, 8, 8), (5, 4, 8), (12, 16, 16), (1,), (3,)]


def values_of(shape, count=24):
    rng = np.random.default_rng(0)
    if len(shape) == 1:
        return rng.normal(size=(count, *shape)).astype(np.float32)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def from_memory(values, folder):
    return InMemory(values, num_grey_levels=256 if values.ndim == 4 else None)


def from_archive(values, folder):
    np.savez(folder / "set.npz", values.transpose(0, 2, 3, 1) if values.ndim == 4 else values)
    return Npz(folder / "set.npz")


def from_files(values, folder):
    for number, image in enumerate(values.transpose(0, 2, 3, 1)):
        (folder / "set").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / "set" / f"{number:02d}.png")
    return ImageFolder(folder / "set", size=values.shape[2:], channels=values.shape[1])


MATRIX = [
    *((shape, make) for shape in SHAPES for make in (from_memory, from_archive)),
    *((shape, from_files) for shape in SHAPES if len(shape) == 3 and shape[0] in (1, 3)),
]


@pytest.mark.parametrize(("shape", "make"), MATRIX, ids=lambda x: x.__name__ if callable(x) else "x".join(map(str, x)))
def test_every_source_has_the_values_that_went_in(tmp_path, shape, make):
    values = values_of(shape)
    source = make(values, tmp_path)
    assert source.shape == shape
    np.testing.assert_array_equal(np.stack([source.value(i) for i in range(len(source))]), values)
    real = RealData.of(source, torch.arange(3), "all").values(torch.arange(3))
    np.testing.assert_array_equal(real, values[:3] if len(shape) == 1 else values[:3].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_a_training_with_its_pictures(tmp_path, shape, capsys):
    torch.manual_seed(0)
    image = len(shape) == 3
    backbone = Convolutions(data_shape=shape, out_channels=shape[0]) if image else MLP(shape, width=8, depth=1)
    method = NCSN(backbone, 2.0, 0.1, 2, "score", "log_sigma", sampler=AnnealedLangevin(1, 1e-3))
    callbacks = [EMA([64]), Samples(count=3, film_columns=2)]
    if shape in ((5, 4, 8), (1,)):  # What costs a second and looks at no shape.
        callbacks.append(NoiseLevels(num_levels=2, images=4))
    if default_extractor(shape) != "inception":  # The others need no weights from elsewhere.
        callbacks.append(Evaluator(every_n_steps=2, samples=10, metrics=["fid", "memorisation"]))
    data = DataModule(from_memory(values_of(shape), None), 8, held_out_fraction=0.1)
    fit(method, data, tmp_path, 16, callbacks=callbacks, logger=run_logger(tmp_path, method))
    assert method.generate(torch.arange(2), seed=0).x.shape == (2, *shape)

    pictures = {path.name.split("-0")[0]: path for path in (tmp_path / "run" / "samples").glob("*.png")}
    said = capsys.readouterr().out
    if image:
        mode = "L" if shape[0] in (1, 2) else "RGB"
        assert [Image.open(pictures[name]).mode for name in ("samples", "film")] == [mode, mode]
        assert said.count("pictures show") == (shape[0] not in (1, 3))
    assert ("noise-levels" in pictures) == (shape in ((5, 4, 8), (1,)))
    assert ("neighbours" in pictures) == (shape == (1, 8, 8))
    if shape == (1,):
        scatter(values_of(shape), tmp_path / "points.png", title="points of a line")


@pytest.mark.parametrize("shape", SHAPES[:7])
def test_extractors_refuse_channels_before_they_look_for_weights(shape):
    for name in ("inception", "dinov2", "clip", "vgg16"):
        wanted = f"fetch weights {name}" if shape[0] in (1, 3) else f"extractor {name} takes grey or RGB images"
        with pytest.raises(UserError, match=wanted):
            load_extractor(name, shape)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A folder with a run on 5 x 4 x 8 images, through the command line, and what it said."""
    folder = tmp_path_factory.mktemp("five")
    np.savez(folder / "five.npz", values_of((5, 4, 8)).transpose(0, 2, 3, 1))
    config = {
        **CONFIG,
        "model": {
            "class_path": "DDPM",
            "init_args": {"num_timesteps": 20, "beta_T": 0.4, "backbone": CONFIG["model"]["init_args"]["backbone"]},
        },
        "data": {
            "source": {"class_path": "Npz", "init_args": {"path": str(folder / "five.npz")}},
            "global_batch_size": 8,
            "held_out_fraction": 0.2,
        },
        "trainer": {"max_images": 16, "accelerator": "cpu", "devices": 1},
        "samples": {"count": 4, "film_columns": 2},
    }
    (folder / "five.yaml").write_text(yaml.safe_dump(config))
    dispatch(["fit", "--config", str(folder / "five.yaml"), "--run_dir", str(folder / "run")])
    return folder


@pytest.fixture
def run(five, monkeypatch):
    monkeypatch.chdir(five)

    def call(*arguments):
        checkpoint = () if arguments[0] in ("gallery", "evaluate") else ("--ckpt_path", "run/checkpoints/last.ckpt")
        dispatch([str(argument) for argument in (arguments[0], *arguments[1:], *checkpoint)])

    return call


SHOWN = "pictures show channels 1 to 3 of 5; archives (.npz) hold all"


def test_five_channels_are_trained_sampled_and_shown(five, run, capsys):
    assert (five / "run" / "checkpoints" / "last.ckpt").is_file()
    run("sample", "--num_samples", 4, "--out", "a.npz")
    images = np.load(five / "a.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((4, 4, 8, 5), np.uint8)
    assert SHOWN not in capsys.readouterr().out
    run("sample", "--num_samples", 4, "--out", "a.png")
    assert f"note: {SHOWN}\n" in capsys.readouterr().out
    assert set(images[..., :3].ravel()) <= set(np.asarray(Image.open(five / "a.png")).ravel())
    with pytest.raises(
        UserError, match=r"--out folder: images of 5 channels go into a .npz or a .png, not into a folder"
    ):
        run("sample", "--num_samples", 4, "--out", "folder")
    assert not (five / "folder").exists()
    arguments = ("--pairs", 2, "--columns", 3, "--sampler.steps", 2, "--out", "b.png")
    for between in ("samples", "images"):
        run("interpolate", "--between", between, *arguments)
        assert f"note: {SHOWN}\n" in capsys.readouterr().out
        assert Image.open(five / "b.png").mode == "RGB"
    run("gallery", "a.npz", "--count", 4, "--out", "a.html")
    assert f"a.npz: {SHOWN}" in capsys.readouterr().out


def test_what_sees_no_five_channels_says_so_before_the_work(five, run):
    refused = r"extractor inception takes grey or RGB images, the data have shape \[5, 4, 8\], .* eval.metrics"
    with pytest.raises(UserError, match=refused):
        run("evaluate", "--samples", "five.npz", "--reference", "five.npz")
    with pytest.raises(UserError, match=refused):
        run("test")
    recipe, said = prepare(["--config", "five.yaml", "--eval.every_n_steps", "1"])  # as doctor does
    assert SHOWN in said
    with pytest.raises(UserError, match=refused):
        list(evaluation(recipe))


def test_points_from_an_archive_are_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = values_of((3,), 64)
    np.savez("a.npz", values)
    np.savez("b.npz", values + np.float32(3.0))
    assert images_as_given("a.npz").num_grey_levels is None
    for other, distance in (("a.npz", 0.0), ("b.npz", 27.0)):
        dispatch(["evaluate", "--samples", "a.npz", "--reference", other, "--metrics", "fid", "--out", "out.json"])
        assert json.loads((tmp_path / "out.json").read_text())["values"]["fd/points-64"] == pytest.approx(
            distance, abs=1e-3
        )
    np.savez("c.npz", values[:, :2])
    np.savez("d.npz", np.zeros((9, 8, 8, 1), np.uint8))
    for other, said in (
        ("c.npz", "3 dimensions, the reference has 2"),
        ("d.npz", "holds images, the samples are points"),
    ):
        with pytest.raises(UserError, match=said):
            dispatch(["evaluate", "--samples", "a.npz", "--reference", other])
    with pytest.raises(UserError, match=r"a.npz holds points; the gallery shows images"):
        dispatch(["gallery", "a.npz"])
