"""Many samples at one fixed batch shape, each a function of its seed and number."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import digits_data, ncsn, points_data, toy_dsm

from lit_diffusion.errors import UserError
from lit_diffusion.samplers import AnnealedLangevin, Langevin
from lit_diffusion.sampling import generate_in_batches


def drawn(method, count, *arguments, **keys):
    return torch.cat([x for _, x in generate_in_batches(method, torch.arange(count), *arguments, **keys)])


@pytest.fixture
def method():
    made = ncsn()
    made.facts = digits_data().facts
    return made


def shapes(method):
    return method.denoiser.backbone.seen


@pytest.mark.parametrize(
    ("count", "batch_size", "parts", "shape"),
    [(10, 4, [4, 4, 2], 4), (8, 4, [4, 4], 4), (3, 250, [3], 3), (1, 1, [1], 1), (5, 1, [1] * 5, 1)],
)
def test_the_network_sees_one_shape_and_the_padding_is_dropped(method, count, batch_size, parts, shape):
    batches = [x for _, x in generate_in_batches(method, torch.arange(count), 0, batch_size, show_progress=False)]
    assert [len(batch) for batch in batches] == parts
    assert set(shapes(method)) == {(shape, 1, 8, 8)}
    assert len(shapes(method)) == len(parts) * method.sampler.evaluations
    assert all(batch.device.type == "cpu" for batch in batches)


def test_the_order_is_that_of_the_numbers(method):
    whole = method.generate(torch.arange(10), seed=5)
    for batch_size in (3, 7, 10):
        made = drawn(method, 10, 5, batch_size, show_progress=False)
        assert torch.allclose(made, whole, atol=1e-5)
    alone = method.generate(torch.tensor([7]), seed=5)
    assert torch.allclose(alone[0], whole[7], atol=1e-5)
    backwards = method.generate(torch.arange(10).flip(0), seed=5)
    assert torch.allclose(backwards.flip(0), whole, atol=1e-5)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 10
    assert not torch.allclose(method.generate(torch.arange(10), seed=6), whole, atol=0.1)


def test_another_sampler_for_once(method):
    other = Langevin(steps=3, eta=1e-3)
    ((_, batch),) = generate_in_batches(method, torch.arange(2), 0, 2, other, show_progress=False)
    assert torch.equal(batch, method.generate(torch.arange(2), 0, sampler=other))
    assert other.evaluations == 3


def test_batches_come_as_they_are_made(method):
    batches = generate_in_batches(method, torch.arange(1000), 0, 2, show_progress=False)
    next(batches)
    assert len(shapes(method)) == method.sampler.evaluations


def test_points(capsys):
    method = toy_dsm()
    method.facts = points_data().facts
    made = drawn(method, 7, 0, 4)
    assert made.shape == (7, 2)
    assert "sampling 7: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_walk_that_diverges_is_one_line(method, value):
    generate, calls = method.generate, []

    def second_diverges(indices, *rest):
        calls.append(indices)
        x = generate(indices, *rest)
        if len(calls) == 2:
            x[1] = value
        return x

    method.generate = second_diverges
    batches = generate_in_batches(method, torch.arange(10), 0, 4, show_progress=False)
    assert len(next(batches)[1]) == 4
    with pytest.raises(UserError, match="samples 4 to 7") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_what_becomes_of_the_padding_is_nobodys_business(method):
    generate = method.generate

    def padding_diverges(indices, *rest):
        x = generate(indices, *rest)
        x[indices >= 6] = math.nan
        return x

    method.generate = padding_diverges
    assert len(drawn(method, 6, 0, 4, show_progress=False)) == 6


def test_a_sampler_that_does_not_fit_is_refused_before_any_work(method):
    with pytest.raises(UserError, match=r"4 sigma\^2"):
        next(generate_in_batches(method, torch.arange(4), 0, 4, AnnealedLangevin(2, eta=0.04), show_progress=False))
    assert shapes(method) == []


# ---- conditions --------------------------------------------------------------------------------------------------


def test_without_classes_there_is_no_condition():
    assert ncsn().condition(torch.arange(4), None) is None
    with pytest.raises(UserError, match="label 3: this model is not class-conditional") as caught:
        ncsn().condition(torch.arange(4), 3)
    assert "\n" not in str(caught.value)


def test_all_classes_in_turn_or_one():
    method = ncsn(network={"num_classes": 10})
    assert method.condition(torch.tensor([0, 9, 10, 25]), None).label.tolist() == [0, 9, 0, 5]
    assert method.condition(torch.arange(3), 7).label.tolist() == [7, 7, 7]
    assert method.condition(torch.arange(3), 0).label.dtype == torch.int64
    for label in (-1, 10):
        with pytest.raises(UserError, match="classes are 0 to 9"):
            method.condition(torch.arange(3), label)


def test_labels_follow_the_samples_through_the_batches():
    method = ncsn(network={"num_classes": 3})
    method.facts = digits_data().facts
    told = []
    method.denoiser.backbone.register_forward_hook(lambda module, args, out: told.append(args[2].label.tolist()))
    made = drawn(method, 5, 0, 2, show_progress=False)
    assert [told[k] for k in (0, 7, 14)] == [[0, 1], [2, 0], [1, 2]]
    ((_, same),) = generate_in_batches(method, torch.arange(1), 0, 2, label=0, show_progress=False)
    assert torch.allclose(same[0], made[0], atol=1e-5)
    ((_, other),) = generate_in_batches(method, torch.arange(1), 0, 2, label=1, show_progress=False)
    assert not torch.allclose(other[0], made[0], atol=1e-3)
