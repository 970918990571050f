"""Statistics of real data: of every datum once, kept under a name that says what they are of."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.tiny import digits

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.metrics import RealData, gaussian_of, load_extractor, reference, reference_of
from lit_diffusion.metrics.reference import reference_of_moments


def source_of(count=40, seed=0, **keys):
    values = np.random.default_rng(seed).integers(0, 17, (count, 1, 8, 8), dtype=np.uint8)
    return InMemory(values, num_grey_levels=17, **keys)


def real(source=None, count=40, split="train"):
    return RealData.of(source_of() if source is None else source, torch.arange(count), split)


def extractor():
    return load_extractor("digits", (1, 8, 8))


class Counting:
    """How many data an extractor has seen."""

    def __init__(self, extractor):
        self.extractor, self.seen = extractor, 0

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def __call__(self, data):
        self.seen += len(data)
        return self.extractor(data)


def equal(first, second):
    return (
        torch.equal(first.features, second.features)
        and torch.equal(first.gaussian.mean, second.gaussian.mean)
        and torch.equal(first.gaussian.covariance, second.gaussian.covariance)
        and torch.equal(first.positions, second.positions)
        and (first.gaussian.count, first.record, first.key) == (second.gaussian.count, second.record, second.key)
    )


def test_it_is_of_the_data_as_they_are(tmp_path):
    data = real(count=30)
    levels = np.stack([source_of().value(k) for k in range(30)]).transpose(0, 2, 3, 1)
    bytes_ = np.round(levels * 255.0 / 16.0).astype(np.uint8)
    np.testing.assert_array_equal(data.values(torch.arange(30)), bytes_)
    found = reference_of(data, extractor(), tmp_path)
    expected = extractor()(bytes_).features
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert (found.gaussian.count, found.positions.tolist()) == (30, list(range(30)))
    torch.testing.assert_close(found.gaussian.covariance, gaussian_of(expected).covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [249, 250, 251, 500])
def test_every_datum_counts_once_whatever_the_batches(count, tmp_path):
    source = InMemory(np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32), num_grey_levels=None)
    found = reference_of(RealData.of(source, torch.arange(count), "all"), load_extractor("points", (2,)), tmp_path)
    x = torch.from_numpy(np.stack([source.value(k) for k in range(count)]))
    assert found.gaussian.count == count
    assert torch.equal(found.features, x)
    torch.testing.assert_close(found.gaussian.covariance, x.double().T.cov())


def test_of_many_data_some_keep_their_features_and_all_count(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "MOST_FEATURES", 25)
    monkeypatch.setattr(reference, "BATCH", 16)
    found = reference_of(real(), extractor(), tmp_path)
    assert found.gaussian.count == 40
    assert tuple(found.features.shape) == (25, 64)
    assert found.positions.tolist() == sorted(set(found.positions.tolist()))
    everything = extractor()(real().values(torch.arange(40))).features
    torch.testing.assert_close(found.features, everything[found.positions], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.gaussian.mean, everything.double().mean(0), rtol=1e-4, atol=1e-5)


def test_the_second_time_nothing_is_computed(tmp_path):
    counting = Counting(extractor())
    first = reference_of(real(), counting, tmp_path)
    seen = counting.seen
    second = reference_of(real(), counting, tmp_path)
    assert counting.seen == seen == 40
    assert equal(first, second)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{first.key}.npz"
    with np.load(path, allow_pickle=False) as archive:
        assert {archive[name].dtype.kind for name in archive.files} == {"f", "i", "U"}


class Named:
    """An extractor that says something else of itself."""

    def __init__(self, extractor, /, **keys):
        self.extractor, self.keys = extractor, keys

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def __call__(self, data):
        return self.extractor(data)

    def protocol(self, shape):
        return {**self.extractor.protocol(shape), **self.keys}


CHANGES = {
    "data": lambda: (real(source_of(seed=1)), extractor()),
    "name": lambda: (real(source_of(name="other")), extractor()),
    "split": lambda: (real(split="held_out"), extractor()),
    "choice": lambda: (RealData.of(source_of(), torch.arange(40).flip(0), "train"), extractor()),
    "fewer": lambda: (real(count=39), extractor()),
    "levels": lambda: (real(InMemory(source_of()._values, num_grey_levels=18)), extractor()),
    "weights": lambda: (real(), Named(extractor(), extractor_sha256="other")),
    "extractor": lambda: (real(), Named(extractor(), extractor="other")),
    "resize": lambda: (real(), Named(extractor(), resize="bicubic")),
    "format": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_features_depend_on_makes_another_file(change, tmp_path, monkeypatch):
    first = reference_of(real(), extractor(), tmp_path)
    if change == "format":
        monkeypatch.setattr(reference, "CACHE_FORMAT", 2)
        second = reference_of(real(), extractor(), tmp_path)
    else:
        second = reference_of(*CHANGES[change](), tmp_path)
    assert first.key != second.key
    assert len(list(tmp_path.iterdir())) == 2


class Unread(InMemory):
    """A source on disk whose fingerprint is of its folder alone."""

    def fingerprint(self):
        return "same"


@pytest.mark.parametrize("change", ["size", "levels", "name"])
def test_the_same_folder_read_otherwise_makes_another_file(change, inception_file):
    inception = load_extractor("inception", (3, 8, 8), inception_file)
    keys = set()
    for other in (False, True):
        size = 9 if change == "size" and other else 8
        source = Unread(np.zeros((3, 3, size, size), np.uint8))
        source.num_grey_levels = 17 if change == "levels" and other else 256
        source.name = "b" if change == "name" and other else "a"
        data = RealData.of(source, torch.arange(3), "all")
        keys.add(reference.record_key(reference.reference_record(data, inception)))
    assert len(keys) == 2


@pytest.fixture
def small():
    source = InMemory(np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32), num_grey_levels=None)
    return RealData.of(source, torch.arange(9), "all"), load_extractor("points", (2,))


@pytest.mark.filterwarnings("ignore")
def test_no_damage_goes_unnoticed(small, tmp_path):
    """Any byte of the file changed, any length cut: computed again, or of no effect at all."""
    expected = reference_of(*small, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    found = {"damaged": 0, "of no effect": 0}

    def read(content):
        path.write_bytes(content)
        lines = []
        cached = reference._read(path, expected.record, lines.append)
        assert (cached is None) == (len(lines) == 1)
        assert cached is None or equal(cached, expected)
        assert all("damaged and are computed again" in line and "\n" not in line for line in lines)
        found["damaged" if cached is None else "of no effect"] += 1

    for position in range(len(whole)):
        read(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        if position % 7 == 0:
            read(whole[:position])
    assert found["damaged"] > 4 * found["of no effect"] > 0


def test_a_damaged_file_is_made_anew(small, tmp_path):
    expected = reference_of(*small, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    lines = []
    assert equal(reference_of(*small, tmp_path, say=lines.append), expected)
    assert len(lines) == 1
    assert path.read_bytes()[-200:] != b""
    assert equal(reference_of(*small, tmp_path, say=lines.append), expected)
    assert len(lines) == 1


def test_a_changed_number_in_a_sound_archive_is_noticed(small, tmp_path):
    expected = reference_of(*small, tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(path, **{**arrays, "mean": arrays["mean"] + 1e-12})
    lines = []
    assert equal(reference_of(*small, tmp_path, say=lines.append), expected)
    assert "its checksum does not fit its contents" in lines[0]


def test_statistics_under_a_false_name_are_not_taken(small, tmp_path):
    """A file that is whole, of other data."""
    first = reference_of(*small, tmp_path)
    other = RealData.of(InMemory(np.ones((9, 2), np.float32), num_grey_levels=None), torch.arange(9), "all")
    second = reference_of(other, small[1], tmp_path)
    (tmp_path / f"{second.key}.npz").rename(tmp_path / f"{first.key}.npz")
    lines = []
    assert equal(reference_of(*small, tmp_path, say=lines.append), first)
    assert len(lines) == 1


WRITER = """
import sys, pathlib, numpy as np, torch
from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.metrics import RealData, load_extractor, reference, reference_of
folder = pathlib.Path(sys.argv[1])
source = InMemory(np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32), num_grey_levels=None)
data, extractor = RealData.of(source, torch.arange(9), "all"), load_extractor("points", (2,))
for _ in range(60):
    found = reference_of(data, extractor, folder, say=sys.exit)
    reference._write(folder / f"{found.key}.npz", found)
"""


@pytest.mark.slow
def test_two_writers_at_once_leave_one_whole_file(small, tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    counting = Counting(small[1])
    reference_of(small[0], counting, tmp_path)
    assert counting.seen == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_one_datum_has_no_statistics(tmp_path):
    with pytest.raises(UserError, match="at least 2 samples, there are 1"):
        reference_of(real(count=1), extractor(), tmp_path)


def test_by_default_it_is_kept_in_the_projects_cache(small, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DIFFUSION_CACHE", str(tmp_path))
    found = reference_of(*small)
    assert (tmp_path / "references" / f"{found.key}.npz").is_file()


def test_a_reference_of_the_digits_says_what_it_is_of(tmp_path):
    found = reference_of(RealData.of(digits(), torch.arange(50), "train"), extractor(), tmp_path)
    assert found.record["split"] == "train"
    assert found.record["reference_source"] == digits().name
    assert found.record["fingerprint"] == digits().fingerprint()


# ---- moments of others --------------------------------------------------------------------------------------------


def test_published_moments_are_a_reference(tmp_path):
    np.savez(tmp_path / "cifar.npz", mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32))
    found = reference_of_moments(tmp_path / "cifar.npz", 3)
    assert found.gaussian.mean.tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(found.gaussian.covariance, torch.eye(3, dtype=torch.float64))
    assert (len(found.features), found.record["reference_source"]) == (0, "cifar")
    np.savez(tmp_path / "other.npz", mu=np.arange(3.0), sigma=2 * np.eye(3))
    assert reference_of_moments(tmp_path / "other.npz", 3).key != found.key


@pytest.mark.parametrize("kind", ["npy", "text", "empty", "no sigma", "pickled", "none"])
def test_a_file_without_moments_is_one_line(kind, tmp_path):
    path = tmp_path / "m.npz"
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind in ("text", "empty"):
        path.write_bytes(b"mu" * 50 if kind == "text" else b"")
    elif kind == "no sigma":
        np.savez(path, mu=np.zeros(3))
    elif kind == "pickled":
        np.savez(path, mu=np.array([{}, {}, {}], dtype=object), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"cannot read mu and sigma of .*m\.npz") as caught:
        reference_of_moments(path, 3)
    assert "\n" not in str(caught.value)


def test_moments_of_another_dimension_are_refused(tmp_path):
    np.savez(tmp_path / "m.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"mu \[3\] and sigma \[4, 4\].*3 dimensions"):
        reference_of_moments(tmp_path / "m.npz", 3)


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "file").touch()
    said = []
    found = reference_of(real(), extractor(), tmp_path / "file" / "folder", say=said.append)
    assert equal(found, reference_of(real(), extractor(), tmp_path))
    (line,) = said
    assert line.startswith("the reference statistics are not kept: cannot write")
    assert "\n" not in line
