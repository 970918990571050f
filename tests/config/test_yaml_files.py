"""One loader for all YAML: no key twice, anchors and merges as always, 1e5 is a whole number."""

from __future__ import annotations

import pytest
import yaml

from lit_diffusion.config.parser import Parser
from lit_diffusion.config.yaml_files import Loader, read_yaml
from lit_diffusion.errors import UserError


def load(text):
    return yaml.load(text, Loader)


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 1, 3),
        ("a: 1\n'a': 2\n", "a", 1, 2),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 3\n", "a.b.c", 3, 5),
        ("a:\n  b: 1\na.b: 2\n", "a.b", 2, 3),
        ("a.b.c: 1\na: {d: 1}\na.b: {c: 2}\n", "a.b.c", 1, 3),
        ("m:\n  k: 1\nm.init_args.k: 2\n", "m.init_args.k", 2, 3),
        ("l:\n- a: 1\n- a: 1\n  b: 2\n  a: 3\n", "l[1].a", 3, 5),
        ("x: &x\n  a: 1\n  a: 2\ny: *x\n", "x.a", 2, 3),
        ("y:\n  <<: {a: 1,\n   a: 2}\n", "a", 2, 3),
        ("a: ${b}\nb: 1\na: 2\n", "a", 1, 3),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(text, key, first, second, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "file.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'file.yaml'}: the key {key!r} is given twice, in lines {first} and {second}; keep one of them"
    )


def test_twice_on_one_line():
    with pytest.raises(UserError, match=r"the key 'a.b' is given twice, in line 1, both times"):
        load("{a: {b: 1, b: 2}}")


def test_anchors_and_merges_may_override_and_equal_keys_of_other_mappings_are_none():
    assert load("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\nz: [*x, *x]") == {
        "x": {"a": 1, "b": 2},
        "y": {"a": 1, "b": 3},
        "z": [{"a": 1, "b": 2}] * 2,
    }
    assert load("a: {k: 1}\na.l: 2\nb: {k: 1}") == {"a": {"k": 1}, "a.l": 2, "b": {"k": 1}}
    assert load("k: [1]\nk+: [2]") == {"k": [1], "k+": [2]}
    inside_of_itself = load("a: &a [1, *a]")["a"]
    assert inside_of_itself[1] is inside_of_itself


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e5", 100_000),
        ("1E+5", 100_000),
        ("1.5e3", 1500),
        ("-2e3", -2000),
        ("1_0e1", 100),
        ("1.0e5", 100_000),
        ("1e-4", 1e-4),
        ("1.5e0", 1.5),
        ("1e0", 1.0),
        ("1.25e1", 12.5),
        ("3.0", 3.0),
        ("1e400", float("inf")),
        (".inf", float("inf")),
        ("10_000", 10_000),
        ("2020-01-01", "2020-01-01"),
    ],
)
def test_numbers(text, value):
    found = load(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("mode", ["yaml", "omegaconf+"])
def test_jsonargparse_reads_files_and_words_the_same_way(mode, tmp_path):
    """Which guards the two names of jsonargparse's that the loader takes the place of."""
    parser = Parser(parser_mode=mode)
    parser.add_argument("--config", action="config")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--name", type=str)
    parser.add_argument("--many", type=list[int])
    (tmp_path / "f.yaml").write_text("images: 1e5\nrate: 1e3\nmany: [1e2, 2]\n")
    words = ["--images", "1e5", "--rate=1e3", "--name", "1e5", "--many=[1e2,2]"]
    for arguments, name in ((["--config", str(tmp_path / "f.yaml")], None), (words, "1e5")):
        found = parser.parse_args(arguments)
        assert (found.images, found.rate, found.name, found.many) == (100_000, 1000.0, name, [100, 2])
        assert isinstance(found.rate, float)
    (tmp_path / "f.yaml").write_text("images: 1\nrate: 1\nimages: 2\n")
    with pytest.raises(UserError, match=r"f.yaml: the key 'images' is given twice, in lines 1 and 3"):
        parser.parse_args(["--config", str(tmp_path / "f.yaml")])


def test_what_is_no_yaml_is_named(tmp_path):
    for content in (b"a: [1", b"\xff\xfe\x00"):
        (tmp_path / "f.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"f.yaml cannot be read \(no YAML\)"):
            read_yaml(tmp_path / "f.yaml")
