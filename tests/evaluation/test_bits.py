"""Bits per dimension of a model whose density is known, batch by batch and without a Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.exact_model import GAUSSIAN, ExactModel

from lit_diffusion.evaluation.bits import BoundBits, BoundSettings, Held, ODEBits, ODESettings
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.reverse import ReverseChain

COUNT = 60
NOISE = SampleNoise(5, torch.arange(COUNT), (2,), dtype=torch.float64)
Z = GAUSSIAN.sample(NOISE.normal(), NOISE.uniform(()))
EXACT = -torch.distributions.MultivariateNormal(GAUSSIAN.means[0], GAUSSIAN.covariances[0]).log_prob(Z)
EXACT = EXACT / (2 * math.log(2.0))


def batches(x, size):
    return [Held(x[part], part) for part in torch.arange(COUNT).split(size)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_ode_finds_the_density_and_pays_for_the_encoder(scale):
    bits = ODEBits(ExactModel(scale), ODESettings(trace="exact", rtol=1e-6, atol=1e-6))
    each = torch.cat([bits.take(batch) for batch in batches(scale * Z, 25)])
    # At the smallest time of the process the data are noised a little.
    torch.testing.assert_close(each.cpu(), EXACT + math.log2(scale), atol=0.02, rtol=0)
    mean, error, count = bits.mean.compute()
    assert (mean, count) == (pytest.approx(float(each.mean())), COUNT)
    assert error == pytest.approx(float(each.std()) / COUNT**0.5)
    assert len(bits.evaluations) == 3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_bound_lies_above_the_density_and_pays_for_the_encoder(scale):
    bounds = []
    for size in (60, 25):
        bits = BoundBits(ExactModel(scale), BoundSettings(ReverseChain(None), steps=200))
        for batch in batches(scale * Z.float(), size):
            bits.take(batch)
        bounds.append(bits.result())
    found, other = bounds
    entropy = float(EXACT.mean()) + math.log2(scale)
    assert entropy - 0.05 < found.value < entropy + 0.5
    assert (found.value, found.error) == (pytest.approx(other.value, rel=1e-5), pytest.approx(other.error, rel=1e-4))
    assert found.count == COUNT
    assert sum(found.parts.values()) + math.log2(scale) == pytest.approx(found.value, rel=1e-6)
    assert float(found.by_step.sum()) + found.parts["prior"] == pytest.approx(sum(found.parts.values()), rel=1e-6)
    assert len(found.by_step) == len(found.times) == 200


def test_one_datum_has_no_standard_error():
    bits = ODEBits(ExactModel(), ODESettings(trace="exact", rtol=1e-2, atol=1e-2))
    bits.take(Held(Z[:1], torch.arange(1)))
    mean, error, count = bits.mean.compute()
    assert math.isfinite(mean)
    assert math.isnan(error)
    assert count == 1
