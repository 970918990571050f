"""Errors that the user reads as one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import Namespace  # doctor imports this module where jsonargparse may be broken.


class UserError(Exception):
    """A mistake that the user can fix: a wrong key, a missing file, a step that must diverge.

    The message is one line: what is wrong, with the name and the value, and how to fix it. The command line prints it
    without a traceback and exits with code 2; in a notebook it is an ordinary exception.

    Args:
        message: the line.
        ends_run: if true, it ends a training wherever it happens; otherwise, where only a picture or a metric is
            lost, it is printed and the training goes on.
    """

    def __init__(self, message: str = "", ends_run: bool = False) -> None:
        super().__init__(message)
        self.ends_run = ends_run


def require_choice(owner: str, key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices; ``owner`` is named in front of the key, unless it is empty.

    Raises:
        UserError: naming the key, the value, the choices and the nearest of them.
    """
    if value not in choices:
        where = f"{owner}: " if owner else ""
        raise UserError(f"{where}{key} is {value!r}; choose one of {', '.join(choices)}{meant(value, choices)}")


def meant(value: str, choices: Collection[str]) -> str:
    """Text asking for the choice that may have been meant, to follow a list of them; empty where none is near."""
    near = nearest(str(value), choices)
    return f" (did you mean {near!r}?)" if near else ""


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """The known name nearest to what was typed, but not equal to it; None where none is near."""

    def likeness(name: str) -> float:
        same = typed.rpartition(".")[0] == name.rpartition(".")[0]
        one, other = (key.rpartition(".")[2] if same else key for key in (typed.lower(), name.lower()))
        if one and other.startswith(one):  # An abbreviation.
            return 0.99
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((one, other), (other, one)))

    best = max((name for name in known if name != typed), key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def require_positive(options: Namespace, *keys: str) -> None:
    """Refuse options below 1.

    Raises:
        UserError: naming the option.
    """
    for key in keys:
        if options[key] < 1:
            raise UserError(f"--{key} is {options[key]}; give a positive number")
