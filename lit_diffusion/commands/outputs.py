"""Checks of a command's ``--out``: its ending, what would be replaced, and whether it can be written."""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path

from lit_diffusion.data.dataset_json import DATASET_JSON
from lit_diffusion.data.folder import is_image
from lit_diffusion.errors import UserError
from lit_diffusion.files import SET_FILE, set_in

RULE = (
    "An existing file is replaced if it is of the kind that this command writes, else refused; an ending may be in "
    "upper case."
)
"""Help text of every --out."""


def output_path(given: str, endings: tuple[str, ...], folder: bool = False) -> Path:
    """Check, before the work, the file that ``--out`` names, or the folder where it may name one.

    A name means a folder if it ends in a slash, is a directory already, or has no ending at all.

    Args:
        given: the name as typed.
        endings: endings of files, in lower case: ``(".npz", ".png")``.
        folder: if true, it may be a folder.

    Raises:
        UserError: for another ending, a directory for a file, a file for a directory, a file of another kind that
            would be lost, or a place that cannot be written to.
    """
    path = Path(given).expanduser()
    names = " or ".join(endings)
    wanted = f"give a name that ends in {names}" if endings else "give the name of a folder"
    if folder and endings:
        wanted += ", or in / for a folder"
    slash = given.endswith(("/", os.sep))
    if path.suffix.lower() in endings:
        if slash or path.is_dir():
            raise UserError(f"--out {given} is a directory with the ending of a file; {wanted}")
        if path.exists():
            _require_own_kind(path, given)
    elif path.name.lower() in endings:
        raise UserError(f"--out {given} is an ending without a name; {wanted}")
    elif not folder or not (slash or path.is_dir() or not path.suffix):
        raise UserError(f"--out {given}: {wanted}")
    elif path.exists() and not path.is_dir():
        raise UserError(f"--out {given}: cannot write a folder there, it is a file; {wanted}")
    _require_writable(path, path if path.suffix.lower() not in endings else path.parent)
    return path


def is_folder(out: Path, endings: tuple[str, ...]) -> bool:
    """True where :func:`output_path` took a name for a folder's."""
    return out.suffix.lower() not in endings


def require_free_for_a_set(folder: Path, overwrite: bool) -> None:
    """Refuse a folder in which other images would mix with a set of samples.

    Raises:
        UserError: naming what is in it.
    """
    if not folder.is_dir():
        return
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    earlier = set_in(folder)
    if there and not overwrite:
        what = (
            f"{sum(map(is_image, earlier.names))} samples"
            if earlier is not None
            else f"{there[0]}, {len(there)} entries in all"
        )
        raise UserError(
            f"--out {folder} holds {what}, and a folder holds one set: give another, or --overwrite, which replaces "
            f"what `sample` wrote there and nothing else"
        )
    ours = set() if earlier is None else set(earlier.names)
    ours |= set() if earlier is None else {SET_FILE}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - ours
    images = sorted(name for name in names if is_image(name) or name in (DATASET_JSON, SET_FILE))
    if images:
        raise UserError(
            f"--out {folder} holds images or a list of them that `sample` did not write ({images[0]}, {len(images)} in "
            f"all), which would mix with the samples: give another folder"
        )


def require_reports_folder(folder: Path) -> None:
    """Refuse a folder with other files, some of which a report might replace.

    Raises:
        UserError: naming one of them.
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there and not ((folder / "report.html").is_file() and _is_page(folder / "report.html")):
        raise UserError(
            f"--out {folder} holds {there[0]} and no report: give a folder of its own, e.g. --out {folder}/report"
        )


def _require_own_kind(path: Path, given: str) -> None:
    """Refuse to replace a file that this command would not have written; an empty file may be replaced."""
    own = False
    with suppress(OSError, ValueError, zipfile.BadZipFile):
        own = path.is_file() and (path.stat().st_size == 0 or _KINDS[path.suffix.lower()](path))
    if not own:
        raise UserError(
            f"--out {given} exists and is no {path.suffix.lower()} file of this command's kind: it is not replaced; "
            f"move it away or give another name"
        )


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _is_archive_of_samples(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def _is_result(path: Path) -> bool:
    content = json.loads(path.read_bytes())
    return isinstance(content, dict) and {"format_version", "values", "protocol"} <= content.keys()


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="lit_diffusion' in file.read(2000)


_KINDS = {".png": _is_png, ".npz": _is_archive_of_samples, ".json": _is_result, ".html": _is_page}


def _require_writable(out: Path, folder: Path) -> None:
    """Refuse a place that cannot be written to, before the work; creates nothing."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        # The longest name that writing will need.
        probe = there / f".{out.name}.{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
