"""What a person should read as one line."""

from __future__ import annotations

from collections.abc import Collection


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a step that must diverge.

    The message is one line: what is wrong, with the name and the value, and how to mend it. The command line prints it
    without a traceback and exits with code 2; in a notebook it is an ordinary exception.

    Args:
        message: the line.
        ends_run: whether a training must end with it wherever it happens; others are told, and the training goes on,
            where only a picture or a metric is lost.
    """

    def __init__(self, message: str = "", ends_run: bool = False) -> None:
        super().__init__(message)
        self.ends_run = ends_run


def require_choice(owner: str, key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a word that is not among the choices; ``owner`` is named in front of the key, unless it is empty.

    Raises:
        UserError: naming the key, the value and the choices.
    """
    if value not in choices:
        where = f"{owner}: " if owner else ""
        raise UserError(f"{where}{key} is {value!r}; choose one of {', '.join(choices)}")
