"""Checks of ``doctor``: the installation, the machine, and a recipe before it is trained.

A check is a function that yields findings, each of one line. :mod:`~lit_diffusion.checks.installation` and
:mod:`~lit_diffusion.checks.machine` import nothing heavy at their top, so that they can report what is broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "note", "warning", "problem"]
"""``ok``: nothing to do. ``note``: good to know. ``warning``: it runs, and probably not as meant. ``problem``: it
cannot run."""

SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "ok")


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        severity: ``ok``, ``note``, ``warning`` or ``problem``.
        what: what was found.
        fix: what to do about it; empty where there is nothing to do.
    """

    severity: Severity
    what: str
    fix: str = ""

    def __str__(self) -> str:
        """The finding in one line."""
        return " ".join(f"{self.severity:<8} {self.what}{f'; {self.fix}' if self.fix else ''}".split("\n"))


def ok(what: str) -> Finding:
    """Finding of severity ``ok``: nothing to do."""
    return Finding("ok", what)


def note(what: str, fix: str = "") -> Finding:
    """Finding of severity ``note``: good to know."""
    return Finding("note", what, fix)


def warning(what: str, fix: str) -> Finding:
    """Finding of severity ``warning``: it runs, and probably not as meant."""
    return Finding("warning", what, fix)


def problem(what: str, fix: str = "") -> Finding:
    """Finding of severity ``problem``: it cannot run; an error's own line may hold the fix already."""
    return Finding("problem", what, fix)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message, cut to 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def in_bytes(count: float) -> str:
    """Format a number of bytes for a reader: ``13.4 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.4g} TB"
