"""The command line's parser: jsonargparse, with one line for each mistake."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from lit_diffusion.errors import UserError

_TYPE_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


ALLOWED = ("lit_diffusion", "torch.optim", "lightning.pytorch")
"""Packages whose classes a configuration may name, and a checkpoint's, which may be a stranger's: importing a module
runs it. Each value must also be a class of the kind that its key takes."""

ALLOW = "LIT_DIFFUSION_ALLOW"
"""Variable of the environment with further packages, separated by commas."""


def allow_packages() -> None:
    """Let class paths name the packages of :data:`ALLOWED` and :data:`ALLOW` and no others.

    Raises:
        UserError: if the variable does not hold names of packages.
    """
    more = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *more])
    except ValueError as error:
        raise UserError(f"{ALLOW} is {os.environ[ALLOW]!r}; give names of packages separated by commas") from error


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and imports nothing from packages that are not allowed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        allow_packages()
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints as one line."""
        raise UserError(explain(message, known_keys(self))) from ex


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


def _subclasses(base: type) -> Iterator[type]:
    child: type
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)


def _families() -> dict[str, type]:
    """The base class of what each key's ``class_path`` names."""
    from lit_diffusion.backbones.base import Backbone
    from lit_diffusion.data.source import Source
    from lit_diffusion.methods.base import Method
    from lit_diffusion.processes import Process
    from lit_diffusion.samplers.base import Predictor, Sampler

    return {
        "model": Method,
        "backbone": Backbone,
        "process": Process,
        "sampler": Sampler,
        "predictor": Predictor,
        "source": Source,
        "held_out": Source,
    }


def _choices(base: type) -> list[str]:
    found = {c.__name__ for c in _subclasses(base) if not inspect.isabstract(c) and not c.__name__.startswith("_")}
    return sorted(name for name in found if name != "InMemory")


def known_keys(parser: LightningArgumentParser) -> list[str]:
    """Every key that a person may have meant: the parser's own and the arguments of the project's classes."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action.choices, Mapping):  # the subcommands
            parsers += [choice for choice in action.choices.values() if isinstance(choice, LightningArgumentParser)]
    keys = [action.dest for each in parsers for action in each._actions]
    for base in _families().values():
        for child in _subclasses(base):
            keys += list(inspect.signature(child).parameters)
    return keys


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(dict.fromkeys(known)), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "; --help lists the keys"


def explain(message: str, known: Iterable[str] = ()) -> str:
    """What a parser's nested report comes down to: the key, the value, the mend.

    Args:
        message: of jsonargparse, with its unions, types and dumps.
        known: keys to suggest from.
    """
    text = str(message)
    path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    # A nested parser has explained its part already: only say where it was.
    if match := re.search(r"Importing '([^']+)' is not allowed", text):
        return (
            f"{path}: {match[1]!r} is not in {', '.join(ALLOWED)}; if you trust it, set the variable "
            f"{ALLOW}={match[1]}, or to the package that it is in"
        )
    if match := re.search(r"(\S+: '[^']+' is not in [^\n]+)", text):  # A nested parser's.
        return f"{path}.{match[1]}" if path else match[1]
    if match := re.search(r"(\S+ is '[^']*'; it must be [^\n]+)", text):
        return f"{path}.{match[1]}" if path else match[1]
    if match := re.search(r"(there is no (?:key|class) '[^\n]+)", text):
        return f"{path}: {match[1]}" if path else match[1]
    if path and (match := re.search(r"not given: ([^;\n]+);", text)):
        return f"{path}: not given: {match[1]}; give a value for each"
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        key = match[1]
        below = f" below {path}" if path else ""
        return f"there is no key {key!r}{below}{_nearest(key, known)}"
    if match := re.search(r"does not accept option '([^']+)'|unrecognized arguments: --(\S+)", text):
        key = match[1] or match[2].partition("=")[0]
        return f"there is no key {key!r}{_nearest(key, known)}"
    if match := re.search(r"Expected a (?!<class 'NoneType'>)(.+?)\. Got value: ([^\n]*)", text):
        wanted, value = match[1], match[2].strip().rstrip(">")
        if literal := re.search(r"Literal\[(.*)\]", wanted):
            need = f"one of {literal[1]}"
        else:
            name = re.sub(r"<class '([^']+)'>", r"\1", wanted).removeprefix("typing.")
            need = _TYPE_WORDS.get(name, name)
        return f"{path} is {value!r}; it must be {need}"
    if match := re.search(r"Expected a <class 'list'>[\s\S]*Given value: ([^\n]*)", text):
        of = re.search(r"list\[typing\.Literal\[([^\]]*)\]", text)
        return f"{path} is {match[1]!r}; it must be a list in brackets" + (f" of any of {of[1]}" if of else "")
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        name = match[1].rstrip(">")
        base = _families().get(path.rpartition(".")[2])
        names = _choices(base) if base is not None else []
        choose = f"; choose one of {', '.join(names)}" if names else "; give an importable class path"
        return f"{path}: there is no class {name!r}{choose}"
    either = r"Errors:\n((?: +- Expected a (?:<class '\w+'>|typing\.Literal\[.*\])\n)+) +Given.*\n +Given value: (.*)"
    if path and (match := re.search(either, text)) and "Literal" in match[1]:
        wanted = re.findall(r"<class '(\w+)'>|Literal\[(.*)\]", match[1])
        need = " or ".join(_TYPE_WORDS.get(name, name) if name else literal for name, literal in wanted)
        return f"{path} is {match[2]!r}; it must be {need}"
    if match := re.search(r"the following arguments are required: (.*)", text):
        keys = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        return f"not given: {keys}; give a configuration, e.g. --config experiments/ncsn.yaml, or --ckpt_path"
    if "Problems parsing config" in text or "Unexpected config" in text:
        detail = " ".join(text.split()).replace("Problems parsing config: ", "")
        return f"a configuration is not valid YAML of keys and values: {detail[:200]}"
    condensed = [line.strip(" -") for line in text.splitlines() if "NoneType" not in line and "Given value" not in line]
    return " ".join(" ".join(condensed).split())[:300]
