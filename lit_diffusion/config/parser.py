"""The command line's parser: jsonargparse, with one plain sentence for each mistake.

A class in a configuration has a parser of its own, and a mistake inside of it passes through all parsers around. The
innermost knows most: which class it is, which keys it has, what each takes. It makes a
:class:`~lit_diffusion.config.messages.Refusal`, and those around it put the key by which they know it in front of its
own.
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
    """Says what is wrong in one line, and imports nothing from packages that are not allowed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        allow_packages()
        # A key is given by its name: one that is cut short would count without being where its name is looked for.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.of_class: type | None = None
        """The class whose arguments these are, where it is the parser of a class in a configuration."""

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's; remembers the class."""
        if nested_key is None and not self.exit_on_error:
            self.of_class = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, which takes null and numbers for a group of keys and then leaves them out in silence."""
        if type(action).__name__ == "_ActionConfigLoad" and not isinstance(value, (str, Mapping, Namespace)):
            raise TypeError(f"Parser key \"{key}\": Unable to load config '{'null' if value is None else value}'")
        return super()._check_value_key(action, value, key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints as one line."""
        refusal = explain(self, message)
        if not self.exit_on_error:  # The parser of a class inside a configuration.
            super().error(refusal.packed(), ex)  # Which raises.
        raise UserError(refusal.sentence()) from ex


@contextmanager
def users_own_errors() -> Iterator[None]:
    """Let a constructor's own UserError through where jsonargparse wraps it in one of its types."""
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
