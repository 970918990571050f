"""``sample``: its formats, its identity contract, its samplers."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_diffusion.commands import sample as module
from lit_diffusion.data import ImageFolder, Npz
from lit_diffusion.errors import UserError
from lit_diffusion.randomness import keyed_choice


@pytest.fixture
def sample(trained, run, workdir):
    def call(out, *arguments):
        run("sample", "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--out", out, *arguments)
        return np.load(workdir / out)["arr_0"] if str(out).endswith(".npz") else workdir / out

    return call


def test_the_archive_has_adms_layout(sample):
    images = sample("a.npz", "--num_samples", 5)
    assert (images.shape, images.dtype) == ((5, 8, 8, 1), np.uint8)


def test_sample_i_depends_on_seed_and_i_alone(sample):
    sevens = sample("a.npz", "--num_samples", 20, "--batch_size", 7).astype(int)
    sixteens = sample("b.npz", "--num_samples", 20, "--batch_size", 16).astype(int)
    assert np.abs(sevens - sixteens).max() <= 1
    fewer = sample("c.npz", "--num_samples", 3).astype(int)
    assert np.abs(fewer - sevens[:3]).max() <= 1
    flat = sevens.reshape(20, -1)
    distances = np.abs(flat[:, None] - flat[None]).sum(-1) + 10**9 * np.eye(20, dtype=int)
    assert distances.min() > 64  # no two alike
    other = sample("d.npz", "--num_samples", 20, "--seed", 1).astype(int)
    assert np.abs(other - sevens).reshape(20, -1).sum(1).min() > 64


def test_the_same_call_gives_the_same_bits(sample):
    first = sample("a.npz", "--num_samples", 4)
    assert np.array_equal(first, sample("b.npz", "--num_samples", 4))


def test_folder_and_grid_hold_the_same_pixels(sample):
    images = sample("a.npz", "--num_samples", 4)
    folder = sample("folder/", "--num_samples", 4)
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png", "000003.png"]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), images[..., 0])
    grid = np.asarray(Image.open(sample("grid.png", "--num_samples", 4)))
    scale = grid.shape[0] // 2 // 8
    assert scale > 4
    assert {int(v) for v in images[0].ravel()} <= {int(v) for v in grid.ravel()}


def listing(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_holds_one_set(sample, workdir, run, capsys):
    folder = sample("folder/", "--num_samples", 5, "--seed", 7)
    first = listing(folder)
    assert "wrote 5 samples to folder (" in capsys.readouterr().out
    about = json.loads(first["samples.json"])
    assert (about["seed"], about["count"], about["images_seen"], about["whole"]) == (7, 5, 128, True)
    assert about["sampler"].startswith("AnnealedLangevin(")
    assert [*about["files"]] == sorted(set(first) - {"samples.json"})
    with pytest.raises(UserError, match="holds 5 samples, and a folder holds one set: give another, or --overwrite"):
        sample("folder/", "--num_samples", 3, "--seed", 8)
    assert listing(folder) == first
    (folder / "notes.txt").write_text("mine")
    (folder / "000007.txt").write_text("mine too")
    sample("folder", "--num_samples", 3, "--seed", 8, "--overwrite")
    second = listing(folder)
    assert set(second) == {"000000.png", "000001.png", "000002.png", "samples.json", "notes.txt", "000007.txt"}
    assert second["000000.png"] != first["000000.png"]
    assert json.loads(second["samples.json"])["seed"] == 8
    run("evaluate", "--samples", "folder", "--reference", "Digits")
    assert "3 samples against" in capsys.readouterr().out


def test_images_of_somebody_are_never_joined_or_removed(sample, workdir, run):
    folder = workdir / "photos"
    (folder / "deeper").mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "deeper" / "000000.jpg")
    (workdir / "empty").mkdir()
    for more in ((), ("--overwrite",)):
        with pytest.raises(UserError, match="holds"):
            sample("photos", "--num_samples", 2, *more)
    assert [*listing(folder)] == ["deeper/000000.jpg"]
    for name in ("dataset.json", "samples.json"):
        (workdir / name[:-5]).mkdir()
        (workdir / name[:-5] / name).write_text("mine")
        with pytest.raises(UserError, match="that `sample` did not write"):
            sample(name[:-5], "--num_samples", 2, "--overwrite")
        assert listing(workdir / name[:-5]) == {name: b"mine"}
    assert len(listing(sample("empty", "--num_samples", 2))) == 3
    Image.new("L", (8, 8)).save(workdir / "empty" / "mine.png")
    with pytest.raises(UserError, match=r"images or a list of them that `sample` did not write \(mine.png, 1 in all\)"):
        sample("empty", "--num_samples", 2, "--overwrite", "true")
    with pytest.raises(UserError, match=r"holds 3 images, and its samples\.json lists 2"):
        run("evaluate", "--samples", "empty", "--reference", "Digits")


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_set_is_none_that_looks_whole(sample, workdir, run, monkeypatch, there):
    if there:
        before = listing(sample("folder/", "--num_samples", 4, "--seed", 1))
    real, made = module.png_bytes, []

    def stop(image):
        made.append(image)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(module, "png_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        sample("folder/", "--num_samples", 5, "--overwrite")
    assert sorted(os.listdir(workdir)) == (["folder", "tiny.yaml"] if there else ["tiny.yaml"])
    assert not there or listing(workdir / "folder") == before


def test_a_kill_while_one_set_takes_anothers_place_is_seen(sample, workdir, run, monkeypatch):
    folder = sample("folder/", "--num_samples", 4, "--seed", 1)
    replace = Path.replace

    def stop(self, target):
        if Path(target).name == "000001.png":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        sample("folder/", "--num_samples", 5, "--overwrite")
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match="samples of two sets"):
        run("evaluate", "--samples", "folder", "--reference", "Digits")
    sample("folder/", "--num_samples", 2, "--overwrite")
    assert set(listing(folder)) == {"000000.png", "000001.png", "samples.json"}


def test_a_full_disk_leaves_no_set(sample, workdir, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lit_diffusion.files._write_synced", full)
    with pytest.raises(UserError, match=r"cannot write .*folder: No space left on device; free some space"):
        sample("folder/", "--num_samples", 2)
    assert sorted(os.listdir(workdir)) == ["tiny.yaml"]


@pytest.mark.parametrize("out", ["q.jpg", "x.tiff9", "run.v2", "a.npz/", ".png", "sub.npz", "notes", "a.PNGG"])
def test_where_samples_cannot_go_is_one_line_with_the_endings(sample, workdir, monkeypatch, out):
    (workdir / "sub.npz").mkdir()
    (workdir / "notes").write_text("mine")
    monkeypatch.setattr(module, "load_model", lambda options: 1 / 0)
    before = listing(workdir)
    with pytest.raises(UserError, match=r"give a name that ends in \.npz or \.png, or in / for a folder") as caught:
        sample(out, "--num_samples", 2)
    assert "\n" not in str(caught.value)
    assert f"--out {out}" in str(caught.value)
    assert listing(workdir) == before
    assert sorted(os.listdir(workdir)) == ["notes", "sub.npz", "tiny.yaml"]


def test_endings_in_upper_case_and_folders_with_dots(sample, workdir):
    images = np.load(workdir / sample("A.NPZ", "--num_samples", 2))["arr_0"]
    with Image.open(sample("new/A.Png", "--num_samples", 2)) as grid:
        assert grid.format == "PNG"
    folder = sample("run.v2/", "--num_samples", 2)
    with Image.open(folder / "000001.png") as image:
        assert np.array_equal(np.asarray(image), images[1, ..., 0])


def test_weights_are_chosen_by_name(sample):
    default, ema = sample("a.npz", "--num_samples", 4), sample("b.npz", "--num_samples", 4, "--weights", "ema")
    first = sample("c.npz", "--num_samples", 4, "--weights", "ema:500")
    raw = sample("e.npz", "--num_samples", 4, "--weights", "raw")
    assert np.array_equal(default, ema)
    assert np.array_equal(ema, first)
    assert not np.array_equal(raw, ema)
    with pytest.raises(UserError, match=r"ema:7.*raw, ema, ema:500, ema:2000"):
        sample("d.npz", "--num_samples", 4, "--weights", "ema:7")


def test_bf16_is_the_backbones_only(sample):
    full = sample("a.npz", "--num_samples", 4).astype(int)
    half = sample("b.npz", "--num_samples", 4, "--precision", "bf16-mixed").astype(int)
    assert 0 < np.abs(full - half).max() < 128


def test_samplers_by_short_name_key_and_class_path(sample, capsys):
    own = sample("a.npz", "--num_samples", 4)
    keyed = sample("b.npz", "--num_samples", 4, "--sampler.steps_per_level", 5)
    assert "16 network evaluations each" in capsys.readouterr().out  # 3 levels x 5 and the final denoise
    assert not np.array_equal(own, keyed)
    named = sample("c.npz", "--num_samples", 4, "--sampler", "annealed_langevin", "--sampler.steps_per_level=2")
    assert np.array_equal(named, own)  # the method's other keys stay
    plain = sample("d.npz", "--num_samples", 4, "--sampler", "langevin", "--sampler.steps", 7, "--sampler.eta", 0.01)
    by_path = sample(
        "e.npz",
        *("--num_samples", 4, "--sampler", "lit_diffusion.samplers.Langevin"),
        *("--sampler.steps", 7, "--sampler.eta", 0.01),
    )
    assert np.array_equal(plain, by_path)


def test_a_sampler_inside_a_sampler(sample, capsys):
    walk = ("--num_samples", 4, "--sampler", "predictor_corrector")
    named = sample("a.npz", *walk, "--sampler.predictor", "ancestral", "--sampler.predictor.steps", 2)
    # Two levels and back to 0: a prediction each, a correction at the level in between.
    assert "(3 network evaluations each)" in capsys.readouterr().out
    by_path = sample(
        "b.npz",
        *walk,
        *(
            "--sampler.predictor",
            "lit_diffusion.samplers.Ancestral",
            "--sampler.init_args.predictor.init_args.steps",
            2,
        ),
    )
    assert np.array_equal(named, by_path)
    more = sample("c.npz", *walk, "--sampler.predictor=ancestral", "--sampler.predictor.steps=3", "--sampler.snr=0.3")
    assert not np.array_equal(named, more)


def test_a_predicted_image_is_kept_in_the_range_that_is_asked_for(sample):
    walk = ("--num_samples", 4, "--sampler", "ancestral")
    default = sample("a.npz", *walk)
    for given, alike in (("data", True), ("[0.0, 1.0]", True), ("null", False), ("[0.0, 0.5]", False)):
        assert np.array_equal(sample("b.npz", *walk, "--sampler.clip_x0", given), default) is alike


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "langvin"], "annealed_langevin, churned_heun, ddim"),
        (["--sampler.stepz", "3"], "stepz"),
        (["--sampler", "predictor_corrector", "--sampler.predictor", "nothing"], "Ancestral, ChurnedHeun, DDIM"),
        (["--sampler", "predictor_corrector", "--sampler.predictor", "langevin"], "predictor"),
        (["--sampler", "ddim"], "visits 50 timesteps and the model has 3"),
        (["--sampler", "ancestral", "--sampler.variance", "learned"], "choose beta or beta_tilde"),
        (["--sampler.eta", "0.04"], r"eta 0.04 is not below 4 sigma\^2 = 0.04"),
        (
            ["--sampler", "langevin", "--sampler.metropolis", "true", "--sampler.eta", "0.001"],
            "needs a model with an energy",
        ),
        (["--label", "3"], "not class-conditional"),
        (["--num_samples", "0"], "num_samples"),
        (["--device", "nonsense"], "nonsense"),
        (["--precision", "64"], "precision"),
        (["--device", "cpu", "--cuda_graphs", "true"], "--cuda_graphs needs a CUDA device, and the model is on cpu"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(sample, workdir, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        sample("a.npz", "--num_samples", 4, *arguments)
    assert "\n" not in str(caught.value)
    assert not (workdir / "a.npz").exists()


def test_a_compiled_backbone_sees_one_batch_shape_and_gives_the_same_samples(sample, monkeypatch):
    asked, rows = [], []

    def recorded(self, *arguments, **keys):
        asked.append(keys)
        self.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    monkeypatch.setattr(nn.Module, "compile", recorded)
    plain = sample("a.npz", "--num_samples", 9, "--batch_size", 4).astype(int)
    compiled = sample("b.npz", "--num_samples", 9, "--batch_size", 4, "--compile", "true").astype(int)
    assert asked == [{"fullgraph": True, "dynamic": False}]
    assert set(rows) == {4}
    assert np.abs(plain - compiled).max() <= 1


def test_an_unwritable_place_is_found_out_first_and_nothing_is_left(sample, workdir, run):
    (workdir / "file").write_text("")
    for out in ("file/a.npz", "file/folder/", "file/deep/a.png", f"{'x' * 250}.npz"):
        with pytest.raises(UserError, match="cannot write"):
            sample(out, "--num_samples", 4)
    with pytest.raises(UserError, match="does not exist"):
        run("sample", "--ckpt_path", "nowhere.ckpt", "--num_samples", 4, "--out", "new/deep/a.npz")
    assert sorted(os.listdir(workdir)) == ["file", "tiny.yaml"]


# ---- classes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(of_cats_and_dogs, run, workdir):
    def call(out, *arguments):
        checkpoint = of_cats_and_dogs / "checkpoints" / "last.ckpt"
        run("sample", "--ckpt_path", checkpoint, "--out", out, "--num_samples", 40, *arguments)
        return np.load(workdir / out) if str(out).endswith(".npz") else workdir / out

    return call


def test_files_of_samples_have_classes_as_often_as_the_training_data_and_say_them(pets, capsys):
    archive = pets("a.npz", "--seed", 3)
    expected = keyed_choice(3, "sample class", torch.arange(40), torch.tensor([27, 3]))
    assert "labels: as often as in the training data" in capsys.readouterr().out
    assert 0 < int(expected.sum()) < 12  # of 4 to be expected
    assert archive["labels"].tolist() == expected.tolist()
    assert list(archive) == ["arr_0", "labels", "class_names"]
    source = Npz(archive.fid.name, label_key="labels")
    assert source.class_names == ["cat", "dog"]
    pets("folder/", "--seed", 4)
    folder = ImageFolder(pets("folder/", "--seed", 3, "--overwrite"), size=8, channels=1, classes=True)
    assert (folder.class_names, len(folder)) == (["cat", "dog"], 40)
    for k in range(40):
        assert folder.label(k) == source.label(k) == int(expected[k])
        assert np.array_equal(folder.value(k), source.value(k))


def test_a_grid_shows_all_classes_in_turn(pets, capsys):
    pets("a.png")
    assert "labels: all classes in turn" in capsys.readouterr().out


def test_a_class_is_given_by_its_name_or_its_number(pets, workdir, capsys):
    named = pets("a.npz", "--label", "dog")
    assert "labels: all 1 (dog)" in capsys.readouterr().out
    assert named["labels"].tolist() == [1] * 40
    assert np.array_equal(named["arr_0"], pets("b.npz", "--label", 1)["arr_0"])
    for unknown in ("dgo", "2", "-1"):
        with pytest.raises(
            UserError, match=r"^label .*: this model's classes are 0 to 1, by name (dog, cat|cat, dog)$"
        ):
            pets("folder/", f"--label={unknown}")
    assert not (workdir / "folder").exists()
