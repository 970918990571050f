"""The clock of a run, images seen, from which steps, warm-ups, half-lives and cadences follow."""

from __future__ import annotations

from dataclasses import dataclass

from lit_diffusion.errors import UserError


@dataclass
class Clock:
    """Progress of a run.

    Attributes:
        images: training images seen by all processes together, skipped batches included.
        steps: optimizer steps, skipped ones included.
        batch: images per step over all processes; set when training starts.
    """

    images: int = 0
    steps: int = 0
    batch: int = 1

    def tick(self) -> None:
        """Count one step."""
        self.images += self.batch
        self.steps += 1


@dataclass(frozen=True)
class Cadence:
    """Interval in images seen or in steps; with both, due when either is; with neither, never due."""

    images: int | None = None
    steps: int | None = None

    @classmethod
    def of(cls, owner: str, images: int | None, steps: int | None) -> Cadence:
        """Make a cadence from the keys of ``owner``.

        Raises:
            UserError: for an interval that is not positive.
        """
        for key, value in (("every_n_images", images), ("every_n_steps", steps)):
            if value is not None and value < 1:
                raise UserError(f"{owner}.{key} is {value}; give a positive number, or null for never")
        return cls(images, steps)

    def due(self, clock: Clock) -> bool:
        """True where it is due after the step that the clock just counted."""
        by_images = (
            self.images is not None and clock.images // self.images > (clock.images - clock.batch) // self.images
        )
        return by_images or (self.steps is not None and clock.steps % self.steps == 0)


def in_images(owner: str, key: str, images: int | None, steps: int | None, batch: int) -> int:
    """Convert a length given as ``<key>_images`` or ``<key>_steps`` to images; 0 when neither is given.

    Raises:
        UserError: if both are given or one is negative.
    """
    if images is not None and steps is not None:
        raise UserError(f"{owner}: give {key}_images or {key}_steps, not both (set the other to null)")
    value = images if images is not None else (steps or 0) * batch
    if value < 0:
        raise UserError(f"{owner}: {key} is {value} images; it cannot be negative")
    return value
