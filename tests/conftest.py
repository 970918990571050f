"""What every test shares: one thread, because small tensors on shared cores are slower with two; a cache of its own."""

import os
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


TESTS = Path(__file__).parent

LONGEST = (
    "test_interruptions.py",
    "cli/test_evaluating_runs.py",
    "test_distributed.py",
    "cli/test_errors.py",
    "callbacks/test_likelihood.py",
    "cli/test_fit.py",
    "cli/test_gallery.py",
    "samplers/test_sde.py",
    "samplers/test_base.py",
    "callbacks/test_evaluator.py",
    "methods/test_ddpm.py",
    "cli/test_sample.py",
    "cli/test_report.py",
    "metrics/test_many_processes.py",
    "metrics/test_against_torch_fidelity.py",
)
"""Files that take longest: they come first, so that of two test processes neither waits for the other at the end."""


def pytest_collection_modifyitems(items):
    """The longest files first, all else in its order."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(TESTS).as_posix(), len(rank)))


@pytest.fixture
def all_cores(monkeypatch):
    """For a test that is the run that a user makes."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What is computed once, such as statistics of real data: not where a user's are, and not by each test anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("LIT_DIFFUSION_WEIGHTS", raising=False)
        yield
