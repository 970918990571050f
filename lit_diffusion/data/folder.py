"""A folder or a zip file of images."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from lit_diffusion.data.pixels import check_size, decode
from lit_diffusion.data.source import Source
from lit_diffusion.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Source):
    """The images of a folder or of a zip file, at any depth, in the order of their names.

    An image is a file whose name ends in one of `SUFFIXES`; hidden files and folders (``.name``, ``__MACOSX``) are
    passed over. Each is read when it is asked for: turned as its EXIF tag says, transparent parts laid on white, the
    high byte kept of 16-bit values, cut to the square in its middle and resized to ``size`` (Lanczos, antialiased). An
    image that is ``size x size`` already keeps every pixel. See `lit_diffusion.data.pixels.to_pixels`.

    Args:
        path: a folder or a zip file.
        size: the side of the images in pixels.
        channels: 3 for RGB, 1 for grey.
        classes: whether the folders directly under ``path`` are the classes; they are numbered in the order of their
            names, which ``class_names`` lists.
        on_corrupt: what becomes of a file that is no whole image. ``fail`` stops with its name when it is asked for,
            and costs nothing; ``skip`` reads everything once at the start (minutes for a million images), leaves such
            files out and warns once.

    Raises:
        UserError: if ``path`` is missing, neither folder nor zip file, or holds no image; if ``classes`` is true and an
            image lies in no folder or all lie in one; from ``value`` if a file is corrupt or cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        channels: Literal[1, 3] = 3,
        classes: bool = False,
        on_corrupt: Literal["fail", "skip"] = "fail",
    ) -> None:
        check_size(size)
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.shape = (channels, size, size)
        self.class_names: list[str] = []
        self._size = size
        self._channels: Literal[1, 3] = channels
        self._files = open_files(self.path)
        self._names = sorted(name for name in self._files.names() if is_image(name))
        if not self._names:
            raise UserError(f"no image in {self.path}: there must be files that end in {', '.join(SUFFIXES)}")
        if classes:
            for name in self._names:
                if "/" not in name:
                    raise UserError(
                        f"{name} in {self.path} lies in no folder, so it has no class: move it, or set classes: false"
                    )
            # Before corrupt files are left out, so that they never renumber the classes.
            self.class_names = sorted({_class_of(name) for name in self._names})
            self.num_classes = len(self.class_names)
            if self.num_classes == 1:
                raise UserError(
                    f"all images in {self.path} lie in the folder {self.class_names[0]!r}, which makes one class: the "
                    "classes must be the first level (pack the zip file from within that folder), or set classes: false"
                )
        if on_corrupt == "skip":
            self._skip_corrupt()
        self._class_index = {name: index for index, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._names)

    def value(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 ``[C, size, size]``.

        Raises:
            UserError: if the file is corrupt or cannot be read.
        """
        return self._decode(self._names[index])

    def label(self, index: int) -> int | None:
        """The number of the first-level folder of image ``index``, None without ``classes``."""
        return self._class_index[_class_of(self._names[index])] if self.class_names else None

    def fingerprint(self) -> str:
        """A hash of the names and of what changes when a file does, and of the options; no image is read.

        That is each file's size and modification time in a folder, its size and CRC-32 in a zip file. So a copy of a
        zip file has the fingerprint of the original, and a copy of a folder only if it keeps the times.
        """
        digest = hashlib.sha256(f"{self.shape} {self.class_names} {len(self)}".encode())
        for name in self._names:
            digest.update(f"{name}\0{self._files.stamp(name)}\0".encode())
        return digest.hexdigest()[:16]

    def _decode(self, name: str) -> np.ndarray:
        try:
            return decode(self._files.read(name), self._size, self._channels)
        except MemoryError:
            raise
        except Exception as error:  # Pillow, its decoders and zipfile raise anything over a damaged file.
            reason = " ".join(str(error).split()) or type(error).__name__
            # Only the operating system sets errno: then the file may be whole, and skipping it would hide a full queue
            # of open files or a lost network drive.
            if isinstance(error, OSError) and error.errno is not None:
                raise UserError(f"cannot read {name} in {self.path}: {error.strerror or reason}") from error
            raise _CorruptImageError(
                f"{name} in {self.path} is not a whole image ({reason}): replace or remove it, or set on_corrupt: skip"
            ) from error

    def _is_whole(self, name: str) -> bool:
        try:
            self._decode(name)
        except _CorruptImageError:
            return False
        return True

    def _skip_corrupt(self) -> None:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock.
            whole = list(pool.map(self._is_whole, self._names))
        corrupt = [name for name, good in zip(self._names, whole, strict=True) if not good]
        self._names = [name for name, good in zip(self._names, whole, strict=True) if good]
        if not self._names:
            raise UserError(f"none of the {len(corrupt)} images in {self.path} is whole (the first is {corrupt[0]})")
        if corrupt:
            more = ", ..." if len(corrupt) > 3 else ""
            warnings.warn(
                f"{self.path}: skipped {len(corrupt)} of {len(whole)} images that are corrupt: "
                f"{', '.join(corrupt[:3])}{more}",
                stacklevel=3,
            )


class _CorruptImageError(UserError):
    """A file that has the name of an image and is none."""


def is_image(name: str) -> bool:
    """Whether a file of this name is one of a folder's images."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _class_of(name: str) -> str:
    return name.split("/", 1)[0]


def open_files(path: Path) -> _Folder | _Zip:
    """The files below a folder, or in a zip file: their ``names()``, and ``read(name)`` for the bytes of one.

    Raises:
        UserError: if there is neither.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"there is no folder or zip file {path}: check the path")
    try:
        with zipfile.ZipFile(path):
            return _Zip(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is neither a folder nor a whole zip file: copy it again, or unpack it") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _Folder:
    """The files below a folder; their names have ``/`` between the parts on every system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        return [
            (Path(folder) / file).relative_to(self._path).as_posix()
            for folder, _, files in os.walk(self._path, followlinks=True)
            for file in files
        ]

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def stamp(self, name: str) -> str:
        status = (self._path / name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"


class _Zip:
    """The files in a zip file.

    Each process opens the file for itself when it first reads: a handle that a DataLoader's worker inherits by fork
    shares its position with the parent's, and one cannot be sent to a spawned worker.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: zipfile.ZipFile | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None or self._process != os.getpid():
            self._open, self._process = zipfile.ZipFile(self._path), os.getpid()
        return self._open

    def names(self) -> list[str]:
        return [member.filename for member in self._archive().infolist() if not member.is_dir()]

    def read(self, name: str) -> bytes:
        return self._archive().read(name)

    def stamp(self, name: str) -> str:
        member = self._archive().getinfo(name)
        return f"{member.file_size} {member.CRC}"
