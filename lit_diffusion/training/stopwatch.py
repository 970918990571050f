"""The time of a training step, by its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "forward_backward", "optimizer", "ema", "logging", "checkpoint")
"""Parts of a step. ``data``: waiting for the next batch, moving and normalizing it. ``logging``: what the callbacks do
after the step, without drawing and evaluating, which are no part of a step, and without writing checkpoints."""

MOST_EVENTS = 1000
"""Most GPU events kept before they are read, so that they do not pile up in a training whose times are never read."""


class Stopwatch:
    """Seconds by part of the step.

    A GPU runs asynchronously, so its parts are timed by events in its own queue, which nothing waits for until the
    times are read.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a block whose work is done on ``device``."""
        if device.type == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((name, begun, ended))
            if len(self._events) >= MOST_EVENTS:
                self._read_events()
        else:
            since = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - since

    def mark(self) -> None:
        """Start the time that the next :meth:`lap` counts."""
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last mark or lap to a part."""
        now = time.perf_counter()
        self._seconds[name] += now - self._since
        self._since = now

    def exclude(self, seconds: float) -> None:
        """Leave ``seconds`` of the time since the last mark out of all parts."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading, and reset them."""
        self._read_events()
        found = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return found

    def _read_events(self) -> None:
        if self._events:
            self._events[-1][2].synchronize()
            for name, begun, ended in self._events:
                self._seconds[name] += begun.elapsed_time(ended) / 1000.0
            self._events.clear()
