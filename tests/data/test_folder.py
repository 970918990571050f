import json
import os
import pickle
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_diffusion.data import ImageFolder, Npz
from lit_diffusion.data.as_given import images_as_given
from lit_diffusion.errors import UserError

RNG = np.random.default_rng(0)


def random_image(height=8, width=8, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path)


def zipped(folder: Path) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder).as_posix())
    return file


def values(source):
    return np.stack([source.value(i) for i in range(len(source))])


def message(function) -> str:
    with pytest.raises(UserError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("channels", [1, 3])
def test_fifty_images_are_the_same_bytes_by_every_way(tmp_path, channels):
    images = np.stack([random_image(channels=channels) for _ in range(50)])
    expected = images[:, None] if channels == 1 else images.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "images.npz", images)
    for i, image in enumerate(images):
        write(tmp_path / "png" / f"{i:03d}.png", image)
    folder = ImageFolder(tmp_path / "png", size=8, channels=channels)
    archive = ImageFolder(zipped(tmp_path / "png"), size=8, channels=channels)
    for source in (folder, archive, Npz(tmp_path / "images.npz")):
        got = values(source)
        assert got.dtype == np.uint8
        assert source.shape == (channels, 8, 8)
        assert source.num_grey_levels == 256
        np.testing.assert_array_equal(got, expected)


def test_order_is_by_name_and_nested_files_are_found_but_not_hidden_ones(tmp_path):
    names = ["b/z.png", "a/deep/er/x.PNG", "c.jpeg", "a/y.webp"]
    for name in [*names, ".hidden/h.png", "__MACOSX/m.png", "b/._z.png"]:
        write(tmp_path / "set" / name, random_image())
    (tmp_path / "set" / "notes.txt").write_text("no image")
    for path in (tmp_path / "set", zipped(tmp_path / "set")):
        source = ImageFolder(path, size=8)
        assert source._names == sorted(names)


def test_classes_are_the_first_level_folders(tmp_path):
    for name in ("dog/1.png", "cat/deep/1.png", "cat/0.png"):
        write(tmp_path / "pets" / name, random_image())
    for path in (tmp_path / "pets", zipped(tmp_path / "pets")):
        source = ImageFolder(path, size=8, classes=True)
        assert source.class_names == ["cat", "dog"]
        assert source.num_classes == 2
        assert [source.label(i) for i in range(3)] == [0, 0, 1]
    plain = ImageFolder(tmp_path / "pets", size=8)
    assert plain.num_classes is None
    assert plain.label(0) is None

    assert "'pets'" in message(lambda: ImageFolder(tmp_path, size=8, classes=True))  # one level too high

    write(tmp_path / "pets" / "stray.png", random_image())
    text = message(lambda: ImageFolder(tmp_path / "pets", size=8, classes=True))
    assert "stray.png" in text
    assert "classes: false" in text


def sharded(folder: Path, labels: object = None, **more) -> Path:
    """Four images in two shards as EDM's ``dataset_tool.py`` lays them out, with its labels unless they are None."""
    for k in range(4):
        write(folder / f"{k // 2:05d}" / f"img{k:08d}.png", random_image())
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
    return folder


def named(labels) -> list:
    return [[f"{k // 2:05d}/img{k:08d}.png", label] for k, label in enumerate(labels)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("labels", "count"), [([2, 0, 2, 1], 3), ([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], 3)]
)
def test_classes_are_the_labels_of_dataset_json(tmp_path, packed, labels, count):
    path = sharded(tmp_path / "edm", [*named(labels), ["00009/gone.png", labels[0]]])
    source = ImageFolder(zipped(path) if packed else path, size=8, classes=True)
    assert [source.label(i) for i in range(4)] == [2, 0, 2, 1]
    assert (source.num_classes, source.class_names) == (count, [])
    assert ImageFolder(path, size=8).label(0) is None
    source = pickle.loads(pickle.dumps(source))
    changed = sharded(tmp_path / "edm", named([0, 0, 0, 1]))
    assert ImageFolder(changed, size=8, classes=True).fingerprint() != source.fingerprint()
    assert ImageFolder(changed, size=8).fingerprint() == ImageFolder(path, size=8).fingerprint()


def test_classes_of_dataset_json_may_have_names_and_the_folders_may_be_taken_all_the_same(tmp_path):
    path = sharded(tmp_path / "edm", named([0, 1, 1, 0]), class_names=["cat", "dog", "frog"])
    source = ImageFolder(path, size=8, classes=True)
    assert (source.class_names, source.num_classes, source.label(1)) == (["cat", "dog", "frog"], 3, 1)
    folders = ImageFolder(path, size=8, classes="folders")
    assert (folders.class_names, folders.label(1), folders.label(2)) == (["00000", "00001"], 0, 1)


@pytest.mark.parametrize("labels", [None, "null"])
@pytest.mark.parametrize("names", [["00000"], ["00000", "01000"], ["00", "01", "10"]])
def test_numbered_folders_without_labels_are_asked_about(tmp_path, labels, names):
    for name in names:
        write(tmp_path / "set" / name / "1.png", random_image())
    if labels is not None:
        (tmp_path / "set" / "dataset.json").write_text('{"labels": null}')
    text = message(lambda: ImageFolder(tmp_path / "set", size=8, classes=True))
    assert f"numbered ({', '.join(names)}) as shards are" in text
    assert "classes: folders" in text
    assert ImageFolder(tmp_path / "set", size=8, classes="folders").class_names == names


@pytest.mark.parametrize("names", [["0", "1", "10"], ["00000", "cat"], ["cat", "dog"]])
def test_other_folders_are_classes_where_dataset_json_has_no_labels(tmp_path, names):
    for name in names:
        write(tmp_path / name / "1.png", random_image())
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert ImageFolder(tmp_path, size=8, classes=True).class_names == names


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (named([0, 1, 0]), "no label for 1 of the 4 images, the first is 00001/img00000003.png"),
        ([["img00000000.png", 0]], "no label for 4 of the 4 images"),
        (named([0, 1, -1, 0]), "the label of 00001/img00000002.png is -1"),
        (named([0, 1, 0.5, 0]), "is 0.5: a class is an integer from 0"),
        (named([0, 1, True, 0]), "is True"),
        (named([0, 1, None, 0]), "is None"),
        (named([[0, 1], [1, 0], [0.5, 0.5], [0, 0]]), "00001/img00000002.png is [0.5, 0.5]"),
        (named([[0, 1], [1, 0], [0, 0, 1], [1, 0]]), "has 3 numbers, others 2"),
        ([*named([0, 1, 0, 1]), ["00000/img00000000.png", 1]], "has the labels 0 and 1"),
        ([["a.png"]], 'is not {"labels"'),
        (7, 'is not {"labels"'),
    ],
)
def test_a_dataset_json_that_says_no_classes_is_refused(tmp_path, labels, said):
    text = message(lambda: ImageFolder(sharded(tmp_path / "edm", labels), size=8, classes=True))
    assert said in text
    assert "dataset.json of" in text


def test_a_dataset_json_that_is_none_is_refused(tmp_path):
    path = sharded(tmp_path / "edm")
    for content in ('{"labels": ', "[]", "{}", "\x00"):
        (path / "dataset.json").write_text(content)
        assert "dataset.json of" in message(lambda: ImageFolder(path, size=8, classes=True))
    assert len(ImageFolder(path, size=8)) == 4  # Nobody asked for classes.


def test_the_middle_of_a_picture_that_is_not_square(tmp_path):
    wide = random_image(8, 13)
    tall = random_image(12, 8)
    write(tmp_path / "0.png", wide)
    write(tmp_path / "1.png", tall)
    source = ImageFolder(tmp_path, size=8)
    np.testing.assert_array_equal(source.value(0), wide[:, 2:10].transpose(2, 0, 1))
    np.testing.assert_array_equal(source.value(1), tall[2:10].transpose(2, 0, 1))


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    write(tmp_path / "0.png", stripes)
    # Without a filter the stripes would alias to black or white.
    small = ImageFolder(tmp_path, size=8, channels=1).value(0)
    assert small.shape == (1, 8, 8)
    assert np.abs(small.astype(int) - 127).max() < 12


def test_every_kind_of_picture_becomes_rgb_and_grey(tmp_path):
    grey, color = random_image(channels=1), random_image()
    alpha = random_image(channels=1)
    alpha[0, :3] = (0, 255, 128)
    write(tmp_path / "a_grey.png", grey)
    write(tmp_path / "b_rgb.png", color)
    write(tmp_path / "c_rgba.png", np.dstack([color, alpha]))
    write(tmp_path / "d_16bit.png", (grey.astype(np.uint16) << 8) + 77)
    write(tmp_path / "e_bilevel.png", Image.fromarray(grey > 127))
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    write(tmp_path / "f_palette.png", palette)
    palette.save(tmp_path / "g_palette_hole.png", transparency=5)
    write(tmp_path / "h_cmyk.tiff", Image.fromarray(color).convert("CMYK"))
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    write(tmp_path / "i_grey_alpha.png", grey_alpha)
    write(tmp_path / "j_16bit.tiff", (grey.astype(np.uint16) << 8) + 77)
    write(tmp_path / "k_16bit.pgm", (grey.astype(np.uint16) << 8) + 77)

    rgb = dict(zip("abcdefghijk", values(ImageFolder(tmp_path, size=8)), strict=True))
    one = dict(zip("abcdefghijk", values(ImageFolder(tmp_path, size=8, channels=1)), strict=True))
    as_rgb = np.repeat(grey[None], 3, axis=0)

    def over_white(x):
        return x * (alpha / 255.0) + 255.0 * (1.0 - alpha / 255.0)

    for name, kind in rgb.items():
        assert kind.shape == (3, 8, 8), name
        assert one[name].shape == (1, 8, 8), name
        luma = np.tensordot([0.299, 0.587, 0.114], kind.astype(float), 1)
        assert np.abs(one[name][0] - luma).max() <= 1.0, name
    np.testing.assert_array_equal(rgb["a"], as_rgb)
    np.testing.assert_array_equal(one["a"][0], grey)
    np.testing.assert_array_equal(rgb["b"], color.transpose(2, 0, 1))
    assert np.abs(rgb["c"] - over_white(color.transpose(2, 0, 1))).max() <= 1.0
    np.testing.assert_array_equal(rgb["c"][:, 0, 0], 255)
    np.testing.assert_array_equal(rgb["c"][:, 0, 1], color[0, 1])
    for name in "djk":
        np.testing.assert_array_equal(rgb[name], as_rgb, err_msg=name)
    np.testing.assert_array_equal(rgb["e"], np.where(as_rgb > 127, 255, 0))
    np.testing.assert_array_equal(rgb["f"], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    np.testing.assert_array_equal(rgb["g"].reshape(3, 64)[:, 5], 255)
    np.testing.assert_array_equal(rgb["g"].reshape(3, 64)[:, 6:], rgb["f"].reshape(3, 64)[:, 6:])
    np.testing.assert_array_equal(rgb["h"], color.transpose(2, 0, 1))
    assert np.abs(one["i"][0] - over_white(grey)).max() <= 1.0


def test_a_photograph_is_turned_upright(tmp_path):
    image = random_image()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 270 degrees
    Image.fromarray(image).save(tmp_path / "0.png", exif=exif)
    upright = np.rot90(image, k=-1).transpose(2, 0, 1)
    np.testing.assert_array_equal(ImageFolder(tmp_path, size=8).value(0), upright)


def test_values_without_an_agreed_range_are_refused(tmp_path):
    write(tmp_path / "0.tiff", RNG.random((8, 8), dtype=np.float32))
    write(tmp_path / "1.tiff", RNG.integers(0, 1 << 20, (8, 8), dtype=np.int32))
    source = ImageFolder(tmp_path, size=8)
    assert "float" in message(lambda: source.value(0))
    assert "32-bit" in message(lambda: source.value(1))


@pytest.fixture(params=["folder", "zip"])
def damaged(tmp_path, request):
    """Six files, of which three are damaged in three ways."""
    folder = tmp_path / "set"
    for i in range(6):
        write(folder / "x" / f"{i}.png", random_image(16, 16))
    whole = (folder / "x" / "1.png").read_bytes()
    (folder / "x" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "x" / "3.png").write_bytes(b"")
    (folder / "x" / "4.png").write_bytes(b"<html>not found</html>")
    return folder if request.param == "folder" else zipped(folder)


def test_a_corrupt_file_fails_with_its_name(damaged):
    source = ImageFolder(damaged, size=16)
    assert len(source) == 6
    source.value(0)
    for i in (1, 3, 4):
        text = message(lambda i=i: source.value(i))
        assert f"x/{i}.png" in text
        assert str(damaged) in text
        assert "on_corrupt: skip" in text
        assert "0x" not in text


def test_corrupt_files_are_skipped_with_one_warning(damaged):
    with pytest.warns(UserWarning, match="skipped 3 of 6") as caught:
        source = ImageFolder(damaged, size=16, on_corrupt="skip")
    assert len(caught) == 1
    assert "x/1.png, x/3.png, x/4.png" in str(caught[0].message)
    assert source._names == ["x/0.png", "x/2.png", "x/5.png"]
    values(source)


def test_whole_files_are_not_warned_about(tmp_path):
    write(tmp_path / "0.png", random_image())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = ImageFolder(tmp_path, size=8, on_corrupt="skip")
    assert len(source) == 1


def test_a_member_of_a_zip_file_whose_checksum_is_wrong(tmp_path):
    write(tmp_path / "set" / "0.bmp", random_image())
    file = zipped(tmp_path / "set")
    data = bytearray(file.read_bytes())
    data[data.index(b"BM") + 60] ^= 1
    file.write_bytes(data)
    assert "0.bmp" in message(lambda: ImageFolder(file, size=8).value(0))


def test_links_lead_to_each_file_once(tmp_path):
    pool = tmp_path / "pool"
    for name in ("set/b/0.png", "set/b/1.png", "pool/2.png", "pool/deep/3.png", "pool/4.png", "elsewhere/no.png"):
        write(tmp_path / name, random_image())
    folder = tmp_path / "set"
    before = ImageFolder(folder, size=8)._names
    (folder / "up").symlink_to("..")  # holds the folder itself, and what is not meant
    (folder / "b" / "round").symlink_to(folder)
    (folder / "a").symlink_to("b")
    (folder / "0.png").symlink_to("b/0.png")
    assert before == ImageFolder(folder, size=8)._names == ["b/0.png", "b/1.png"]  # their own names, not a link's

    (folder / "z").symlink_to(pool)
    (folder / "y").symlink_to(pool / "deep")
    (folder / "c").symlink_to(pool)
    (pool / "back").symlink_to(tmp_path)
    (folder / "linked.png").symlink_to(pool / "4.png")
    source = ImageFolder(folder, size=8)
    # The first link to each, in the order of their names: linked.png comes after c.
    assert source._names == ["b/0.png", "b/1.png", "c/2.png", "c/4.png", "c/deep/3.png"]
    np.testing.assert_array_equal(values(source), values(images_as_given(folder)))


def test_a_store_of_hidden_files_is_found_by_its_links(tmp_path):
    write(tmp_path / ".store" / "abc.png", random_image())
    (tmp_path / "0.png").symlink_to(".store/abc.png")
    assert ImageFolder(tmp_path, size=8)._names == ["0.png"]


def test_broken_links_are_corrupt_files(tmp_path):
    write(tmp_path / "0.png", random_image())
    (tmp_path / "1.png").symlink_to("gone.png")
    (tmp_path / "2.png").symlink_to("2.png")
    source = ImageFolder(tmp_path, size=8)
    assert "1.png in" in message(lambda: source.value(1))
    assert "a link to gone.png, which is not there" in message(lambda: source.value(1))
    assert "on_corrupt: skip" in message(lambda: source.value(1))
    assert "1.png in" in message(lambda: images_as_given(tmp_path).value(1))
    assert len(source.fingerprint()) == 16
    with pytest.warns(UserWarning, match="skipped 2 of 3"):
        assert ImageFolder(tmp_path, size=8, on_corrupt="skip")._names == ["0.png"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a" / "0.png", random_image())
    write(tmp_path / "b" / "0.png", random_image())
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "b, below" in message(lambda: ImageFolder(tmp_path, size=8))


def test_a_pipe_is_no_image(tmp_path):
    write(tmp_path / "0.png", random_image())
    os.mkfifo(tmp_path / "1.png")
    source = ImageFolder(tmp_path, size=8)
    values(source)
    assert source._names == ["0.png"]


def test_a_name_twice_in_a_zip_file_is_one_image(tmp_path):
    first, second = random_image(), random_image()
    for number, image in enumerate((first, second)):
        write(tmp_path / f"{number}.png", image)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the name
        for number in range(2):
            archive.write(tmp_path / f"{number}.png", "same.png")
    [value] = values(ImageFolder(tmp_path / "set.zip", size=8))
    np.testing.assert_array_equal(value, second.transpose(2, 0, 1))  # as unpacking leaves it


def test_accents_are_one_letter_or_two(tmp_path):
    """macOS spells names otherwise than Linux: the same order, and the same classes."""
    orders = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        for name in ("\u00e9t\u00e9/0.PNG", "etf/1.png", "ez/2.Png"):
            write(folder / unicodedata.normalize(form, name), random_image())
        source = ImageFolder(folder, size=8, classes=True)
        orders.append(([unicodedata.normalize("NFC", name) for name in source._names], source.class_names))
    assert orders[0] == orders[1]
    assert orders[0][1][-1] == "\u00e9t\u00e9"


def test_only_corrupt_files(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    text = message(lambda: ImageFolder(tmp_path, size=8, on_corrupt="skip"))
    assert "0.png" in text
    assert str(tmp_path) in text


def test_a_file_that_vanished_is_not_called_corrupt(tmp_path):
    write(tmp_path / "0.png", random_image())
    source = ImageFolder(tmp_path, size=8)
    (tmp_path / "0.png").unlink()
    text = message(lambda: source.value(0))
    assert "cannot read 0.png" in text


def test_paths_that_are_no_set_of_images(tmp_path):
    assert "nowhere" in message(lambda: ImageFolder(tmp_path / "nowhere", size=8))
    (tmp_path / "empty").mkdir()
    text = message(lambda: ImageFolder(tmp_path / "empty", size=8))
    assert "empty" in text
    assert ".png" in text
    (tmp_path / "set.zip").write_bytes(b"PK no")
    assert "set.zip" in message(lambda: ImageFolder(tmp_path / "set.zip", size=8))
    write(tmp_path / "set" / "0.png", random_image())
    assert "size: 0" in message(lambda: ImageFolder(tmp_path / "set", size=0))


class Batches(torch.utils.data.Dataset):
    """What the DataModule does with a source, in short."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return torch.from_numpy(self.source.value(index)), self.source.label(index)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])  # each spawned one imports torch again
def test_a_zip_file_is_read_by_workers(tmp_path, start, workers):
    for i in range(80):
        write(tmp_path / "set" / f"class{i % 2}" / f"{i:02d}.png", random_image(64, 64))
    source = ImageFolder(zipped(tmp_path / "set"), size=64, classes=True)
    expected = values(source)  # opens the file here, before the workers inherit it
    loader = DataLoader(Batches(source), batch_size=4, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    np.testing.assert_array_equal(torch.cat([x for x, _ in batches]).numpy(), expected)
    assert torch.cat([y for _, y in batches]).tolist() == [0] * 40 + [1] * 40


def test_fingerprint_follows_content_and_options(tmp_path):
    folder = tmp_path / "set"
    for i in range(3):
        write(folder / "xyz"[i] / f"{i}.png", random_image())
    file = zipped(folder)
    for path in (folder, file):
        first = ImageFolder(path, size=8).fingerprint()
        assert ImageFolder(path, size=8).fingerprint() == first
        assert pickle.loads(pickle.dumps(ImageFolder(path, size=8))).fingerprint() == first
        others = [
            ImageFolder(path, size=4).fingerprint(),
            ImageFolder(path, size=8, channels=1).fingerprint(),
            ImageFolder(path, size=8, classes=True).fingerprint(),
        ]
        assert len({first, *others}) == 4
    before = ImageFolder(folder, size=8).fingerprint(), ImageFolder(file, size=8).fingerprint()
    # The copy of a zip file is the same data; another pixel in one image is not.
    copy = tmp_path / "copy.zip"
    copy.write_bytes(file.read_bytes())
    assert ImageFolder(copy, size=8).fingerprint() == before[1]
    write(folder / "y" / "1.png", random_image())
    assert ImageFolder(folder, size=8).fingerprint() != before[0]
    assert ImageFolder(zipped(folder), size=8).fingerprint() != before[1]
