"""The view of a run on Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_diffusion.metrics.catalogue import better
from lit_diffusion.runs.clock import Clock
from lit_diffusion.runs.console import print_note

SETTINGS = frozenset({"seed", "rtol", "atol", "t_min", "steps", "sampled"})
"""Numbers of an event that say how something was measured, not what was found: no curves."""


class Dashboard:
    """Weights & Biases, as a view of the run: absent or in trouble, it changes nothing else.

    Args:
        mode: ``auto``: online when you are logged in, offline otherwise; ``online``; ``offline``; ``disabled``: wandb
            is not even imported.
        project: of the dashboard.
        entity: user or team that owns the project, null for your default.
        tags: words to find the run by.
    """

    resume: Literal["allow", "never"] = "allow"
    """What wandb does where it has a run of this id already."""

    def __init__(
        self,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        project: str = "lit_diffusion",
        entity: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self.tags = tags
        self.on_trouble: Callable[[], None] = lambda: None
        """Called when the view is lost; a run counts it."""
        self._run: Any = None
        self._defined: set[str] = set()

    def resolved_mode(self) -> str:
        """``online``, ``offline`` or ``disabled``; the variable WANDB_MODE settles ``auto``."""
        if self.mode != "auto":
            return self.mode
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            return chosen
        return "online" if logged_in() else "offline"

    @contextmanager
    def _trouble_is_a_note(self) -> Iterator[None]:
        """Whatever wandb or its service does, or where it is not installed: the run goes on without this view."""
        try:
            yield
        except Exception as error:
            print_note(f"Weights & Biases is off: {(str(error) or type(error).__name__).splitlines()[0]}")
            self._run = None
            if not isinstance(error, ModuleNotFoundError):  # Absent is one of the three ways to have it.
                self.on_trouble()

    def open(self, run_id: str, run_dir: Path, experiment: str, config: dict[str, Any]) -> None:
        """Start the view of a run."""
        with self._trouble_is_a_note():
            mode = self.resolved_mode()
            if mode == "disabled":
                return
            import wandb

            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                id=run_id,
                name=f"{experiment}/{run_id}",
                project=self.project,
                entity=self.entity,
                tags=self.tags,
                dir=str(run_dir),
                config=config,
                resume=self.resume,
                settings=wandb.Settings(silent=True, console="off"),
            )
            # One clock for all panels; wandb's own step is never given, so nothing is ever out of order.
            self._run.define_metric("images")
            self._run.define_metric("*", step_metric="images")
            self._defined.clear()

    def log(self, event: str, values: Mapping[str, Any], clock: Clock) -> None:
        """One event, its numbers in the section of its name."""
        self._send(dashboard_values(event, values), clock)

    def picture(self, name: str, picture: np.ndarray, caption: str, clock: Clock) -> None:
        """One picture, uint8 ``[H, W, C]``."""
        if self._run is not None:
            with self._trouble_is_a_note():
                import wandb

                image = wandb.Image(picture[..., 0] if picture.shape[-1] == 1 else picture, caption=caption)
                self._send({f"pictures/{name}": image}, clock)

    def _send(self, values: Mapping[str, Any], clock: Clock) -> None:
        if self._run is None or not values:
            return
        with self._trouble_is_a_note():
            # By its whole name: which of several patterns that fit a key counts, wandb leaves open.
            for key in values.keys() - self._defined:
                if best := better(key.removeprefix("evaluation/")):
                    self._run.define_metric(key, step_metric="images", summary=f"last,{best}")
                self._defined.add(key)
            self._run.log({**values, "images": clock.images, "trainer/global_step": clock.steps})

    def close(self, failed: bool) -> None:
        """Say whether it ended well."""
        if self._run is not None:
            with self._trouble_is_a_note():
                self._run.finish(exit_code=1 if failed else 0)
            self._run = None


def logged_in() -> bool:
    """Whether this machine has a key of Weights & Biases; asks no server."""
    import wandb

    return bool(wandb.api.api_key)


def dashboard_values(event: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a dashboard shows of an event, as docs/dashboard.md says: numbers, and the protocol as JSON.

    The part of a key before its first slash is the panel's section. What modules log through Lightning, event
    ``metrics``, brings its own (``val/loss``).
    """
    if event in ("start", "end", "picture"):  # pictures are shown themselves
        return {}
    section = "" if event == "metrics" else f"{event}/"
    shown: dict[str, Any] = {
        f"{section}{key}": value
        for key, value in values.items()
        if isinstance(value, int | float) and key not in SETTINGS
    }
    if isinstance(protocol := values.get("protocol"), dict):
        shown[f"{section}protocol"] = json.dumps(protocol, sort_keys=True)
    return shown
