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
"""Keys of an event that are settings of a measurement, not its results: no curves."""


class Dashboard:
    """Weights & Biases as a view of the run; if it is absent or fails, nothing else changes.

    Args:
        mode: ``auto``: online when you are logged in, offline otherwise; ``online``; ``offline``; ``disabled``: wandb
            is not even imported.
        project: name of the Weights & Biases project.
        entity: user or team that owns the project, null for your default.
        tags: words to find the run by.
    """

    resume: Literal["allow", "never"] = "allow"
    """wandb's behavior where it has a run of this id already."""

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
        """Callback for a view that is lost; a run counts it."""
        self._run: Any = None
        self._defined: set[str] = set()

    def resolved_mode(self) -> str:
        """``online``, ``offline`` or ``disabled``; ``auto`` follows the variable WANDB_MODE, then the login."""
        if self.mode != "auto":
            return self.mode
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            return chosen
        return "online" if logged_in() else "offline"

    @contextmanager
    def _trouble_is_a_note(self) -> Iterator[None]:
        """Context in which any failure of wandb, or its absence, drops the view and lets the run go on."""
        try:
            yield
        except Exception as error:
            print_note(f"Weights & Biases is off: {(str(error) or type(error).__name__).splitlines()[0]}")
            self._run = None
            if not isinstance(error, ModuleNotFoundError):  # Not installed is a choice.
                self.on_trouble()

    def open(self, run_id: str, run_dir: Path, experiment: str, config: dict[str, Any]) -> None:
        """Open the view of a run."""
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
        """Show an event's numbers, in the section of its name."""
        self._send(dashboard_values(event, values), clock)

    def picture(self, name: str, picture: np.ndarray, caption: str, clock: Clock) -> None:
        """Show a picture, uint8 ``[H, W, C]``."""
        if self._run is not None:
            with self._trouble_is_a_note():
                import wandb

                image = wandb.Image(picture[..., 0] if picture.shape[-1] == 1 else picture, caption=caption)
                self._send({f"pictures/{name}": image}, clock)

    def _send(self, values: Mapping[str, Any], clock: Clock) -> None:
        if self._run is None or not values:
            return
        with self._trouble_is_a_note():
            # By its whole name: wandb leaves open which of several matching patterns counts.
            for key in values.keys() - self._defined:
                if best := better(key.removeprefix("evaluation/")):
                    self._run.define_metric(key, step_metric="images", summary=f"last,{best}")
                self._defined.add(key)
            self._run.log({**values, "images": clock.images, "trainer/global_step": clock.steps})

    def close(self, failed: bool) -> None:
        """Close the view, with the run's exit status."""
        if self._run is not None:
            with self._trouble_is_a_note():
                self._run.finish(exit_code=1 if failed else 0)
            self._run = None


def logged_in() -> bool:
    """True where this machine has a key of Weights & Biases; asks no server."""
    import wandb

    return bool(wandb.api.api_key)


def dashboard_values(event: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an event that a dashboard shows (docs/dashboard.md): numbers, and the protocol as JSON.

    The part of a key before its first slash is the panel's section. Values that modules log through Lightning, event
    ``metrics``, bring their own section (``val/loss``).
    """
    if event in ("start", "end", "picture"):  # Pictures are shown by picture().
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
