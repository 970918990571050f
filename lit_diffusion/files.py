"""Files and sets of files that are whole or absent, and cache folders."""

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
"""Name of the list of a set's files, beside them, with how they were made."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete and on the disk.

    It is written to a temporary name in the same folder, synced, renamed; on any failure the temporary file is removed
    and an earlier file under the name is untouched.

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
    """The content of a folder's ``samples.json``.

    Attributes:
        names: names of the files, in order.
        whole: true where all of them were written; false while one set replaces another.
    """

    names: list[str]
    whole: bool


def set_in(folder: Path) -> FileSet | None:
    """The set that a folder's ``samples.json`` lists; None where there is none."""
    try:
        said = json.loads((folder / SET_FILE).read_text())
        # Plain names alone: files on the list may be removed.
        names = [name for name in map(str, said["files"]) if Path(name).name == name]
        return FileSet(names, said["whole"] is True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_set(folder: Path, files: Iterable[tuple[str, bytes]], about: Mapping[str, Any]) -> None:
    """Write a set of files and a list of them into a folder; an earlier set there is removed, and nothing else is.

    The set is written beside its place and moved there when it is complete. Where it replaces another set, a kill
    during the moving leaves a list with ``whole`` false.

    Args:
        folder: the folder; created if missing.
        files: plain names and contents.
        about: how the files were made, for the list.

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
    """Make a renaming outlast a power cut, where the file system can be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder(name: str, variable: str | None = None) -> Path:
    """The folder ``name`` below ``$LIT_DIFFUSION_CACHE`` (default ``~/.cache/lit_diffusion``).

    Args:
        name: name of the folder: data, weights, references, ...
        variable: environment variable that may name another folder in its place.
    """
    given = os.environ.get(variable) if variable is not None else None
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("LIT_DIFFUSION_CACHE") or "~/.cache/lit_diffusion").expanduser() / name
