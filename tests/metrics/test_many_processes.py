"""Several processes with unequal shares, one of them empty, find the figures of one.

Two and three processes that import this file make up groups of gloo processes that run every case.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.forked import group

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.metrics import (
    CLIPScore,
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

COUNT = 60
SHARES = {"uneven": (0.7, 0.3, 0.0), "empty first": (0.0, 1.0, 0.0), "empty last": (1.0, 0.0, 0.0)}
CASES = [*SHARES, "inference mode"]


def rows(count, seed, dimension=4):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def share(case, rank, world_size):
    """Numbers of this process's samples, and how many it takes in at once."""
    numbers = torch.from_numpy(np.random.default_rng(0).permutation(COUNT))
    if world_size == 1:
        return numbers.split(COUNT)
    weights = SHARES.get(case, (0.7, 0.3, 0.0))
    ends = [round(COUNT * sum(weights[:k])) for k in range(3)] + [COUNT]
    mine = numbers[ends[rank] : ends[rank + 1]]
    return mine.split(7 + 20 * rank) if len(mine) else ()


def plain(value):
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def every_metric(case, rank, world_size):
    x, real = rows(COUNT, 1) + 0.3, rows(50, 2)
    near = Neighbourhood(real, torch.device("cpu"))
    metrics = {
        "frechet": FrechetDistance(gaussian_of(real)),
        "infinity": FrechetInfinity(gaussian_of(real)),
        "inception": InceptionScore(4),
        "kernel": KernelDistance(real, 3, 20),
        "manifolds": ManifoldMetrics(near),
        "memorisation": Memorisation(near, pairs=3),
        "clip": CLIPScore(),
    }
    for index in share(case, rank, world_size):
        for name, metric in metrics.items():
            keys = {"images": index.numpy().astype(np.uint8).reshape(-1, 1, 1, 1)} if name == "memorisation" else {}
            metric.update(x[index], x[index].flip(1) if name == "clip" else index, **keys)
    found = {name: plain(metric.compute()) for name, metric in metrics.items()}
    found["closest"] = [
        [p.distance, p.index, p.neighbour, p.image.ravel().tolist()] for p in metrics["memorisation"].closest()
    ]
    return found


def one_more_on_one(rank, world_size):
    """After a first figure only the last process takes in another sample."""
    x, metric, clip = rows(COUNT, 1), FrechetDistance(gaussian_of(rows(50, 2))), CLIPScore()
    kernel = KernelDistance(rows(50, 2), 3, 20)
    for index in share("uneven", rank, world_size):
        metric.update(x[index], index)
        kernel.update(x[index], index)
        clip.update(x[index], x[index].flip(1))
    metric.compute(), kernel.compute(), clip.compute()
    if rank == world_size - 1:
        index = torch.tensor([COUNT])
        metric.update(3.0 * x[:1], index)
        kernel.update(3.0 * x[:1], index)
        clip.update(x[:1], x[:1])
    return [metric.compute(), kernel.compute(), clip.compute()]


def all_scores(name, rank, world_size, folder):
    if name == "digits":
        source = InMemory(np.random.default_rng(0).integers(0, 256, (70, 1, 8, 8), dtype=np.uint8))
        samples, shape = 255 - np.random.default_rng(1).integers(0, 200, (COUNT, 8, 8, 1), dtype=np.uint8), (1, 8, 8)
    else:
        source = InMemory(rows(70, 3, 2).numpy(), num_grey_levels=None)
        samples, shape = rows(COUNT, 4, 2).numpy(), (2,)
    extractor = load_extractor(name, shape)
    reference = reference_of(RealData.of(source, torch.arange(70), "all"), extractor, folder, rank, world_size)
    metrics = ["fid", "kid", "precision", "recall", "density", "coverage", "memorisation"]
    metrics += ["is"] if name == "digits" else ["fid_infinity"]
    options = ScoreOptions(is_splits=3, kid_subsets=3, kid_subset_size=20, manifold_samples=45, bootstrap=5)
    scores = Scores(metrics, extractor, reference, shape, options, pairs=2)
    for index in share("uneven", rank, world_size):
        scores.update(samples[index.numpy()], index)
    result = scores.compute(COUNT)
    pairs = [[pair.distance, pair.index, pair.neighbour] for pair in result.pairs]
    return {**vars(result), "intervals": plain(result.intervals), "pairs": pairs}


def a_reference(count, rank, world_size, folder):
    """Of a few data: 2 leave the third process nothing."""
    source = InMemory(rows(7, 5, 2).numpy(), num_grey_levels=None)
    data = RealData.of(source, torch.arange(count), "all")
    found = reference_of(data, load_extractor("points", (2,)), folder, rank, world_size)
    again = reference_of(data, load_extractor("points", (2,)), folder, rank, world_size)
    assert torch.equal(found.features, again.features)
    gaussian = found.gaussian
    return [gaussian.count, plain(gaussian.mean), plain(gaussian.covariance), plain(found.features), found.key]


def everything(rank, world_size, folder):
    results = {case: every_metric(case, rank, world_size) for case in SHARES}
    with torch.inference_mode():
        results["inference mode"] = every_metric("inference mode", rank, world_size)
    results["one more"] = one_more_on_one(rank, world_size)
    for name in ("digits", "points"):
        results[name] = all_scores(name, rank, world_size, folder / name)
    for count in (7, 2):
        results[f"reference of {count}"] = a_reference(count, rank, world_size, folder / str(count))
    return results


def work(folder):
    """One of several processes."""
    dist.init_process_group("gloo")
    made = everything(dist.get_rank(), dist.get_world_size(), folder)
    torch.save(made, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return everything(0, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def many(request, tmp_path_factory):
    """What each of the processes found."""
    folder, size = tmp_path_factory.mktemp("many"), request.param
    group(size, work, folder, folder=folder, timeout=60.0)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def assert_alike(found, expected):
    """Nested lists and tables of numbers and words, to a millionth."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_alike(mine, theirs)
    else:
        assert found == (pytest.approx(expected, rel=1e-6, abs=1e-7) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("case", CASES)
def test_every_metric_is_that_of_one_process(one, many, case):
    for found in many:
        assert_alike(found[case], one[case])
    assert len(one[case]["memorisation"]["nn_ratio"]) == COUNT


def test_a_sample_more_on_one_process_counts_on_all(one, many):
    for found in many:
        assert_alike(found["one more"], one["one more"])
    assert one["one more"][0] != pytest.approx(one["uneven"]["frechet"], rel=1e-3)


@pytest.mark.parametrize("name", ["digits", "points"])
def test_all_figures_are_those_of_one_process(one, many, name):
    for found in many:
        assert_alike(found[name], one[name])
    assert len(one[name]["values"]) == 11


@pytest.mark.parametrize("count", [7, 2])
def test_a_reference_is_of_every_datum_once(one, many, count):
    for found in many:
        assert_alike(found[f"reference of {count}"], one[f"reference of {count}"])
    assert one[f"reference of {count}"][0] == count
