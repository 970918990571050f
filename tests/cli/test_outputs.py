"""What stood under a name before: one rule for every command that writes a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_diffusion.commands.outputs import is_folder, output_path
from lit_diffusion.errors import UserError

COMMANDS = {
    "sample": [".npz", ".png"],
    "interpolate": [".png"],
    "evaluate": [".json"],
    "gallery": [".html"],
}


def others(path):
    """A file of somebody's under this name."""
    if path.suffix == ".npz":
        np.savez(path, weights=np.zeros(3))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"values": [1, 2]}))
    else:
        path.write_bytes(b"<html>mine</html>")


def ours(path):
    """As an earlier call of the command left it."""
    if path.suffix == ".npz":
        np.savez(path, arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    elif path.suffix == ".png":
        Image.new("L", (8, 8)).save(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"format_version": 1, "values": {}, "protocol": {}}))
    else:
        path.write_bytes(b'<meta name="generator" content="lit_diffusion gallery">')


@pytest.mark.parametrize("ending", sorted({ending for endings in COMMANDS.values() for ending in endings}))
def test_a_file_of_the_commands_kind_is_replaced_and_no_other(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    assert output_path(str(path), (ending,)) == path
    path.touch()
    assert output_path(str(path), (ending,)) == path  # Nothing to lose.
    ours(path)
    assert output_path(str(path), (ending,)) == path
    others(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="it is not replaced; move it away or give another name") as caught:
        output_path(str(path), (ending,))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("command", "ending"), [(name, e) for name, endings in COMMANDS.items() for e in endings])
def test_every_command_keeps_to_it_before_its_work(run, workdir, command, ending):
    """No checkpoint and no images are there: the name is looked at first."""
    required = {
        "sample": ["--ckpt_path", "nowhere", "--num_samples", "2"],
        "interpolate": ["--ckpt_path", "nowhere"],
        "evaluate": ["--samples", "nowhere", "--reference", "nowhere"],
        "gallery": ["nowhere"],
    }[command]
    path = Path(f"out{ending}")
    others(path)
    before = path.read_bytes()
    for out, said in (
        (path, "it is not replaced"),
        (f"other{ending}s", f"give a name that ends in {COMMANDS[command][0]}"),
        (f"new{ending}/", "is a directory with the ending of a file"),
        (ending, "is an ending without a name"),
        (f"tiny.yaml/x{ending}", "cannot write to tiny.yaml"),
    ):
        with pytest.raises(UserError, match=said):
            run(command, *required, "--out", out)
    if command != "sample":
        for out in ("folder/", "noending", "."):
            with pytest.raises(UserError, match="give a name that ends in"):
                run(command, *required, "--out", out)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in workdir.iterdir()) == [path.name, "tiny.yaml"]


def test_a_report_takes_no_folder_of_others(run, workdir, trained):
    run("report", trained, "--out", "made")
    pages = sorted(path.name for path in (workdir / "made").iterdir())
    run("report", trained, "--out", "made/")
    assert sorted(path.name for path in (workdir / "made").iterdir()) == pages
    (workdir / "file").touch()
    (workdir / "mine").mkdir()
    (workdir / "mine" / "report.html").write_text("mine")
    for out, said in (
        ("mine", "holds report.html and no report"),
        ("file", "it is a file"),
        ("page.html", "give the name of a folder"),
    ):
        with pytest.raises(UserError, match=said):
            run("report", trained, "--out", out)
    assert (workdir / "mine" / "report.html").read_text() == "mine"


def test_what_is_a_folder(tmp_path):
    endings = (".npz", ".png")
    (tmp_path / "v1.5").mkdir()
    for name, folder in (("a", True), ("a.b/", True), ("v1.5", True), ("a.npz", False), ("a.PNG", False)):
        out = output_path(f"{tmp_path}/{name}", endings, folder=True)
        assert is_folder(out, endings) is folder, name
