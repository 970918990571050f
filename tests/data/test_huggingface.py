import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from lit_diffusion.data import HuggingFace, fetch
from lit_diffusion.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["a", "b", "c"]),
        number=datasets.Value("int64"),
        text=datasets.Value("string"),
    )
    columns = {
        "image": [Image.fromarray(image) for image in IMAGES],
        "label": [0, 1, 0, 1, 0],
        "number": [0, 1, 2, 3, -1],
        "text": [f"picture {i}" for i in range(5)],
    }
    data = datasets.Dataset.from_dict(columns, features=features)
    root = tmp_path_factory.mktemp("hf")
    datasets.DatasetDict(train=data, test=data.select([3])).save_to_disk(root / "both")
    data.save_to_disk(root / "one")
    return root


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        HuggingFace(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_labels(saved):
    source = HuggingFace(saved / "both", size=8, label_key="label")
    assert (source.name, len(source), source.shape, source.num_classes) == ("both", 5, (3, 8, 8), 3)
    np.testing.assert_array_equal(np.stack([source.value(i) for i in range(5)]), IMAGES.transpose(0, 3, 1, 2))
    assert [source.label(i) for i in range(5)] == [0, 1, 0, 1, 0]
    assert source.class_names == ["a", "b", "c"]
    test = HuggingFace(saved / "both", size=4, split="test", channels=1)
    assert (len(test), test.value(0).shape, test.label(0)) == (1, (1, 4, 4), None)
    assert len(HuggingFace(str(saved / "one"), size=8)) == 5


def test_rectangles_are_cut_out_of_the_middle_and_this_is_said(saved):
    source = HuggingFace(saved / "both", size=(4, 8))
    assert source.shape == (3, 4, 8)
    np.testing.assert_array_equal(source.value(1), IMAGES[1, 2:6].transpose(2, 0, 1))
    assert source.notes() == [f"{saved / 'both'}: 5 of 5 images are cut to the middle that has the sides of 4 x 8"]
    assert HuggingFace(saved / "both", size=8).notes() == []


def test_it_can_be_pickled_and_has_a_stable_fingerprint(saved):
    source = HuggingFace(saved / "both", size=8)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.value(4), source.value(4))
    same = HuggingFace(saved / "both", size=8)
    assert copy.fingerprint() == source.fingerprint() == same.fingerprint()
    others = [
        HuggingFace(saved / "both", size=8, split="test"),
        HuggingFace(saved / "both", size=4),
        HuggingFace(saved / "both", size=8, label_key="label"),
    ]
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_wrong_keys_are_named(saved):
    both = saved / "both"
    assert "'picture'" in message(both, size=8, image_key="picture")
    assert "'validation'" in message(both, size=8, split="validation")
    assert "'number' of" in (line := message(both, size=8, label_key="number"))
    assert "holds -1, first of image 4" in line
    assert "label_key" in message(both, size=8, label_key="text")
    assert "image_key" in message(both, size=8, image_key="text")
    assert str(saved) in message(saved, size=8)


def test_missing_data_are_named_with_the_command_that_fetches_them(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DIFFUSION_DATA", str(tmp_path))
    assert message("owner/name", size=8).endswith("run python -m lit_diffusion fetch data owner/name")


def test_fetched_data_are_found_by_name(saved, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("LIT_DIFFUSION_DATA", str(tmp_path))
    asked = []

    def load_dataset(path):
        asked.append(path)
        return datasets.load_from_disk(saved / "both")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fetch("owner/name")
    fetch("owner/name")
    assert asked == ["owner/name"]
    np.testing.assert_array_equal(HuggingFace("owner/name", size=8).value(0), IMAGES[0].transpose(2, 0, 1))

    def fail(path):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^cannot fetch owner/other [^\n]*$"):
        fetch("owner/other")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "lit-diffusion[hf]" in message("owner/name", size=8)
