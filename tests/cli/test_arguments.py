"""What is typed on a command line counts after every file, wherever it stands."""

from __future__ import annotations

import pytest

from lit_diffusion.cli.arguments import in_order, last_value
from lit_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("typed", "ordered"),
    [
        ("fit --a 1 --config x.yaml", "fit --config x.yaml --a 1"),
        ("fit --a=1 --config=x.yaml --b 2 --config y.yaml", "fit --config x.yaml --config y.yaml --a=1 --b 2"),
        ("fit -c x.yaml --a 1 -c=y.yaml -cx.yaml", "fit --config x.yaml --config y.yaml --config x.yaml --a 1"),
        ("fit --a 1 --a 2 --config x.yaml --a 3", "fit --config x.yaml --a 1 --a 2 --a 3"),
        ("fit --g.k 1 --g FILE --g.k 2", "fit --g FILE --g.k 1 --g.k 2"),
        (
            "fit --g.init_args.k 1 --g.class_path NAME --g.init_args {}",
            "fit --g.class_path NAME --g.init_args {} --g.init_args.k 1",
        ),
        ("fit --g.s.k 1 --g.s NAME --g NAME", "fit --g NAME --g.s NAME --g.s.k 1"),
        ("fit --l.x+=A --l.x.k 1 --l.x+ B --l.x.k 2 --z 1", "fit --z 1 --l.x+=A --l.x.k 1 --l.x+ B --l.x.k 2"),
        ("fit --seed -5 --t=--x --config x.yaml", "fit --config x.yaml --seed -5 --t=--x"),
        ("fit --print_config --config x.yaml", "fit --config x.yaml --print_config"),
        ("fit --config", "fit --config"),
        ("fit stray --config x.yaml more --config=y.yaml most", "fit stray more most --config x.yaml --config y.yaml"),
    ],
)
def test_files_come_first_then_groups_then_the_keys_in_them(typed, ordered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.yaml", "y.yaml"):
        (tmp_path / name).touch()
    assert in_order(typed.split(" ")) == ordered.split(" ")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"configuration file nowhere.yaml does not exist"):
        in_order(["fit", "--config", "nowhere.yaml"])


def test_the_last_value_of_a_key_counts_in_either_form():
    assert last_value(["fit", "--k", "a", "--k=b"], "k") == "b"
    assert last_value(["fit", "--k=a", "--k", "b", "--k"], "k") == "b"
    assert last_value(["fit", "--kk", "a"], "k") is None
