import pickle

import numpy as np
import pytest

from lit_diffusion.data import Npz
from lit_diffusion.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        Npz(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_labels(tmp_path, save):
    save(tmp_path / "batch.npz", IMAGES, labels=np.array([0, 2, 1, 3, 3, 0]))
    source = Npz(tmp_path / "batch.npz", label_key="labels")
    assert (source.name, source.shape, source.num_grey_levels, source.num_classes, len(source)) == (
        "batch",
        (3, 5, 4),
        256,
        4,
        6,
    )
    np.testing.assert_array_equal(source.value(2), IMAGES[2].transpose(2, 0, 1))
    assert source.value(2).flags.c_contiguous
    assert source.label(3) == 3
    assert Npz(tmp_path / "batch.npz").num_classes is None


def test_classes_may_have_names(tmp_path):
    names = np.array(["cat", "dog", "frog", "bird"])
    np.savez(tmp_path / "a.npz", IMAGES, labels=np.array([0, 2, 1, 0, 1, 2]), class_names=names)
    source = Npz(tmp_path / "a.npz", label_key="labels")
    assert (source.class_names, source.num_classes) == (["cat", "dog", "frog", "bird"], 4)
    unlabelled = Npz(tmp_path / "a.npz")
    assert (unlabelled.class_names, unlabelled.num_classes) == (None, None)


def test_grey_images_with_and_without_a_channel(tmp_path):
    np.savez(tmp_path / "grey.npz", flat=IMAGES[..., 0], deep=IMAGES[..., :1])
    for key in ("flat", "deep"):
        source = Npz(tmp_path / "grey.npz", key=key)
        assert source.shape == (1, 5, 4)
        np.testing.assert_array_equal(source.value(1)[0], IMAGES[1, ..., 0])


def test_a_datum_is_a_copy(tmp_path):
    np.savez(tmp_path / "grey.npz", IMAGES[..., 0])
    source = Npz(tmp_path / "grey.npz")
    source.value(0)[:] = 0
    np.testing.assert_array_equal(source.value(0)[0], IMAGES[0, ..., 0])


def test_fingerprint_is_of_the_values(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES)
    np.savez_compressed(tmp_path / "b.npz", images=IMAGES)
    changed = IMAGES.copy()
    changed[-1, -1, -1, -1] ^= 1
    np.savez(tmp_path / "c.npz", changed)
    np.savez(tmp_path / "d.npz", IMAGES, y=np.zeros(6, int))
    a, b, c = Npz(tmp_path / "a.npz"), Npz(tmp_path / "b.npz", key="images"), Npz(tmp_path / "c.npz")
    d = Npz(tmp_path / "d.npz", label_key="y")
    assert a.fingerprint() == b.fingerprint()
    assert len({a.fingerprint(), c.fingerprint(), d.fingerprint()}) == 3
    copy = pickle.loads(pickle.dumps(a))
    assert copy.fingerprint() == a.fingerprint()
    np.testing.assert_array_equal(copy.value(0), a.value(0))


def test_what_is_no_set_of_images_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.npz"
    text = message(path)
    assert str(path) in text
    np.savez(path, IMAGES / 255.0, channels_first=IMAGES.transpose(0, 3, 1, 2), y=np.arange(5), objects=np.array([{}]))
    text = message(path)
    assert "float64" in text
    assert "arr_0" in text
    assert "round().astype(numpy.uint8)" in text
    assert "[6, 3, 5, 4]" in message(path, key="channels_first")
    text = message(path, key="nothing")
    assert "'nothing'" in text
    assert "'arr_0'" in text
    assert "objects" in message(path, key="objects")
    np.savez(path, IMAGES, short=np.arange(5), negative=np.arange(6) - 1, real=np.arange(6.0))
    for key in ("short", "negative", "real"):
        assert f"'{key}'" in message(path, label_key=key)
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in message(path)
    path.write_text("text")
    assert str(path) in message(path)
    np.save(tmp_path / "single.npy", IMAGES)
    assert "numpy.savez" in message(tmp_path / "single.npy")
    np.savez(path, IMAGES[:0])
    assert "[0, 5, 4, 3]" in message(path)
