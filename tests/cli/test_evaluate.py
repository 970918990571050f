"""``evaluate``: the same figures whatever the images come in, and one line for what cannot be measured."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.tiny import digits
from PIL import Image

from lit_diffusion.__main__ import as_one_line, dispatch, main
from lit_diffusion.commands.evaluate import other_shares
from lit_diffusion.data.as_given import classes_as_given, images_as_given
from lit_diffusion.data.dataset_json import labels_text
from lit_diffusion.errors import UserError
from lit_diffusion.metrics import load_extractor
from lit_diffusion.metrics.frechet import gaussian_of
from lit_diffusion.metrics.reference import RealData


def digit_images(first, count):
    """Digits as bytes ``[count, 8, 8, 1]``."""
    return RealData.of(digits(), torch.arange(len(digits())), "all").values(torch.arange(first, first + count))


def save_folder(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{number:04d}.png")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with 60 digits as an archive, as files and in a zip file, and 80 others."""
    folder = tmp_path_factory.mktemp("given")
    images = digit_images(0, 60)
    np.savez(folder / "images.npz", arr_0=images)
    save_folder(folder / "images", images)
    shutil.make_archive(str(folder / "images"), "zip", folder / "images")
    np.savez(folder / "others.npz", arr_0=digit_images(100, 80))
    (folder / "words.txt").write_text("a digit\n" * 60)
    (folder / "few.txt").write_text("a digit\n" * 59)
    np.savez(folder / "one.npz", arr_0=images[:1])
    np.savez(folder / "floats.npz", arr_0=images / 255.0)
    np.savez(folder / "large.npz", arr_0=np.zeros((30, 16, 16, 1), np.uint8))
    gaussian = gaussian_of(load_extractor("digits", (1, 8, 8))(digit_images(100, 80)).features)
    np.savez(folder / "moments.npz", mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())
    np.savez(folder / "wrong_moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name in ("corrupt", "two_sizes"):
        save_folder(folder / name, images)
    (folder / "corrupt" / "0007.png").write_bytes(b"\x89PNG broken")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "two_sizes" / "0031.png")
    (folder / "empty").mkdir()
    (folder / "torn.npz").write_bytes((folder / "images.npz").read_bytes()[:500])
    return folder


@pytest.fixture
def evaluate(given, tmp_path, monkeypatch):
    """Run it beside the files; what it wrote."""
    monkeypatch.chdir(given)

    def call(samples, reference, *arguments):
        given = ["--samples", samples, "--reference", reference, "--out", tmp_path / "out.json", *arguments]
        dispatch(["evaluate", *map(str, given)])
        return json.loads((tmp_path / "out.json").read_text())

    return call


ALL = {
    *(f"{name}/digits-60" for name in ("fd", "is", "kd", "precision", "recall", "density", "coverage")),
    *(f"{name}/digits-60" for name in ("near_copies", "nn_ratio", "memorised", "authenticity")),
}


def test_archive_folder_and_zip_file_have_the_same_figures(evaluate):
    found = [evaluate(name, "others.npz") for name in ("images.npz", "images", "images.zip")]
    assert set(found[0]["values"]) == ALL
    assert found[0]["values"]["fd/digits-60"] > 1.0
    for other in found[1:]:
        assert other["values"] == found[0]["values"]
        assert other["errors"] == found[0]["errors"]
    as_reference = [evaluate("others.npz", name)["values"] for name in ("images.npz", "images", "images.zip")]
    assert as_reference[0] == as_reference[1] == as_reference[2]


def test_what_was_widened_or_given_alpha_has_the_same_figures(evaluate, given):
    """The high byte of 16 bits, and no transparency, is the image."""
    grey = np.load(given / "images.npz")["arr_0"][..., 0]
    for name in ("wide", "opaque"):
        (given / name).mkdir()
        for number, image in enumerate(grey):
            wide = Image.fromarray(image.astype(np.uint16) * 257)
            opaque = Image.merge("LA", [Image.fromarray(image), Image.new("L", (8, 8), 255)])
            (wide if name == "wide" else opaque).save(given / name / f"{number:04d}.png")
    plain = evaluate("images.npz", "others.npz", "--metrics", "fid,precision")["values"]
    for name in ("wide", "opaque"):
        assert evaluate(name, "others.npz", "--metrics", "fid,precision")["values"] == plain


def test_a_data_source_by_name_is_its_images(evaluate, given):
    np.savez(given / "all.npz", arr_0=digit_images(0, 1797))
    by_name, by_file = (evaluate("images.npz", reference) for reference in ("Digits", "all.npz"))
    assert by_name["values"] == by_file["values"]
    assert by_name["protocol"]["reference_source"] == "digits"
    assert by_name["protocol"]["n_real"] == 1797
    assert by_name["values"]["near_copies/digits-60"] == 1.0
    everything = evaluate("all.npz", "Digits", "--metrics", "fid,precision")["values"]
    assert everything["fd/digits-1797"] == pytest.approx(0.0, abs=1e-6)
    assert everything["precision/digits-1797"] == 1.0


def test_images_against_themselves(evaluate, capsys):
    values = evaluate("images.npz", "images")["values"]
    assert values["fd/digits-60"] == pytest.approx(0.0, abs=1e-5)  # 60 images span no 64 dimensions
    for name in ("precision", "recall", "coverage", "near_copies", "memorised"):
        assert values[f"{name}/digits-60"] == 1.0
    assert "note: many samples are copies of reference images" in capsys.readouterr().out
    found = evaluate("images.npz", "others.npz")
    assert "copies of reference" not in capsys.readouterr().out
    assert found["protocol"]["memorisation_split"] == "the reference as given, whatever the model was trained on"
    assert "caveat" not in found["protocol"]
    itself = evaluate("images.npz", "images.npz")["protocol"]["caveat"]
    assert itself == "the samples are the reference itself, so these values say nothing about a model"
    assert f"note: {itself}" in capsys.readouterr().out


def test_what_is_written_and_printed(evaluate, capsys, given):
    found = evaluate("images.npz", "others.npz", "--metrics", "fid,precision,is")
    assert found["format_version"] == 1
    assert set(found["values"]) == {"fd/digits-60", "precision/digits-60", "is/digits-60"}
    assert set(found["errors"]) == {"is/digits-60"}
    assert found["intervals"] == {}
    protocol = found["protocol"]
    assert (protocol["extractor"], protocol["n_real"], protocol["n_fake"]) == ("digits-classifier", 80, 60)
    assert (protocol["samples"], protocol["stage"], protocol["split"]) == ("images.npz", "evaluate", "all")
    assert protocol["reference_source"] == "others"
    assert len(protocol["reference"]) == len(protocol["samples_fingerprint"]) == 16
    said = capsys.readouterr().out
    assert "60 samples against 80 of others, digits-classifier\n" in said
    for name, value in found["values"].items():
        assert f"  {name:<28} {value:.6g}" in said
    assert f"+- {found['errors']['is/digits-60']:.2g}" in said
    assert "60 samples are fewer than the 64 dimensions" in said
    evaluate("images.npz", "others.npz", "--metrics", "precision")
    assert "fewer than" not in capsys.readouterr().out


def test_grey_levels_that_were_not_brought_to_bytes_are_said(evaluate, given, capsys):
    """The digits' own values 0 .. 16 are all but black."""
    np.savez(given / "levels.npz", arr_0=np.stack([digits().value(i) for i in range(60)]).transpose(0, 2, 3, 1))
    caveat = evaluate("levels.npz", "others.npz", "--metrics", "fid")["protocol"]["caveat"]
    assert caveat.startswith("the brightest value of the samples is 16 of 255")
    assert f"note: {caveat}" in capsys.readouterr().out


def test_what_one_image_has_not_is_said(evaluate, capsys):
    found = evaluate("one.npz", "others.npz")
    assert set(found["values"]) == {
        f"{name}/digits-1" for name in ("near_copies", "nn_ratio", "memorised", "authenticity")
    }
    assert found["left_out"]["fid"] == found["left_out"]["kid"] == "it needs at least 2 samples, there are 1"
    assert set(found["left_out"]) == {"fid", "is", "kid", "precision", "recall", "density", "coverage"}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    for name, reason in found["left_out"].items():
        assert name in line
        assert reason in line
    moments = evaluate("images.npz", "moments.npz")
    assert set(moments["left_out"]) == {"kid", "precision", "recall", "density", "coverage", "memorisation"}
    assert moments["protocol"]["n_real"] is None
    assert evaluate("images.npz", "others.npz", "--metrics", "fid,precision")["left_out"] == {}


def test_subsets_that_are_the_whole_set_are_no_error(evaluate):
    found = evaluate("images.npz", "images.zip", "--metrics", "kid")
    assert found["errors"] == {}
    assert (found["protocol"]["kid_subsets"], found["protocol"]["kid_subset_size"]) == (1, 60)
    assert found["left_out"] == {"kid error": "subsets of 60 share most of 60 samples and 60 data"}
    some = evaluate("images.npz", "others.npz", "--metrics", "kid", "--kid_subset_size", 30)
    assert some["errors"]["kd/digits-60"] > 0.0
    assert (some["protocol"]["kid_subsets"], some["protocol"]["kid_subset_size"]) == (100, 30)


def test_the_batch_changes_nothing(evaluate):
    one, other = (evaluate("images.npz", "others.npz", "--batch_size", size)["values"] for size in (7, 250))
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_intervals_where_asked_for(evaluate, capsys):
    found = evaluate("images.npz", "others.npz", "--bootstrap", 50, "--metrics", "fid,precision,is,memorisation")
    assert set(found["intervals"]) == set(found["values"])
    for name, (low, high) in found["intervals"].items():
        assert low <= high
        assert f"[{low:.6g}, {high:.6g}]" in capsys.readouterr().out or name != "fd/digits-60"
    low, high = found["intervals"]["precision/digits-60"]
    assert low < found["values"]["precision/digits-60"] < high


def test_moments_alone_are_enough_for_the_frechet_distance_alone(evaluate):
    found = evaluate("images.npz", "moments.npz")
    assert set(found["values"]) == {"fd/digits-60", "is/digits-60"}  # the latter knows nothing of the reference
    images = evaluate("images.npz", "others.npz", "--metrics", "fid")
    assert found["values"]["fd/digits-60"] == pytest.approx(images["values"]["fd/digits-60"], rel=1e-6)
    with pytest.raises(UserError, match="kid cannot be measured: the reference holds mean and covariance only"):
        evaluate("images.npz", "moments.npz", "--metrics", "fid,kid")


@pytest.mark.parametrize(
    ("samples", "reference", "arguments", "said"),
    [
        ("nowhere.npz", "others.npz", (), "there is no file nowhere.npz"),
        ("nowhere", "others.npz", (), "nowhere"),
        ("images.npz", "nowhere", (), "there is no such file, folder or data source; give images, or one of "),
        ("images.npz", "nowhere.npz", (), "there is no file nowhere.npz"),
        ("images.npz", "Digitz", (), "Digits"),
        ("images.npz", "ImageFolder", (), "--reference ImageFolder needs arguments"),
        ("images.npz", "GaussianMixturePoints", (), "holds points; evaluate compares images"),
        ("corrupt", "others.npz", (), "0007.png in corrupt is not a whole image"),
        ("images.npz", "corrupt", (), "0007.png in corrupt is not a whole image"),
        ("two_sizes", "others.npz", (), "0031.png in two_sizes is [1, 9, 8], 0000.png is [1, 8, 8]"),
        ("empty", "others.npz", (), "no image in empty"),
        ("torn.npz", "others.npz", (), "torn.npz"),
        ("images.npz", "torn.npz", (), "torn.npz"),
        ("floats.npz", "others.npz", (), "is float64, images must be uint8"),
        ("images.npz", "floats.npz", (), "is float64, images must be uint8"),
        ("images.npz", "Digitz", (), "(did you mean 'Digits'?)"),
        ("images.npz", "large.npz", (), "the samples are 8 x 8, the reference is 16 x 16"),
        ("images.npz", "wrong_moments.npz", (), "this extractor's features have 64 dimensions"),
        ("large.npz", "large.npz", ("--extractor", "digits"), "extractor digits takes 8 x 8 grey images"),
        ("large.npz", "large.npz", (), "run `python -m lit_diffusion fetch weights inception`"),
        (
            "one.npz",
            "others.npz",
            ("--metrics", "fid"),
            "fid cannot be measured: it needs at least 2 samples, there are 1",
        ),
        ("one.npz", "others.npz", ("--metrics", "precision"), "5 nearest neighbors need more than 5"),
        ("images.npz", "one.npz", (), "at least 2 samples, there are 1"),
        ("images.npz", "others.npz", ("--metrics", "fidd"), "--metrics is 'fidd'; choose one of fid,"),
        ("images.npz", "others.npz", ("--metrics", ","), "--metrics is empty"),
        ("images.npz", "others.npz", ("--metrics", "fid_infinity"), "FD-infinity in 64 dimensions needs"),
        ("images.npz", "others.npz", ("--extractor", "incepton"), "inception"),
        ("images.npz", "others.npz", ("--batch_size", "0"), "--batch_size is 0"),
        ("images.npz", "others.npz", ("--kid_subset_size", "0"), "kid_subset_size is 0"),
        ("images.npz", "others.npz", ("--device", "warp"), "--device warp cannot be used"),
        ("images.npz", "others.npz", ("--metricz", "fid"), "there is no key 'metricz'"),
        ("images.npz", "others.npz", ("--weights_path", "nowhere"), "nowhere"),
        ("images.npz", "others.npz", ("--metrics", "clip_score"), "clip_score needs --captions"),
        ("images.npz", "others.npz", ("--captions", "words.txt"), "--captions are for it"),
        (
            "images.npz",
            "others.npz",
            ("--metrics", "clip_score", "--captions", "few.txt"),
            "few.txt has 59 lines for 60 images",
        ),
        (
            "images.npz",
            "others.npz",
            ("--metrics", "clip_score", "--captions", "none.txt"),
            "cannot read the captions none.txt",
        ),
        (
            "images.npz",
            "others.npz",
            ("--metrics", "clip_score", "--captions", "words.txt"),
            "run `python -m lit_diffusion fetch weights clip`",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(evaluate, tmp_path, samples, reference, arguments, said):
    with pytest.raises(UserError) as caught:
        evaluate(samples, reference, *arguments)
    line = as_one_line(caught.value)
    assert said in line
    assert "\n" not in str(caught.value)
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


def test_where_the_result_goes_is_checked_before_the_work(evaluate, given, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_diffusion.commands.evaluate.images_as_given", lambda path: 1 / 0)
    for out, said in (("out.txt", "give a name that ends in .json"), ("words.txt/out.json", "cannot write to")):
        with pytest.raises(UserError, match=said):
            evaluate("images.npz", "others.npz", "--out", out)


def test_the_process_exits_with_2(given, monkeypatch, capsys):
    monkeypatch.chdir(given)
    monkeypatch.setattr(sys, "argv", ["lit_diffusion", "evaluate", "--samples", "nowhere.npz", "--reference", "Digits"])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("lit_diffusion: error: there is no file nowhere.npz")
    assert "Traceback" not in said


def test_fetch_says_where_the_weights_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lit_diffusion.commands.fetch.fetch_weights", lambda name: tmp_path / f"{name}.pth")
    dispatch(["fetch", "weights", "vgg16"])
    assert capsys.readouterr().out == f"vgg16 is in {tmp_path / 'vgg16.pth'}\n"
    for arguments in (["weights"], ["weights", "vgg16", "clip"], ["wheights", "vgg16"]):
        with pytest.raises(UserError, match="fetch takes data or weights, and a name"):
            dispatch(["fetch", *arguments])


# ---- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["npz", "adm", "folder"])
@pytest.mark.parametrize(("ones", "said"), [(30, "(0: 50.0% of the samples, 90.0% there)"), (6, None)])
def test_classes_that_are_not_as_often_as_in_the_reference_are_said(evaluate, tmp_path, layout, ones, said, capsys):
    images = digit_images(0, 60)
    labels = np.repeat([0, 1], [60 - ones, ones])
    np.savez(tmp_path / "real.npz", arr_0=digit_images(100, 80), labels=np.repeat([0, 1], [72, 8]))
    if layout == "folder":
        save_folder(tmp_path / "samples", images)
        names = [f"{number:04d}.png" for number in range(60)]
        (tmp_path / "samples" / "dataset.json").write_bytes(labels_text(names, labels.tolist()))
    else:
        np.savez(tmp_path / "samples.npz", arr_0=images, **{"labels" if layout == "npz" else "arr_1": labels})
    samples = tmp_path / ("samples" if layout == "folder" else "samples.npz")
    caveat = evaluate(samples, tmp_path / "real.npz", "--metrics", "fid")["protocol"].get("caveat")
    assert (said is None) == (caveat is None)
    if said is not None:
        assert said in caveat
        assert caveat in capsys.readouterr().out


def test_shares_of_classes_differ_by_chance_and_by_names():
    half = [str(k % 10) for k in range(5000)]
    assert other_shares(half, half[:993]) is None
    cats, both = ["cat"] * 5000, ["cat", "dog"] * 2500
    assert other_shares(both, cats).startswith("the classes are not as often as in the reference (")
    assert other_shares(half, both) is None  # numbers and names
    assert other_shares(half[:8], half) is None  # of so few it may be chance
    assert other_shares(None, half) is None


def test_labels_that_are_none_are_passed_over(tmp_path):
    images = digit_images(0, 6)
    for number, labels in enumerate((np.zeros(6), np.zeros(5, int), np.eye(6, dtype=int))):
        np.savez(tmp_path / f"{number}.npz", arr_0=images, labels=labels)
        assert classes_as_given(tmp_path / f"{number}.npz", images_as_given(tmp_path / f"{number}.npz")) is None
    save_folder(tmp_path / "folder", images)
    for content in ('{"labels": null}', '{"labels": [["0000.png", 1]]}', "{"):
        (tmp_path / "folder" / "dataset.json").write_text(content)
        assert classes_as_given(tmp_path / "folder", images_as_given(tmp_path / "folder")) is None
    named = classes_as_given("digits", digits())
    assert named[:3] == ["0", "1", "2"]
