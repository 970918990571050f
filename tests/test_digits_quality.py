"""After the default run, an independent judge accepts the samples.

The judge knows nothing of this project: Frechet distances in pixels and in the hidden units of a classifier trained on
the real digits, its confidence, the spread of classes, and the share of near copies.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from lit_diffusion.__main__ import dispatch

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the Gaussians of two sets ``[N, D]``."""
    mean = a.mean(0) - b.mean(0)
    first, second = np.cov(a.T), np.cov(b.T)
    # A little on the diagonal: pixels that never change make the product singular.
    ridge = 1e-9 * np.eye(len(first))
    root = sqrtm((first + ridge) @ (second + ridge)).real
    return float(mean @ mean + np.trace(first + second - 2.0 * root))


def judge(samples: np.ndarray) -> dict[str, float]:
    """What the judge says of ``[N, 64]`` in [0, 1]."""
    real, labels = load_digits(return_X_y=True)
    real = real / 16.0
    classifier = MLPClassifier((64,), random_state=0).fit(real, labels)

    def hidden(x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ classifier.coefs_[0] + classifier.intercepts_[0], 0.0)

    probability = classifier.predict_proba(samples)
    share = np.bincount(probability.argmax(1), minlength=10) / len(samples)
    between = cdist(real, real)
    np.fill_diagonal(between, np.inf)
    copies = cdist(samples, real).min(1) < np.percentile(between.min(1), 1)
    return {
        "frechet_pixels": frechet(samples, real),
        "frechet_hidden": frechet(hidden(samples), hidden(real)),
        "confident": float((probability.max(1) > 0.9).mean()),
        "classes": float(np.exp(-(share * np.log(share + 1e-12)).sum())),
        "copies": float(copies.mean()),
    }


def test_the_judge_tells_good_from_bad():
    real = load_digits(return_X_y=True)[0] / 16.0
    order = np.random.default_rng(0).permutation(len(real))
    half = judge(real[order[:900]])
    assert half["frechet_pixels"] < 0.05
    assert half["copies"] > 0.9  # it finds copies
    noisy = judge(np.clip(real[order[:900]] + 0.2 * np.random.default_rng(1).normal(size=(900, 64)), 0, 1))
    assert noisy["frechet_pixels"] > 0.1
    collapsed = judge(np.repeat(real[:10], 90, axis=0)[:450])
    assert collapsed["classes"] < 9.5
    assert collapsed["frechet_hidden"] > 0.4


@pytest.fixture
def all_cores():
    """The fast tests run on one thread; this is the run that a user makes."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_the_default_run_gives_digits(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    dispatch(["fit", "--config", str(EXPERIMENTS / f"{name}.yaml"), "--run_dir", "run", "--wandb.mode", "disabled"])
    trained = time.monotonic()
    dispatch(["sample", "--ckpt_path", "run/checkpoints/last.ckpt", "--num_samples", "1000", "--out", "samples.npz"])
    images = np.load("samples.npz")["arr_0"]
    verdict = judge(images.reshape(1000, 64) / 255.0)
    with capsys.disabled():
        print(f"\n{name}: {verdict}, fit {trained - begin:.0f} s, sampling {time.monotonic() - trained:.0f} s")
    assert verdict["frechet_pixels"] <= 0.10
    assert verdict["frechet_hidden"] <= 0.40
    assert verdict["confident"] >= 0.85
    assert verdict["classes"] >= 9.5
    assert verdict["copies"] <= 0.03
