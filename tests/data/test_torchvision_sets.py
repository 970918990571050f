"""No archive can be downloaded where these run: tiny files of the same format stand in, with their checksums waived."""

import csv
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torchvision
from PIL import Image

from lit_diffusion.data import CIFAR10, CIFAR100, MNIST, SVHN, CelebA, FashionMNIST, cache, data_root, fetch
from lit_diffusion.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture
def no_checksums(monkeypatch):
    for module in ("cifar", "svhn", "celeba"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: os.path.isfile(path)
        )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_cifar(folder, files, label_key, meta, names_key, count):
    folder.mkdir(parents=True)
    written = {}
    for name in files:
        images = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        labels = RNG.integers(0, count, 4).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": images.reshape(4, -1), label_key: labels}))
        written[name] = images, labels
    (folder / meta).write_bytes(pickle.dumps({names_key: [str(i) for i in range(count)]}))
    return written


@pytest.mark.usefixtures("no_checksums")
def test_cifar10(tmp_path):
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    written = write_cifar(tmp_path / "cifar-10-batches-py", files, "labels", "batches.meta", "label_names", 10)
    train, test = CIFAR10(root=tmp_path), CIFAR10(split="test", root=tmp_path)
    assert (len(train), train.shape, train.num_grey_levels, train.num_classes) == (20, (3, 32, 32), 256, 10)
    assert (train.name, test.name) == ("cifar10-train", "cifar10-test")
    assert train.class_names == [str(i) for i in range(10)]  # as its file of names says
    np.testing.assert_array_equal(train.value(5), written["data_batch_2"][0][1])
    assert train.label(5) == written["data_batch_2"][1][1]
    np.testing.assert_array_equal(test.value(3), written["test_batch"][0][3])
    assert pickle.loads(pickle.dumps(test)).fingerprint() == test.fingerprint() != train.fingerprint()


@pytest.mark.usefixtures("no_checksums")
def test_cifar100(tmp_path):
    files = ["train", "test"]
    written = write_cifar(tmp_path / "cifar-100-python", files, "fine_labels", "meta", "fine_label_names", 100)
    source = CIFAR100(split="test", root=tmp_path)
    assert (len(source), source.num_classes) == (4, 100)
    np.testing.assert_array_equal(source.value(1), written["test"][0][1])
    assert source.label(1) == written["test"][1][1]


def write_idx(path, array):
    """LeCun's format: two zero bytes, the type (8: bytes), the number of dimensions, each of them, the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.mark.parametrize("source_class", [MNIST, FashionMNIST])
def test_mnist(tmp_path, source_class):
    raw = tmp_path / source_class.__name__ / "raw"
    images = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for part, count in (("train", 7), ("t10k", 3)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[:count])
    train, test = source_class(root=tmp_path), source_class(split="test", root=tmp_path)
    assert (len(train), len(test), train.shape, train.num_classes) == (7, 3, (1, 28, 28), 10)
    np.testing.assert_array_equal(np.stack([train.value(i) for i in range(7)])[:, 0], images)
    assert [train.label(i) for i in range(7)] == list(range(7))

    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"^[^\n]*damaged[^\n]*fetch data [^\n]*$"):
        source_class(root=tmp_path)
    # torchvision downloads nothing over a file that is there: then the one line says to remove it.
    with pytest.raises(UserError, match=r"^[^\n]*removed[^\n]*$"):
        fetch(source_class.__name__, tmp_path)


@pytest.mark.usefixtures("no_checksums")
def test_svhn(tmp_path):
    from scipy.io import savemat

    images = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.array([[1], [2], [10], [9], [3]], np.uint8)})
    source = SVHN(split="test", root=tmp_path)
    assert (len(source), source.shape, source.num_classes) == (5, (3, 32, 32), 10)
    np.testing.assert_array_equal(source.value(4), images[..., 4].transpose(2, 0, 1))
    assert [source.label(i) for i in range(5)] == [1, 2, 0, 9, 3]


def write_celeba(folder):
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.png" for i in range(4)]
    faces = [RNG.integers(0, 256, (218, 178, 3), dtype=np.uint8) for _ in names]
    for name, face in zip(names, faces, strict=True):
        Image.fromarray(face).save(folder / "img_align_celeba" / name)

    def table(file, columns, header):
        text = io.StringIO()
        rows = csv.writer(text, delimiter=" ", lineterminator="\n")
        if header:
            text.write(f"{len(names)}\n" + " ".join(f"c{i}" for i in range(columns)) + "\n")
        for name in names:
            rows.writerow([name] + ["1"] * columns)
        (folder / file).write_text(text.getvalue())

    table("identity_CelebA.txt", 1, False)
    table("list_bbox_celeba.txt", 4, True)
    table("list_landmarks_align_celeba.txt", 10, True)
    table("list_attr_celeba.txt", 40, True)
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{n} {part}\n" for n, part in zip(names, "0022", strict=True))
    )
    return faces


@pytest.mark.usefixtures("no_checksums")
def test_celeba(tmp_path):
    faces = write_celeba(tmp_path / "celeba")
    source = CelebA(size=140, root=tmp_path)
    assert (len(source), source.shape, source.num_classes, source.label(0)) == (2, (3, 140, 140), None, None)
    np.testing.assert_array_equal(source.value(1), faces[1][39:179, 19:159].transpose(2, 0, 1))
    wide = CelebA(size=(70, 140), root=tmp_path)  # of the square
    assert (wide.shape, wide.notes()) == ((3, 70, 140), [])
    np.testing.assert_array_equal(wide.value(1), source.value(1)[:, 35:105])
    test = CelebA(size=64, split="test", root=tmp_path)
    assert (len(test), test.value(0).shape) == (2, (3, 64, 64))
    prints = {CelebA(size=64, crop=crop, root=tmp_path).fingerprint() for crop in (140, 178)}
    assert len({*prints, source.fingerprint(), test.fingerprint()}) == 4
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
    with pytest.raises(UserError, match="crop: 200"):
        CelebA(crop=200, root=tmp_path)
    (tmp_path / "celeba" / "img_align_celeba" / "000001.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^[^\n]*000001.png[^\n]*$"):
        source.value(1)


@pytest.mark.parametrize("source_class", [CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, CelebA])
def test_missing_data_are_named_with_the_command_that_fetches_them(tmp_path, monkeypatch, source_class):
    monkeypatch.setenv("LIT_DIFFUSION_DATA", str(tmp_path))
    name = source_class.__name__
    with pytest.raises(UserError) as caught:
        source_class()
    assert str(caught.value).endswith(f": run python -m lit_diffusion fetch data {name}")
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError) as caught:
        source_class(root=elsewhere)
    assert f"run LIT_DIFFUSION_DATA={elsewhere} python -m lit_diffusion fetch data {name}" in str(caught.value)


def test_fetch_asks_torchvision_for_every_part(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda root, **options: asked.append((root, options)))
    assert fetch("svhn", tmp_path / "new") == tmp_path / "new"
    assert asked == [(tmp_path / "new", {"download": True, "split": part}) for part in ("train", "test")]
    assert (tmp_path / "new").is_dir()


def test_fetch_says_in_one_line_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*'cifar11'[^\n]*CIFAR10[^\n]*$"):
        fetch("cifar11", tmp_path)
    with pytest.raises(UserError, match=r"^cannot fetch MNIST [^\n]*no network[^\n]*$"):
        fetch("MNIST", tmp_path)


def test_the_data_folder(monkeypatch, tmp_path):
    for variable in ("LIT_DIFFUSION_DATA", "LIT_DIFFUSION_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache" / "lit_diffusion" / "data"
    monkeypatch.setenv("LIT_DIFFUSION_DATA", "~/sets")
    assert data_root() == tmp_path / "sets"
    assert cache.fetch_command("MNIST", tmp_path / "sets") == "python -m lit_diffusion fetch data MNIST"
