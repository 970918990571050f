from __future__ import annotations

import math

import pytest
import torch

from lit_diffusion.errors import UserError
from lit_diffusion.metrics import CLIPScore


def at_angle(degrees):
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def test_it_is_a_hundred_times_the_cosine_and_0_at_the_least():
    score = CLIPScore()
    score.update(3.0 * at_angle([0.0, 60.0]), 0.1 * at_angle([0.0, 0.0]))
    score.update(at_angle([120.0]), at_angle([0.0]))
    values = torch.tensor([100.0, 50.0, 0.0])
    mean, error = score.compute()
    assert mean == pytest.approx(50.0)
    assert error == pytest.approx(float(values.std()) / 3**0.5)


def test_one_pair_has_no_spread_and_none_no_score():
    score = CLIPScore()
    with pytest.raises(UserError, match="at least one image"):
        score.compute()
    score.update(at_angle([60.0]), at_angle([0.0]))
    mean, error = score.compute()
    assert mean == pytest.approx(50.0)
    assert math.isnan(error)
    score.reset()
    with pytest.raises(UserError, match="at least one image"):
        score.compute()
