"""Of the same images and weights, our figures are torch-fidelity's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.toy_images import smooth_images
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.metrics import RealData, ScoreOptions, Scores, load_extractor, reference_of


class AsBytes(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(self.images[index].transpose(2, 0, 1).copy())


def theirs(samples, real, weights, options):
    return calculate_metrics(
        input1=AsBytes(samples),
        input2=AsBytes(real),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc_splits=options.is_splits,
        kid_subsets=options.kid_subsets,
        kid_subset_size=options.kid_subset_size,
        prc_neighborhood=options.precision_neighbours,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )


def ours(samples, real, weights, options, folder, batch=64):
    extractor = load_extractor("inception", (3, 32, 32), weights)
    source = InMemory(np.ascontiguousarray(real.transpose(0, 3, 1, 2)), name="smooth")
    reference = reference_of(RealData.of(source, torch.arange(len(real)), "all"), extractor, folder)
    scores = Scores(("fid", "is", "kid", "precision", "recall"), extractor, reference, (3, 32, 32), options)
    for index in torch.arange(len(samples)).split(batch):
        scores.update(samples[index.numpy()], index)
    return scores.compute(len(samples))


def assert_alike(count, weights, options, folder):
    samples, real = smooth_images(count, 1, 3), smooth_images(count, 2, 5)
    expected = theirs(samples, real, weights, options)
    result = ours(samples, real, weights, options, folder)
    name = f"{count // 1000}k" if count >= 1000 else count
    found = {key.split("-")[0].split("/")[0]: value for key, value in result.values.items()}
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["precision"] == pytest.approx(expected["precision"], rel=1e-4)
    assert found["recall"] == pytest.approx(expected["recall"], rel=1e-4)
    assert math.log(found["is"]) == pytest.approx(math.log(expected["inception_score_mean"]), rel=1e-3)
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert result.errors[f"is-{name}"] == pytest.approx(expected["inception_score_std"], rel=1e-2)
    assert result.errors[f"kid-{name}"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-2)
    # Not void: the sets differ, and so do the images within a set.
    assert found["fid"] > 10.0
    assert found["kid"] > 0.02
    assert found["is"] > 1.05
    assert 0.02 < min(found["precision"], found["recall"]) < 0.98


def test_a_few_images_in_full_size(inception_file, tmp_path):
    assert_alike(
        12,
        inception_file,
        ScoreOptions(is_splits=3, kid_subsets=5, kid_subset_size=8, precision_neighbours=1),
        tmp_path,
    )


@pytest.mark.slow
def test_two_thousand_images(inception_file, tmp_path, monkeypatch):
    """Both enlarge the images to 107 instead of 299, which takes 3 minutes instead of 25."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    assert_alike(2000, inception_file, ScoreOptions(), tmp_path)
