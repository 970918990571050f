"""The YAML loader for every file and value.

It differs from PyYAML's in three ways. A key that is given twice is an error, where PyYAML silently takes the last one
(YAML 1.2.2, section 3.2.1.3, forbids it); merge keys (``<<``) may be overridden as always. Numbers are those of
YAML 1.2: ``1e-4`` is a number and not text. And ``1e5`` is the whole number 100000, which is what people type for a
number of images; where a key takes any number it is the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonargparse._loaders_dumpers as loaders
import yaml
from jsonargparse._util import config_load_stack

from lit_diffusion.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"
_EXPONENT = re.compile(r"([-+]?[0-9][0-9_]*)(\.[0-9_]*)?[eE]\+?([0-9]+)")


class Loader(loaders.get_yaml_default_loader()):  # type: ignore[misc]  # a class made by a function
    """jsonargparse's loader, but with duplicate keys refused."""

    def construct_document(self, node: yaml.Node) -> Any:
        """Construct the document's value.

        Raises:
            UserError: if a key is given twice, nested or with dots.
        """
        _require_unique(node, "", {}, ())
        return super().construct_document(node)


def _number(loader: Any, node: yaml.ScalarNode) -> int | float:
    whole = _whole(node.value)
    return loader.construct_yaml_float(node) if whole is None else whole


def _whole(text: str) -> int | None:
    """The whole number that ``1e5`` or ``1.5e3`` stands for, None for any other text."""
    match = _EXPONENT.fullmatch(text.strip())
    if match is None or not 0 < int(match[3]) < 300 or not float(text).is_integer():
        return None
    return int(float(text))


Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _require_unique(node: yaml.Node, path: str, seen: dict[str, int], above: tuple[int, ...]) -> None:
    if id(node) in above:  # An anchor inside itself.
        return
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _require_unique(item, f"{path}[{number}]", seen, above)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                _require_unique(value, "", {}, above)
                continue
            inner = f"{path}.{key.value}" if path else key.value
            line = key.start_mark.line + 1
            meant = re.sub(r"\binit_args\.", "", inner)  # A class's keys may stand below init_args or not.
            if meant in seen:
                first = seen[meant]
                where = f"in line {line}, both times" if line == first else f"in lines {first} and {line}"
                raise UserError(f"{being_read()}the key {inner!r} is given twice, {where}; keep one of them")
            seen[meant] = line
            _require_unique(value, inner, seen, above)


def being_read() -> str:
    """Start of a message naming the file that is being parsed, and the file that names it; empty outside of files."""
    names = [name for _, name in config_load_stack.get()]
    if not names:
        return ""
    return f"{names[-1]}, which {names[-2]} names: " if len(names) > 1 else f"{names[-1]}: "


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: naming the file, if it is no YAML or has a key twice.
        OSError: if it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be read (no YAML): {' '.join(str(error).split())[:200]}") from error


def _load_basic(text: str) -> Any:
    whole = _whole(text)
    return _jsonargparse_basic(text) if whole is None else whole


# jsonargparse reads files through the loader that this variable names, whatever the parser's mode, and values on the
# command line through this function first. tests/config/test_yaml_files.py reads both ways.
loaders.yaml_default_loader = Loader  # type: ignore[assignment]  # declared as None
_jsonargparse_basic = loaders.load_basic
loaders.load_basic = _load_basic
