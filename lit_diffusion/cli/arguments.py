"""Precedence of command-line arguments: sorted so that the later one wins.

Configuration files come first, in their order, and everything that is given on the command line after them, wherever it
stands: a value typed for this run beats a file. For the same reason a value for a whole group (``--trainer FILE``,
``--model.sampler DDIM``) comes before the values inside of it (``--model.sampler.steps 20``). Of one key given twice
the last counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_diffusion.errors import UserError

_PACKAGE = Path(__file__).parent.parent


class _Given(NamedTuple):
    """An option as it was typed.

    Attributes:
        key: its dotted key; empty for the words before the first option.
        value: its value, None where there is none.
        typed: the option and all words that follow it.
    """

    key: str
    value: str | None
    typed: list[str]


def in_order(arguments: Sequence[str]) -> list[str]:
    """Sort the arguments by precedence, lowest first.

    ``--config experiments/NAME.yaml`` means the packaged file where there is no such file in the working directory.

    Raises:
        UserError: for a configuration file that does not exist.
    """
    first: list[str] = []
    files: list[str] = []
    others: list[_Given] = []
    for given in _options(arguments):
        if given.key == "config" and given.value is not None:
            files += ["--config", str(_config_path(given.value))]
            first += given.typed[2 if given.value in given.typed else 1 :]  # Too many: the parser refuses them.
        elif given.key in ("", "config"):
            first += given.typed
        else:
            others.append(given)
    # Items are appended to a list (--key+=ITEM) and then given their values (--key.VALUE), one after the other.
    lists = [given.key.removesuffix("+") for given in others if given.key.endswith("+")]

    def depth(given: _Given) -> int:
        return next((key.count(".") for key in lists if f"{given.key}.".startswith(f"{key}.")), given.key.count("."))

    others.sort(key=depth)  # A stable sort: equal keys stay in their order.
    return [*first, *files, *(argument for given in others for argument in given.typed)]


def last_value(arguments: Sequence[str], key: str) -> str | None:
    """The value of the last ``--key VALUE`` or ``--key=VALUE``; None where there is none, or the last says null."""
    values = [given.value for given in _options(arguments) if given.key == key and given.value is not None]
    return values[-1] if values and values[-1] != "null" else None


def _options(arguments: Sequence[str]) -> list[_Given]:
    """Split the arguments into options.

    A class is named by ``--model NAME`` or ``--model.class_path NAME``, and its keys are given with ``init_args`` in
    between or without: the dotted key has neither.
    """
    found = [_Given("", None, [])]
    for argument in arguments:
        if argument.startswith("-c"):  # -c FILE, -c=FILE or -cFILE
            value = argument[2:].removeprefix("=") or None
            found.append(_Given("config", value, [argument]))
        elif argument.startswith("--"):
            option, equals, value = argument.partition("=")
            key = option[2:].replace(".init_args.", ".").removesuffix(".class_path").removesuffix(".init_args")
            found.append(_Given(key, value if equals else None, [argument]))
        else:
            last = found[-1]
            value = argument if len(last.typed) == 1 and last.key and last.value is None else last.value
            found[-1] = last._replace(value=value, typed=[*last.typed, argument])
    return found


def _config_path(given: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    packaged = packaged_experiment(given)
    if packaged is not None:
        return packaged
    raise UserError(f"configuration file {given} does not exist; the shipped ones are experiments/*.yaml")


def packaged_experiment(name: str) -> Path | None:
    """Path of the shipped configuration ``experiments/...``, None where there is none of that name."""
    inside = _PACKAGE / name
    beside = _PACKAGE.parent / name
    if not name.startswith("experiments/"):
        return None
    return next((path for path in (inside, beside) if path.is_file()), None)
