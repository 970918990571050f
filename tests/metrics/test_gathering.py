"""States survive inference mode in every order (field note M6), and no metric draws from the generators of training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.distributed import gather_rows, sum_over_ranks
from lit_diffusion.metrics import (
    FrechetDistance,
    FrechetInfinity,
    InceptionScore,
    KernelDistance,
    ManifoldMetrics,
    Memorisation,
    Neighbourhood,
    RealData,
    ScoreOptions,
    Scores,
    gaussian_of,
    load_extractor,
    reference_of,
)
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.metrics.mean import Mean


def rows(count, seed=0, dimension=3):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


REAL = rows(30)


def neighbourhood():
    return Neighbourhood(REAL, torch.device("cpu"))


MAKERS = {
    "frechet": lambda: FrechetDistance(gaussian_of(REAL)),
    "infinity": lambda: FrechetInfinity(gaussian_of(REAL)),
    "inception": lambda: InceptionScore(3),
    "kernel": lambda: KernelDistance(REAL, 2, 8),
    "manifolds": lambda: ManifoldMetrics(neighbourhood()),
    "memorisation": lambda: Memorisation(neighbourhood()),
    "mean": lambda: Mean(),
}


def update(metric, part):
    x, index = rows(40, 1)[part], torch.arange(40)[part]
    metric.update(x[:, 0]) if isinstance(metric, Mean) else metric.update(x, index)


def flat(value):
    return torch.cat([v.flatten() for v in value.values()]).tolist() if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "modes", [*itertools.product([False, True], repeat=5)], ids=lambda m: "".join("-i"[x] for x in m)
)
@pytest.mark.parametrize("name", MAKERS)
def test_inference_mode_may_come_and_go(name, modes):
    """Made, reset, updated twice and computed, each in or out of it."""
    expected = MAKERS[name]()
    update(expected, slice(0, 40))
    made, again, first, second, last = (torch.inference_mode(mode) for mode in modes)
    with made:
        metric = MAKERS[name]()
        update(metric, slice(3, 9))
    with again:
        metric.reset()
    with first:
        update(metric, slice(0, 15))
    with second:
        update(metric, slice(15, 40))
    with last:
        assert flat(metric.compute()) == pytest.approx(flat(expected.compute()), rel=1e-9)


@pytest.mark.parametrize("name", ["frechet", "mean"])
def test_a_state_moved_in_inference_mode_is_an_ordinary_tensor(name):
    metric = MAKERS[name]()
    with torch.inference_mode():
        metric.to("meta")
    assert metric.sums.device.type == "meta"
    assert not metric.sums.is_inference()


@pytest.mark.parametrize("name", ["frechet", "mean"])
def test_half_precision_is_for_others(name):
    assert MAKERS[name]().half().sums.dtype == torch.float64


def test_no_metric_touches_the_generators_of_training(tmp_path):
    extractor = load_extractor("digits", (1, 8, 8))
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    torch.manual_seed(5)
    np.random.seed(5)  # what others may use
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    reference = reference_of(RealData.of(InMemory(images), torch.arange(60), "all"), extractor, tmp_path)
    metrics = ("fid", "is", "kid", "precision", "recall", "density", "coverage", "memorisation")
    options = ScoreOptions(kid_subsets=3, kid_subset_size=20, manifold_samples=30, bootstrap=3)
    scores = Scores(metrics, extractor, reference, (1, 8, 8), options, pairs=2)
    scores.update(255 - images.transpose(0, 2, 3, 1), torch.arange(60))
    assert len(scores.compute(60).values) == 11
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


class Rows(RowsMetric):
    compute = RowsMetric.all_rows


def test_rows_come_in_the_order_of_their_numbers():
    metric = Rows()
    metric.update(torch.tensor([[3.0], [1.0]]), torch.tensor([30, 10]))
    metric.update(torch.tensor([[2.0]]), torch.tensor([20]))
    assert metric.all_rows().tolist() == [[1.0], [2.0], [3.0]]
    with pytest.raises(ValueError, match="2 rows for 1 samples"):
        metric.update(torch.zeros(2, 1), torch.tensor([1]))
    metric.update(torch.zeros(1, 1), torch.tensor([10]))
    with pytest.raises(ValueError, match="two samples have the same number"):
        metric.all_rows()


def test_alone_a_sum_is_a_copy_and_a_gather_the_rows():
    x = torch.ones(2, 2)
    total = sum_over_ranks(x)
    total += 1.0
    assert x.tolist() == [[1.0, 1.0]] * 2
    assert torch.equal(gather_rows(x), x)
