"""After the default runs, an independent judge accepts the samples."""

from __future__ import annotations

import numpy as np
import pytest
from digits_table import judged, sample, train
from judge import judge
from sklearn.datasets import load_digits


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


LIMITS = {
    "ncsn": (0.10, 0.40, 0.85),
    "ncsnv2": (0.10, 0.40, 0.85),
    "ddpm": (0.10, 0.40, 0.75),
    "edm": (0.06, 0.30, 0.75),
    "ddim, 50 steps": (0.10, 0.40, 0.75),
    "score_sde_ve": (0.12, 0.50, 0.75),
    "score_sde_vp": (0.10, 0.40, 0.75),
    "score_sde_subvp": (0.12, 0.50, 0.75),
    "flow_matching": (0.075, 0.35, 0.75),
}
"""At most, of the Frechet distances in pixels and in the classifier's hidden units; at least, of confident samples."""


def accept(name, images, capsys):
    """Judge, show and hold to the limits."""
    verdict = judged(images)
    with capsys.disabled():
        print(f"\n{name}: {verdict}")
    pixels, hidden, confident = LIMITS[name]
    assert verdict["frechet_pixels"] <= pixels
    assert verdict["frechet_hidden"] <= hidden
    assert verdict["confident"] >= confident
    assert verdict["classes"] >= 9.5
    assert verdict["copies"] <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("name", [name for name in LIMITS if "steps" not in name])
def test_the_default_run_gives_digits(name, tmp_path, capsys):
    seconds = train(name, tmp_path / name)
    with capsys.disabled():
        print(f"\n{name}: fit {seconds:.0f} s")
    accept(name, sample(tmp_path / name, tmp_path / f"{name}.npz"), capsys)
    if name != "ddpm":
        return

    # The same training serves DDIM, whose file differs in the sampler alone.
    def walk(sampler, steps):
        arguments = ["--sampler", sampler, "--sampler.steps", str(steps)]
        return sample(tmp_path / name, tmp_path / f"{sampler}-{steps}.npz", arguments)

    accept("ddim, 50 steps", walk("ddim", 50), capsys)
    few, many = judged(walk("ddim", 10)), judged(walk("ancestral", 10))
    with capsys.disabled():
        print(f"10 steps: ddim {few}, ancestral {many}")
    assert few["frechet_pixels"] < many["frechet_pixels"]
    assert few["frechet_hidden"] < many["frechet_hidden"]
