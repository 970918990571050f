from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchmetrics
from torch_fidelity.metric_isc import isc_features_to_metric

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import InceptionScore
from lit_diffusion.metrics.inception_score import inception_score, scores_of_parts


def logits(count=100, classes=7, scale=2.0, seed=0):
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def score(x, splits=10, **keys):
    metric = InceptionScore(splits, **keys)
    metric.update(x, torch.arange(len(x)))
    return metric.compute()


@pytest.mark.parametrize("sharpness", [50.0, 2000.0])
def test_certain_and_even_it_is_the_number_of_classes(sharpness):
    assert inception_score(sharpness * torch.eye(8).repeat(5, 1)) == pytest.approx(8.0)


def test_undecided_or_of_one_class_it_is_1():
    assert inception_score(torch.zeros(30, 8)) == pytest.approx(1.0)
    assert inception_score(logits(1).expand(30, -1)) == pytest.approx(1.0)
    assert inception_score(torch.tensor([[2000.0, 0.0]]).expand(30, -1)) == pytest.approx(1.0)


def test_of_two_images_it_is_the_formula():
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    q = p.mean(0)
    expected = math.exp((p * np.log(p / q)).sum(1).mean())
    assert inception_score(torch.tensor(p).log() + 3.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "splits", "seed"), [(100, 10, 2020), (97, 10, 2020), (50, 3, 1), (12, 12, 5)])
def test_it_is_torch_fidelitys(count, splits, seed):
    expected = isc_features_to_metric(logits(count), splits, True, seed)
    mean, deviation = score(logits(count), splits, seed=seed)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)


def test_in_one_part_it_is_torchmetrics():
    theirs = torchmetrics.image.InceptionScore(feature=torch.nn.Identity(), splits=1)
    theirs.update(logits())
    assert score(logits(), 1)[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_images_in_the_order_of_their_classes_score_like_others():
    mean, _ = score(50.0 * torch.eye(5).repeat_interleave(100, 0), splits=5)
    assert mean > 4.8  # Unshuffled: 1.


def test_parts_are_consecutive_and_differ_by_one_at_most():
    x = logits(11)
    expected = [inception_score(part) for part in (x[:3], x[3:7], x[7:])]
    assert scores_of_parts(x, 3) == pytest.approx(expected, rel=1e-12)


def test_fewer_samples_than_parts_are_refused():
    with pytest.raises(UserError, match="10 parts needs as many samples, there are 9"):
        score(logits(9))
    with pytest.raises(UserError, match="there are 0"):
        InceptionScore().compute()
