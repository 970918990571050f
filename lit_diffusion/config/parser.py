"""The command line's parser: jsonargparse, with one plain sentence for each mistake.

A class in a configuration has a parser of its own, and a mistake inside of it passes through all enclosing parsers. The
innermost knows most: the class, its keys, and their types. It makes a
:class:`~lit_diffusion.config.messages.Refusal`, and each enclosing parser puts its own key in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from lit_diffusion.config.messages import explain
from lit_diffusion.config.trust import allow_packages
from lit_diffusion.errors import UserError


class Parser(ArgumentParser):
    """Parser that explains a mistake in one line, and imports nothing from packages that are not allowed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        allow_packages()
        # An abbreviated key would count, but not be found where this project looks for its full name.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.of_class: type | None = None
        """The class whose arguments it parses, None for the parser of a command."""

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Add a class's arguments as jsonargparse does, and remember the class."""
        if nested_key is None and not self.exit_on_error:
            self.of_class = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        """Refuse null and numbers for a group of keys, which jsonargparse accepts and silently ignores."""
        if type(action).__name__ == "_ActionConfigLoad" and not isinstance(value, (str, Mapping, Namespace)):
            raise TypeError(f"Parser key \"{key}\": Unable to load config '{'null' if value is None else value}'")
        return super()._check_value_key(action, value, key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the explained mistake.

        Raises:
            UserError: with the one line that the command line prints.
        """
        refusal = explain(self, message)
        if not self.exit_on_error:  # The parser of a class inside a configuration.
            super().error(refusal.packed(), ex)  # Which raises.
        raise UserError(refusal.sentence()) from ex


@contextmanager
def users_own_errors() -> Iterator[None]:
    """Context that raises a constructor's own UserError where jsonargparse has wrapped it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__
        raise
