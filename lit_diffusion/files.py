"""Files, and sets of files, that are whole or absent, and the folders of what can be made or fetched again."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lit_diffusion.errors import UserError
from lit_diffusion.runs.formats import FORMAT_VERSION

SET_FILE = "samples.json"
"""Lists the files of a set beside them, and says how they were made."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    Written to a temporary name in the same folder, synced, renamed; on any failure the temporary file is removed and
    whatever stood under the name before is untouched.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # Where the folder is a file, even looking for it fails.
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class FileSet:
    """What a folder's ``samples.json`` says.

    Attributes:
        names: of the files, in order.
        whole: whether all of them were written; not while one set takes the place of another.
    """

    names: list[str]
    whole: bool


def set_in(folder: Path) -> FileSet | None:
    """The set that a folder holds; None where nothing says so."""
    try:
        said = json.loads((folder / SET_FILE).read_text())
        # Plain names alone: the list says what may be removed.
        names = [name for name in map(str, said["files"]) if Path(name).name == name]
        return FileSet(names, said["whole"] is True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_set(folder: Path, files: Iterable[tuple[str, bytes]], about: Mapping[str, Any]) -> None:
    """Put a set of files into a folder, with a list of them; what another set had there goes, and nothing else does.

    Written beside its place and moved there when it is complete. Where it takes the place of another set, a kill during
    the moving leaves a list that says that the set is not whole.

    Args:
        folder: made where there is none.
        files: plain names and contents.
        about: how they were made, for the list.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    folder = folder.resolve()
    there = folder.is_dir()
    temporary = (folder if there else folder.parent) / f".{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        names = []
        for name, content in files:
            _write_synced(temporary / name, content)
            names.append(name)
        earlier = set_in(folder)
        before = [] if earlier is None else earlier.names

        def listed(files: list[str], whole: bool) -> bytes:
            said = {"format_version": FORMAT_VERSION, "whole": whole, **about, "files": files}
            return (json.dumps(said, indent=1) + "\n").encode()

        _write_synced(temporary / SET_FILE, listed(names, True))
        if not there:
            temporary.rename(folder)
        else:
            with atomic_write(folder / SET_FILE) as file:
                file.write(listed([*dict.fromkeys([*before, *names])], False))
            for name in before:
                (folder / name).unlink(missing_ok=True)
            for name in [*names, SET_FILE]:
                (temporary / name).replace(folder / name)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Let a renaming outlast a power cut, where the file system can be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder(name: str, variable: str | None = None) -> Path:
    """The folder ``name`` below ``$LIT_DIFFUSION_CACHE`` (default ``~/.cache/lit_diffusion``).

    Args:
        name: data, weights, references, ...
        variable: of the environment, which names another folder for this one.
    """
    given = os.environ.get(variable) if variable is not None else None
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("LIT_DIFFUSION_CACHE") or "~/.cache/lit_diffusion").expanduser() / name
