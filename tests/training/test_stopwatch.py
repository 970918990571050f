"""Every second of a step belongs to one part or to none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lit_diffusion.training import stopwatch
from lit_diffusion.training.stopwatch import PARTS, Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def seconds_of(**seconds):
    return {**dict.fromkeys(PARTS, 0.0), **seconds}


def test_a_lap_is_what_passed_since_the_lap_before(clock):
    watch = Stopwatch()
    clock.seconds += 3.0
    watch.mark()
    clock.seconds += 1.0
    watch.lap("data")
    clock.seconds += 0.5
    watch.lap("logging")
    clock.seconds += 0.25
    watch.lap("data")
    assert watch.read() == seconds_of(data=1.25, logging=0.5)
    assert watch.read() == seconds_of()


def test_what_is_excluded_is_no_part(clock):
    watch = Stopwatch()
    clock.seconds += 10.0
    watch.exclude(8.0)
    watch.lap("logging")
    assert watch.read() == seconds_of(logging=2.0)


def test_a_block_is_a_part(clock):
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("optimizer", CPU):
            clock.seconds += 2.0
    with watch.part("ema", CPU):
        clock.seconds += 1.0
    assert watch.read() == seconds_of(optimizer=4.0, ema=1.0)


class Event:
    """A GPU's: the time that its queue reached it is known once it was waited for."""

    waited = 0
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, other):
        assert Event.waited
        return 1000.0 * (other.at - self.at)


def test_a_gpu_is_waited_for_when_the_figures_are_read_and_once(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "waited", 0)
    watch = Stopwatch()
    for _ in range(3):
        with watch.part("forward_backward", torch.device("cuda", 0)):
            Event.now += 0.25  # The GPU's time; the CPU's stands still.
        with watch.part("optimizer", torch.device("cuda", 0)):
            Event.now += 0.5
        assert Event.waited == 0
    assert watch.read() == seconds_of(forward_backward=0.75, optimizer=1.5)
    assert Event.waited == 1
    assert watch.read() == seconds_of()
    assert Event.waited == 1


def test_times_that_are_never_read_do_not_pile_up(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "waited", 0)
    watch = Stopwatch()
    for _ in range(10 * stopwatch.MOST_EVENTS):
        with watch.part("ema", torch.device("cuda", 0)):
            Event.now += 0.25
        assert len(watch._events) < stopwatch.MOST_EVENTS
    assert Event.waited == 10
    assert watch.read() == seconds_of(ema=2500.0)
