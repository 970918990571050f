"""Many samples at one fixed batch shape, each a function of its seed and number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny import ddpm, digits_data, ncsn, points_data, toy_dsm

from lit_diffusion import interrupts
from lit_diffusion.errors import UserError
from lit_diffusion.evaluation import sampling
from lit_diffusion.evaluation.sampling import Shard, generate_in_batches
from lit_diffusion.interrupts import Interrupted
from lit_diffusion.samplers import DDIM, AnnealedLangevin, Langevin
from lit_diffusion.samplers.base import Strays, far_outside


def drawn(method, count, *arguments, **keys):
    return torch.cat([batch.x for batch in generate_in_batches(method, torch.arange(count), *arguments, **keys)])


@pytest.fixture
def method():
    made = ncsn()
    made.data_spec = digits_data().data_spec
    return made


def shapes(method):
    return method.denoiser.backbone.seen


@pytest.mark.parametrize(
    ("count", "batch_size", "parts", "shape"),
    [(10, 4, [4, 4, 2], 4), (8, 4, [4, 4], 4), (3, 250, [3], 3), (1, 1, [1], 1), (5, 1, [1] * 5, 1)],
)
def test_the_network_sees_one_shape_and_the_padding_is_dropped(method, count, batch_size, parts, shape):
    batches = list(generate_in_batches(method, torch.arange(count), 0, batch_size, show_progress=False))
    assert [len(batch.x) for batch in batches] == parts
    assert set(shapes(method)) == {(shape, 1, 8, 8)}
    assert len(shapes(method)) == len(parts) * batches[0].evaluations
    assert all(batch.x.device.type == "cpu" for batch in batches)


def test_the_order_is_that_of_the_numbers(method):
    whole = method.generate(torch.arange(10), seed=5).x
    for batch_size in (3, 7, 10):
        made = drawn(method, 10, 5, batch_size, show_progress=False)
        assert torch.allclose(made, whole, atol=1e-5)
    alone = method.generate(torch.tensor([7]), seed=5).x
    assert torch.allclose(alone[0], whole[7], atol=1e-5)
    backwards = method.generate(torch.arange(10).flip(0), seed=5).x
    assert torch.allclose(backwards.flip(0), whole, atol=1e-5)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 10
    assert not torch.allclose(method.generate(torch.arange(10), seed=6).x, whole, atol=0.1)


def test_another_sampler_for_once(method):
    other = Langevin(steps=3, eta=1e-3)
    (batch,) = generate_in_batches(method, torch.arange(2), 0, 2, other, show_progress=False)
    assert torch.equal(batch.x, method.generate(torch.arange(2), 0, sampler=other).x)
    assert batch.evaluations == 3


def test_batches_come_as_they_are_made(method):
    batches = generate_in_batches(method, torch.arange(1000), 0, 2, show_progress=False)
    evaluations = next(batches).evaluations
    assert len(shapes(method)) == evaluations


def test_points(capsys):
    method = toy_dsm()
    method.data_spec = points_data().data_spec
    made = drawn(method, 7, 0, 4)
    assert made.shape == (7, 2)
    assert "sampling 7: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sampler_that_diverges_is_one_line(method, value):
    generate, calls = method.generate, []

    def second_diverges(indices, *rest):
        calls.append(indices)
        made = generate(indices, *rest)
        if len(calls) == 2:
            made.x[1] = value
        return made

    method.generate = second_diverges
    batches = generate_in_batches(method, torch.arange(10), 0, 4, show_progress=False)
    assert len(next(batches).x) == 4
    with pytest.raises(UserError, match="samples 4 to 7") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_what_becomes_of_the_padding_does_not_matter(method):
    generate = method.generate

    def padding_diverges(indices, *rest):
        made = generate(indices, *rest)
        made.x[indices >= 6] = math.nan
        return made

    method.generate = padding_diverges
    assert len(drawn(method, 6, 0, 4, show_progress=False)) == 6


def test_a_sampler_that_does_not_fit_is_refused_before_any_work(method):
    with pytest.raises(UserError, match=r"4 sigma\^2"):
        next(generate_in_batches(method, torch.arange(4), 0, 4, AnnealedLangevin(2, eta=0.04), show_progress=False))
    assert shapes(method) == []


# ---- what went astray --------------------------------------------------------------------------------------------


def amplifier():
    """An untrained network under a schedule with alpha(1) of 5e-5: its first x0 is thousands wide."""
    made = ddpm(num_timesteps=50, schedule="cosine")
    made.data_spec = digits_data(value_range=(-1.0, 1.0)).data_spec
    return made


def test_far_is_beyond_the_range_by_its_width_and_what_noise_may_do():
    x = torch.tensor([[0.0, 1.0], [2.9, -2.9], [3.1, 0.0], [0.0, -7.0], [math.nan, 0.0], [-math.inf, 0.0]])
    assert far_outside(x, (-1.0, 1.0), 0.0).tolist() == pytest.approx([0.0, 0.0, 3.1, 7.0, math.inf, math.inf])
    assert far_outside(x, (-1.0, 1.0), 0.5).tolist() == [0.0, 0.0, 0.0, 7.0, math.inf, math.inf]
    assert far_outside(x, (0.0, 1.0), 0.0).tolist() == pytest.approx([0.0, 2.9, 3.1, 7.0, math.inf, math.inf])
    assert far_outside(x, None, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, math.inf, math.inf]


def test_samples_that_went_astray_are_counted_and_said_in_one_line(capsys):
    method, walk = amplifier(), DDIM(50, clip_x0=None)
    batches = list(generate_in_batches(method, torch.arange(10), 0, 4, walk, show_progress=False, say=print))
    far = torch.cat([batch.x for batch in batches]).flatten(1).abs().amax(1)
    strays = sum((batch.strays for batch in batches), Strays())
    assert strays == Strays(int((far > 3.0).sum()), 10, float(far.max()))
    assert strays.count > 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line == str(strays)
    assert line.startswith(f"{strays.count} of 10 samples ended far outside the data's range")
    assert "try clip_x0: data" in line
    drawn(method, 10, 0, 4, DDIM(50), show_progress=False, say=print)
    assert capsys.readouterr().out == ""


def test_what_an_end_cuts_to_the_range_was_astray_before(capsys):
    class Lost(AnnealedLangevin):
        def plan(self, process):
            return super().plan(process)[-1:]

        def step(self, run, x, move):
            return torch.where(run.noise.indices.view(-1, 1, 1, 1) % 2 == 0, x, 1e4 * x)

    method, sampler = amplifier(), Lost(num_levels=5, denoise=True)
    batches = list(generate_in_batches(method, torch.arange(6), 0, 4, sampler, show_progress=False, say=print))
    assert float(torch.cat([batch.x for batch in batches]).abs().max()) <= 1.0
    strays = sum((batch.strays for batch in batches), Strays())
    assert (strays.count, strays.of) == (3, 6)
    assert "3 of 6 samples" in capsys.readouterr().out


def test_the_strays_of_all_processes_are_added_up(monkeypatch):
    method, walk = amplifier(), DDIM(50, clip_x0=None)
    monkeypatch.setattr(sampling, "all_gather_objects", lambda mine: [mine, (False, False, Strays(2, 3, 1e9))])
    batches = generate_in_batches(method, Shard.of(7, 2, 0, 2), 0, 2, walk, show_progress=False)
    strays = sum((batch.strays for batch in batches), Strays())
    assert (strays.of, strays.largest) == (4 + 2 * 3, 1e9)
    assert strays.count >= 4


# ---- shares of several processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 250])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 37, 64])
def test_the_shares_are_every_sample_once_in_equally_many_batches(count, batch_size, world_size):
    shares = [Shard.of(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(torch.cat([share.indices for share in shares]).tolist()) == list(range(count))
    sizes = [len(share.indices) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    (batches,) = {share.batches for share in shares}
    assert batches == math.ceil(max(sizes) / batch_size)  # Enough for the largest share, and not one more.


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(7, 2, 3), (5, 2, 2), (4, 4, 3), (1, 4, 2), (9, 3, 2), (2, 1, 4)]
)
def test_what_the_shares_make_together_is_what_one_makes_alone(method, count, batch_size, world_size):
    whole = method.generate(torch.arange(count), seed=3).x
    made, evaluations = torch.full_like(whole, math.nan), set()
    for rank in range(world_size):
        share = Shard.of(count, batch_size, rank, world_size)
        before, numbers = len(shapes(method)), []
        batches = list(generate_in_batches(method, share, 3, batch_size, show_progress=False))
        for batch in batches:
            assert batch.x.shape == (len(batch.indices), 1, 8, 8)
            made[batch.indices] = batch.x
            numbers += batch.indices.tolist()
        assert numbers == share.indices.tolist()  # Batches for the others' sake are empty.
        assert len(batches) == share.batches
        evaluations.add(len(shapes(method)) - before)
    assert torch.allclose(made, whole, atol=1e-5)
    assert len(evaluations) == 1  # A process more or less would leave the others waiting inside the network.


def test_a_batch_for_the_others_sake_may_diverge(method):
    generate = method.generate

    def diverges(indices, *rest):
        made = generate(indices, *rest)
        return replace(made, x=made.x * (math.nan if 0 in indices else 1.0))

    method.generate = diverges
    (batch,) = generate_in_batches(method, Shard.of(1, 4, rank=1, world_size=2), 0, 4, show_progress=False)
    assert batch.indices.tolist() == []
    assert batch.x.shape == (0, 1, 8, 8)


def test_a_callers_own_watch_sees_every_step(method):
    seen = []
    (batch,) = generate_in_batches(method, torch.arange(3), 0, 4, show_progress=False, on_step=seen.append)
    assert [progress.step for progress in seen] == list(range(1, seen[-1].total + 1))
    assert seen[-1].x.shape == batch.x.shape


# ---- being asked to stop -----------------------------------------------------------------------------------------


def test_a_signal_ends_the_sampling_between_two_steps(method, monkeypatch):
    steps = []

    def signalled(progress):
        steps.append(progress.step)
        if len(steps) == 2:
            monkeypatch.setattr(interrupts, "_asked", "SIGUSR1")

    batches = generate_in_batches(method, torch.arange(4), 0, 2, show_progress=False, on_step=signalled)
    with pytest.raises(Interrupted, match="stopped by SIGUSR1 while sampling"):
        next(batches)
    assert steps == [1, 2]


def test_a_sharded_network_is_left_at_the_end_of_a_batch_only(method, monkeypatch):
    """The others wait for this process at every evaluation."""
    method.sharded, steps = True, []
    monkeypatch.setattr(interrupts, "_asked", "SIGTERM")
    with pytest.raises(Interrupted):
        next(generate_in_batches(method, torch.arange(4), 0, 2, show_progress=False, on_step=steps.append))
    assert len(steps) == steps[-1].total


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
    method.data_spec = digits_data().data_spec
    told = []
    method.denoiser.backbone.register_forward_hook(lambda module, args, out: told.append(args[2].label.tolist()))
    made = drawn(method, 5, 0, 2, show_progress=False)
    assert [told[k] for k in (0, 7, 14)] == [[0, 1], [2, 0], [1, 2]]
    (same,) = drawn(method, 1, 0, 2, label=0, show_progress=False)
    assert torch.allclose(same, made[0], atol=1e-5)
    (other,) = drawn(method, 1, 0, 2, label=1, show_progress=False)
    assert not torch.allclose(other, made[0], atol=1e-3)
