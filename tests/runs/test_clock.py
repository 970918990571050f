import pytest

from lit_diffusion.errors import UserError
from lit_diffusion.runs.clock import Cadence, Clock, in_images


def run(cadence, batch, steps, images=0, done=0):
    """After which of the next steps it is due, as images seen."""
    clock, due = Clock(images=images, steps=done, batch=batch), []
    for _ in range(steps):
        clock.tick()
        if cadence.due(clock):
            due.append(clock.images)
    return due


def test_a_tick_is_a_step_of_a_batch():
    clock = Clock(batch=48)
    assert (clock.images, clock.steps) == (0, 0)
    for _ in range(3):
        clock.tick()
    assert (clock.images, clock.steps) == (144, 3)


@pytest.mark.parametrize("batch", [1, 7, 10, 64, 100, 128, 300])
def test_by_images_it_is_due_when_a_multiple_is_crossed(batch):
    """At the first step at or past each multiple of 100, once for a step that crosses several."""
    steps = 200
    seen = [batch * n for n in range(1, steps + 1)]
    expected = []
    for multiple in range(100, seen[-1] + 1, 100):
        first = next(images for images in seen if images >= multiple)
        if first not in expected:
            expected.append(first)
    assert run(Cadence.of("x", 100, None), batch, steps) == expected


def test_by_images_at_the_exact_multiple():
    assert run(Cadence.of("x", 100, None), 50, 6) == [100, 200, 300]
    assert run(Cadence.of("x", 100, None), 30, 10) == [120, 210, 300]


def test_by_steps():
    assert run(Cadence.of("x", None, 3), 7, 10) == [21, 42, 63]
    assert run(Cadence.of("x", None, 1), 7, 3) == [7, 14, 21]


def test_by_either():
    # 70 is two steps, 105 crosses 100, 210 is both; 245 is neither.
    assert run(Cadence.of("x", 100, 2), 35, 8) == [70, 105, 140, 210, 280]


def test_by_neither_it_is_never_due():
    assert run(Cadence.of("x", None, None), 7, 100) == []


def test_resuming_changes_nothing():
    cadence = Cadence.of("x", 100, 9)
    whole = run(cadence, 30, 40)
    for stop in (1, 3, 4, 20):
        first = run(cadence, 30, stop)
        assert first + run(cadence, 30, 40 - stop, images=30 * stop, done=stop) == whole


@pytest.mark.parametrize(
    ("images", "steps", "key"), [(0, None, "every_n_images"), (None, -3, "every_n_steps"), (5, 0, "every_n_steps")]
)
def test_a_cadence_is_positive(images, steps, key):
    with pytest.raises(UserError) as caught:
        Cadence.of("callbacks.samples", images, steps)
    value = images if key == "every_n_images" else steps
    assert str(caught.value).startswith(f"callbacks.samples.{key} is {value};")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "steps", "expected"), [(None, None, 0), (500, None, 500), (None, 10, 640), (0, None, 0), (None, 0, 0)]
)
def test_lengths_in_images(images, steps, expected):
    assert in_images("callbacks.ema", "warmup", images, steps, batch=64) == expected


@pytest.mark.parametrize(
    ("images", "steps", "words"),
    [
        (500, 10, ["warmup_images", "warmup_steps", "not both"]),
        (0, 10, ["not both"]),
        (-5, None, ["warmup", "-5", "negative"]),
        (None, -2, ["warmup", "negative"]),
    ],
)
def test_lengths_that_are_none(images, steps, words):
    with pytest.raises(UserError) as caught:
        in_images("callbacks.ema", "warmup", images, steps, batch=64)
    message = str(caught.value)
    assert message.startswith("callbacks.ema: ")
    assert "\n" not in message
    for word in words:
        assert word in message
