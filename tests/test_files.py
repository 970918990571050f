import errno
import os
from pathlib import Path

import pytest

from lit_diffusion.cli.arguments import packaged_experiment
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with atomic_write(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure, old):
    path = tmp_path / "file.bin"
    if old:
        path.write_bytes(old)

    def write():
        with atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert names(tmp_path) == (["file.bin"] if old else [])
    assert not old or path.read_bytes() == old


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, when):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args):
        raise full

    if when == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if when == "replace":
        monkeypatch.setattr(Path, "replace", fail)

    def write():
        with atomic_write(path) as file:
            file.write(b"new")
            if when == "write":
                fail()

    with pytest.raises(UserError) as caught:
        write()
    message = str(caught.value)
    assert str(path) in message
    assert "No space left on device" in message
    assert "\n" not in message
    assert caught.value.__cause__ is full
    monkeypatch.undo()
    assert names(tmp_path) == ["file.bin"]
    assert path.read_bytes() == b"old"


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, order = tmp_path / "file.bin", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("replace"), replace(self, target))[1])
    with atomic_write(path) as file:
        file.write(b"x")
    assert order == ["fsync", "replace", "fsync"]  # the file's bytes, the name, and that the name is there


@pytest.mark.parametrize("below", ["file.bin", "deeper/file.bin"])
def test_a_file_where_the_folder_should_be_is_one_line(tmp_path, below):
    (tmp_path / "a-file").write_text("in the way")
    path = tmp_path / "a-file" / below
    with pytest.raises(UserError) as caught, atomic_write(path):
        raise AssertionError("the block must not run")
    assert str(path) in str(caught.value)
    assert str(caught.value).startswith("cannot write")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a-file").read_text() == "in the way"


def test_a_folder_under_the_name_is_one_line(tmp_path):
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "name") as file:
        file.write(b"x")
    assert names(tmp_path) == ["name"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied"), atomic_write(tmp_path / "file.bin"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_packaged_experiments():
    found = packaged_experiment("experiments/ncsn.yaml")
    assert found is not None
    assert found.is_file()
    assert packaged_experiment("experiments/none.yaml") is None
    # Only what lies under experiments/: pyproject.toml is beside the package too.
    assert packaged_experiment("pyproject.toml") is None
    assert packaged_experiment("files.py") is None
