"""One plain sentence for each mistake in a configuration, in place of jsonargparse's reports."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin
from urllib.parse import quote, unquote

from lit_diffusion.config.trust import ALLOW, ALLOWED, allowed_packages
from lit_diffusion.config.yaml_files import being_read  # Importing it also makes its loader jsonargparse's.
from lit_diffusion.errors import nearest

if TYPE_CHECKING:
    from lit_diffusion.config.parser import Parser

OFF = {
    "eval": "--eval.every_n_images null --eval.every_n_steps null evaluates nothing while training, --eval.metrics "
    "'[]' nothing at all",
    "samples": "--samples.count 0 draws none",
    "noise_levels": "--noise_levels.num_levels 0 draws none",
    "likelihood": "--likelihood.metrics '[]' measures none",
    "ema": "--ema.half_lives_images null --ema.half_lives_steps null keeps no average",
    "telemetry": "--telemetry.every_n_images null --telemetry.every_n_steps null records none",
    "checkpoint": "--checkpoint.every_n_images null --checkpoint.every_n_steps null writes one at the end only",
    "wandb": "--wandb.mode disabled leaves it out",
}
"""Advice on switching off what a group of keys configures."""


class Refusal(NamedTuple):
    """A mistake in a key.

    Attributes:
        key: the dotted key, as seen by the parser; empty for the whole.
        words: the message; ``<key>`` stands for the key, ``<key.>`` for the key and a dot.
    """

    key: str
    words: str

    def sentence(self) -> str:
        """The message with the key filled in."""
        dotted = f"{self.key}." if self.key else ""
        return self.words.replace("<key.>", dotted).replace("<key>", self.key)

    def packed(self) -> str:
        """Encode it as one word, which jsonargparse neither breaks nor abridges."""
        return f"\x02{quote(json.dumps(self))}\x03"

    @classmethod
    def unpack(cls, message: str) -> Refusal | None:
        """Decode the refusal with the deepest key in a message; None where there is none."""
        found = [cls(*json.loads(unquote(text))) for text in re.findall("\x02(.*?)\x03", message)]
        return max(found, key=lambda refusal: refusal.key.count("."), default=None)

    def below(self, key: str) -> Refusal:
        """The same refusal with the key that the enclosing parser knows."""
        return self._replace(key=".".join(part for part in (key, self.key) if part))


def explain(parser: Parser, message: str) -> Refusal:
    """Translate a report of jsonargparse: the key, the value, what the key takes, the fix."""
    named = max(re.findall(r'Parser key "([^"]+)"', message), key=len, default="")
    key = re.sub(r"(^|\.)init_args\.", r"\1", re.sub(rf"^({'|'.join(_subcommands(parser)) or '-'})\.", "", named))
    if refusal := Refusal.unpack(message):
        return refusal.below(key)
    for pattern, make in REPORTS.items():
        if match := re.search(pattern, message):
            return make(parser, key, match, message)
    return Refusal(key, ("<key>: " if key else "") + _short(message, 300))


def _not_allowed(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    if _names_a_file(match[1]):
        return Refusal(key, f"<key> is {match[1]!r}; there is no such file here")
    return Refusal(
        key,
        f"<key>: {match[1]!r} is not in {', '.join(ALLOWED)}; if you trust it, set the variable {ALLOW}={match[1]}, or "
        f"to the package that it is in",
    )


def _given_twice(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    return Refusal("", match[1])


def _no_value(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    option = match[1].rpartition("/")[2]
    return Refusal("", f"{option} needs a value, {option} VALUE")


def _not_given(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    missing = [re.sub(rf"^({'|'.join(_subcommands(parser)) or '-'})\.", "", name) for name in match[1].split(", ")]
    if parser.of_class is not None:
        return Refusal(
            key,
            f"<key>: not given: {', '.join(missing)}; {parser.of_class.__name__} needs a value for each, e.g. "
            f"--<key.>{missing[0]} VALUE",
        )
    if {"model", "data.source"} & set(missing):
        fix = "give a configuration, e.g. --config experiments/ncsn.yaml, or --ckpt_path"
    else:
        fix = "give a value for each"
    return Refusal(key, f"not given: {', '.join(missing)}; {fix}")


def _no_such_key(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    named = next(text for text in match.groups() if text is not None)
    typed = named.split(" ")[0].partition("=")[0]
    if not typed.startswith("-") and "unrecognized" in match[0]:
        return Refusal("", f"{typed!r} is no argument here; arguments are given as --KEY VALUE, and --help lists them")
    typed = typed.lstrip("-")
    if match.lastgroup == "option" and match["group"]:
        typed = f"{match['group']}.{typed}"
    wrong = typed.removeprefix("init_args.")
    keys = _keys(parser)
    parent = next((k for k in keys if wrong.startswith(f"{k}.") and _type_of(parser, k) is not None), None)
    if parent is not None:
        return _nothing_below(parser, parent, wrong[len(parent) + 1 :])
    if parser.of_class is None:
        return Refusal(
            "", f"there is no key {wrong!r}{_guess(wrong, keys, _known_elsewhere(parser)) or '; --help lists the keys'}"
        )
    if parser.of_class in _families().values():
        return Refusal(
            key, f"<key>: {wrong!r} is given and no class; give class_path, {_one_of(class_names([parser.of_class]))}"
        )
    guess = _guess(wrong, keys)
    said = f"<key>: {parser.of_class.__name__} has no key {wrong!r}{_owners(parser.of_class, wrong)}{guess or ';'} "
    return Refusal(key, f"{said}{'It' if guess else 'it'} has {', '.join(keys) or 'none'}")


def _nothing_below(parser: Parser, key: str, below: str) -> Refusal:
    takes = takes_of(_type_of(parser, key))
    return Refusal(key, f"there is no key '<key.>{below}': <key> takes {takes} and has no keys of its own")


def _no_class(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    hint = _type_of(parser, key)
    bases = _classes(hint)
    names = class_names(bases)
    if not names:
        return _wrong_value(parser, key, match, message)
    value = next((text for text in match.groups() if text is not None), "").rstrip(">)").strip("'")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", value) or value in ("None", "True", "False"):
        return _wrong_value(parser, key, match, message)
    if _names_a_file(value):
        return Refusal(key, f"<key> is {value!r}; there is no such file here")
    near = nearest(value.rpartition(".")[2], names)
    guess = f"; did you mean {near!r}?" if near else ""
    if "abstract" in match[0]:
        said = f"<key>: {value!r} is what its kind have in common, and cannot be used itself"
    elif "subclass" in match[0]:
        said = f"<key>: {value!r} is not of the kind that is needed here"
    else:
        said = f"<key>: there is no class {value!r}"
    return Refusal(key, f"{said}{guess or ';'} {'Choose' if guess else 'choose'} {_one_of(names)}")


def _no_arguments(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    return Refusal(key, "<key.>init_args is no mapping; it takes the class's keys with their values, or leave it out")


def _no_group(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    value = match[1]
    keys = [known for known in _keys(parser) if known.startswith(f"{key}.")]
    example = f", e.g. --{keys[0]} VALUE," if keys else ""
    said = f"<key> is {value!r}; it takes its keys one by one{example} or a YAML file of them"
    if _names_a_file(value):
        said = f"<key> is {value!r}; there is no such file here"
    off = f"; {OFF[key]}" if key in OFF and value in ("null", "None", "false", "False", "none", "off", "0") else ""
    return Refusal(key, said + off)


def _no_configuration(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    where = re.sub(r'in "<unicode string>", ', "in ", match[1])
    said = f"is not valid YAML of keys and values: {_short(where, 200)}" if match[1].strip() else "has no keys"
    return Refusal("", f"{being_read()}a configuration {said}")


def _loop(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    return Refusal("", f"configuration files name each other in a circle: {match[1]}; take one of the names out")


def _no_flag(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    return Refusal("", f"--print_config is {match[1]!r}; it takes nothing, skip_default or skip_unset")


def _wrong_value(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    if below := re.search(r"NestedArg\(key='([^']+)'", message):
        return _nothing_below(parser, key, below[1])
    whole = re.findall(r"Given value: (.*)", message)
    parts = re.findall(r"^(?!.*NoneType).*\. Got value: (.*)", message, re.MULTILINE)
    given = whole[-1] if whole and not (parts and whole[-1].startswith(("[", "(", "{"))) else (parts or [""])[0]
    given = given.strip()
    value = {"None": "null", "True": "true", "False": "false"}.get(given, given)
    if _classes(_type_of(parser, key)) and (refusal := _wrong_section(parser, key, value)):
        return refusal
    return Refusal(key, f"<key> is {_short(value, 60)!r}; it must be {takes_of(_type_of(parser, key))}")


def _wrong_section(parser: Parser, key: str, value: str) -> Refusal | None:
    """Refuse a wrong mapping for a class; None where it is no mapping, or nothing is wrong."""
    try:
        section = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(section, dict):
        return None
    if "class_path" in section and not isinstance(section["class_path"], str):
        return Refusal(
            key,
            f"<key.>class_path is {section['class_path']!r}; it must be {takes_of(_type_of(parser, key))}",
        )
    if others := [name for name in section if name not in ("class_path", "init_args", "dict_kwargs")]:
        return Refusal(
            key,
            f"there is no key '<key.>{others[0]}' beside class_path and init_args; the class's own keys stand below "
            f"<key.>init_args",
        )
    return None


def _no_text(parser: Parser, key: str, match: re.Match[str], message: str) -> Refusal:
    return Refusal("", f"{being_read()}a key of the configuration is {_short(match[1], 60)}; keys are words")


REPORTS: Mapping[str, Callable[[Parser, str, re.Match[str], str], Refusal]] = {
    r"Importing '([^']+)' is not allowed": _not_allowed,
    r"- ([^\n]* the key '[^\n]* is given twice[^\n]*)": _given_twice,
    r"argument ([^\s:]+): expected (?:one|at least one) argument": _no_value,
    r"the following arguments are required: (.*)": _not_given,
    r"(?:Group '(?P<group>[^']+)'|Subcommand '[^']+') does not accept option '(?P<option>[^']+)'": _no_such_key,
    r"Option '([^']+)' is not accepted": _no_such_key,
    r"unrecognized arguments: (.*)": _no_such_key,
    r"Config file loop detected: (.*)": _loop,
    r"Unable to load config '(.*)'": _no_group,
    r"(?:Problems parsing|Unexpected) config: ([\s\S]*)": _no_configuration,
    r"Key must be a string, got: (.*)\.": _no_text,
    r'Invalid option "(.*)" for --print_config': _no_flag,
    r"'(\w+)' object has no attribute 'keys'": _no_arguments,
    r"Import path (\S+) does not correspond to a subclass": _no_class,
    r"Expected '(\S+)' to be a (?:subclass of|class that|function)": _no_class,
    r"Expected an instantiatable class, but (\S+) is abstract": _no_class,
    r"Problem with given class_path '([^']+)'": _no_class,
    r"Unexpected import path format: (.*)": _no_class,
    r"Expected a dot import path string: (\S+)": _no_class,
    r"(?:Expected|Does not validate|Not a valid|expects|not among choices|not a valid|[Ii]nvalid)": _wrong_value,
}
"""Patterns of jsonargparse 4.53's reports, and the functions that translate them; the first match counts."""


def _subcommands(parser: Parser) -> list[str]:
    return [
        name for action in parser._actions if isinstance(action, argparse._SubParsersAction) for name in action.choices
    ]


def _keys(parser: Parser) -> list[str]:
    """A parser's own keys and its subcommands'."""
    parsers: list[Any] = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += list(action.choices.values())
    keys = [action.dest for each in parsers for action in each._actions if action.option_strings or action.type]
    return [key for key in dict.fromkeys(keys) if not re.search(r"^(help|config|print_.*|==.*)$|\.help$", key)]


def _type_of(parser: Parser, key: str) -> Any:
    """The type of a key's value; None where it is not known."""
    parsers: list[Any] = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += list(action.choices.values())
    found = [action for each in parsers for action in each._actions if action.dest == key]
    return next((action._typehint for action in found if hasattr(action, "_typehint")), None)


def _subclasses(base: type) -> Iterator[type]:
    child: type
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)


def class_names(bases: Collection[type]) -> list[str]:
    """Names of the classes that can be given where one of ``bases`` is taken."""
    found = dict.fromkeys(child for base in bases for child in (base, *_subclasses(base)))
    names = [child.__name__ for child in found if _is_public(child)]
    # A base class is hardly meant, unless it is the only one.
    return sorted({*names} - {base.__name__ for base in bases}) or sorted({*names})


def _is_public(child: type) -> bool:
    allowed = tuple(f"{name}." for name in allowed_packages())
    hidden = child.__name__.startswith("_") or "<locals>" in child.__qualname__ or child.__name__ == "InMemory"
    return f"{child.__module__}.".startswith(allowed) and not inspect.isabstract(child) and not hidden


_FAMILIES = {
    "model": ("lit_diffusion.methods.base", "Method"),
    "model.backbone": ("lit_diffusion.backbones.base", "Backbone"),
    "model.process": ("lit_diffusion.processes.base", "Process"),
    "model.sampler": ("lit_diffusion.samplers.base", "Sampler"),
    "data.source": ("lit_diffusion.data.source", "Source"),
}
"""Module and name of the base class for each key of ``fit`` that names a class."""


def _families() -> dict[str, type]:
    """Base classes by their keys, those that are loaded, as all are where the keys of ``fit`` are parsed."""
    return {
        key: getattr(sys.modules[module], name) for key, (module, name) in _FAMILIES.items() if module in sys.modules
    }


def _known_elsewhere(parser: Parser) -> list[str]:
    """Keys of classes that a parser's keys can name."""
    keys = set(_keys(parser))
    return [
        f"{key}.{name}"
        for key, base in _families().items()
        if key.partition(".")[0] in {known.partition(".")[0] for known in keys}
        for child in _subclasses(base)
        for name in inspect.signature(child).parameters
    ]


def _owners(owner: type, key: str) -> str:
    """Text naming the relatives of a class that have a key; empty where there are none."""
    family = [base for base in owner.__mro__ if base.__module__.startswith("lit_diffusion.")]
    relatives = [child for child in _subclasses(family[-1]) if _is_public(child)] if family else []
    name = key.partition(".")[0]
    have = sorted({child.__name__ for child in relatives if name in inspect.signature(child).parameters})
    return f" ({', '.join(have)} {'has' if len(have) == 1 else 'have'} it)" if have else ""


def _guess(typed: str, own: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """Text asking for the key that may have been meant: the same name further inside, or one spelled nearly so."""
    inside = [key for key in (*own, *elsewhere) if key.endswith(f".{typed}")]
    own, elsewhere = ([key for key in keys if not typed.startswith(f"{key}.")] for keys in (own, elsewhere))
    near = inside[0] if inside else (nearest(typed, own) or nearest(typed, elsewhere))
    return f"; did you mean {near!r}?" if near else ""


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


_MANY = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


_UNIONS = (Union, UnionType)


def takes_of(hint: Any) -> str:
    """Description of the values that a key of this type takes."""
    if get_origin(hint) in _UNIONS:
        members = [member for member in get_args(hint) if not _is_other(member, hint)]
        said = list(dict.fromkeys(takes_of(member) for member in members if member is not NoneType))
        return " or ".join([*said, *(["null"] if NoneType in members else [])])
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        choices = ", ".join("true" if c is True else "false" if c is False else repr(c) for c in inner)
        return f"one of {choices}" if len(inner) > 1 else choices
    if origin is tuple and inner and Ellipsis not in inner:
        return f"{len(inner)} values in brackets, each {' or '.join(dict.fromkeys(takes_of(each) for each in inner))}"
    if inspect.isclass(origin) and issubclass(origin, (list, tuple, set, Sequence)):
        return f"a list in brackets{_of_many(inner[0]) if inner else ''}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "keys and values in braces"
    if classes := _classes(hint):
        names = class_names(classes)
        return _one_of(names) if names else "the path of a class"
    name = getattr(hint, "__name__", "")
    return {"timedelta": "a time as DD:HH:MM:SS", "Path": "a path"}.get(name, "another value")


def _one_of(names: Sequence[str]) -> str:
    """List a few names in full, of many the first ones and their number."""
    return f"one of {', '.join(names if len(names) < 15 else [*names[:3], f'... ({len(names)} classes)'])}"


def _of_many(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f" of any of {', '.join(map(repr, get_args(hint)))}"
    return f" of {_MANY[hint]}" if hint in _MANY else ""


def _is_other(member: Any, union: Any) -> bool:
    """True for a member of a union that YAML cannot express, such as a tensor beside a number."""
    simple = any(each in _WORDS for each in get_args(union) if each is not NoneType)
    return simple and inspect.isclass(member) and member not in _WORDS and not class_names([member])


def _classes(hint: Any) -> list[type]:
    """The classes in a type, and those that a callable in it returns."""
    if get_origin(hint) in (*_UNIONS, list, tuple, Sequence, Iterable):
        return [found for member in get_args(hint) for found in _classes(member)]
    if get_origin(hint) is Callable and get_args(hint):
        return _classes(get_args(hint)[-1])
    simple = inspect.isclass(hint) and (hint in _WORDS or hint.__module__ in ("builtins", "datetime", "pathlib"))
    return [hint] if inspect.isclass(hint) and not simple and get_origin(hint) is None else []


def _names_a_file(value: str) -> bool:
    return Path(value).suffix in (".yaml", ".yml", ".json")


def _short(text: str, most: int) -> str:
    one = " ".join(text.split())
    return one if len(one) <= most else f"{one[: most - 3]}..."
