"""What ``doctor`` looks at: the installation, the machine, and a recipe before it is trained.

A check is a function that yields findings; each says one thing in one line. :mod:`~lit_diffusion.checks.installation`
and :mod:`~lit_diffusion.checks.machine` import nothing heavy at their top, so that they can say what is broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "note", "warning", "problem"]
"""``note``: good to know. ``warning``: it runs, and probably not as meant. ``problem``: it cannot run."""

SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "ok")


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        level: how bad it is.
        what: was found.
        mend: what to do about it; empty where there is nothing to do.
    """

    severity: Severity
    what: str
    mend: str = ""

    def __str__(self) -> str:
        """The line."""
        return " ".join(f"{self.severity:<8} {self.what}{f'; {self.mend}' if self.mend else ''}".split("\n"))


def ok(what: str) -> Finding:
    """As it should be."""
    return Finding("ok", what)


def note(what: str, mend: str = "") -> Finding:
    """Good to know."""
    return Finding("note", what, mend)


def warning(what: str, mend: str) -> Finding:
    """It runs, and probably not as meant."""
    return Finding("warning", what, mend)


def problem(what: str, mend: str = "") -> Finding:
    """It cannot run; the mend may be in an error's own line."""
    return Finding("problem", what, mend)


def first_line(error: BaseException) -> str:
    """An error in one line of bearable length."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def in_bytes(count: float) -> str:
    """A number of bytes for a reader: ``13.4 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.4g} TB"
