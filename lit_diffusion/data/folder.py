"""A folder or a zip file of images."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from lit_diffusion.data.dataset_json import DATASET_JSON, read_labels
from lit_diffusion.data.pixels import Size, decode, height_and_width, is_grey, losses
from lit_diffusion.data.source import Source
from lit_diffusion.data_spec import in_brief
from lit_diffusion.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Source):
    """The images of a folder or of a zip file, at any depth, in the order of their names: uint8 ``[C, H, W]``.

    An image is a file whose name ends in one of `SUFFIXES`; hidden files and folders (``.name``, ``__MACOSX``) are
    skipped, links are followed, and each file counts once, whatever links lead to it. Each is read on access: rotated
    by its EXIF tag, transparent parts on white, the high byte of 16-bit values, center-cropped to the aspect ratio and
    resized to ``size`` (Lanczos, antialiased). An image of that size keeps every pixel. See
    `lit_diffusion.data.pixels.to_pixels`.

    Args:
        path: a folder or a zip file.
        size: size of the images in pixels: the side of a square, or [height, width].
        channels: 3 for RGB, 1 for grey.
        classes: if true, the images have classes: the labels in ``dataset.json``, as StyleGAN's and EDM's tools write
            it, or else the folders directly under ``path``, numbered in the order of their names, which ``class_names``
            lists. Folders named 00000, 00001, ... are refused, since they are shards more often than classes;
            ``folders`` takes the folders, whatever their names, and ignores ``dataset.json``.
        on_corrupt: treatment of corrupt files. ``fail`` stops with the file's name on access, at no cost; ``skip``
            reads everything once at the start (minutes for a million images), leaves such files out and warns once.

    Raises:
        UserError: if ``path`` is missing, neither folder nor zip file, or contains no image; if ``classes`` is true and
            an image has no label in ``dataset.json``, or, without that file, is in no folder or all are in one, or the
            folders are numbered like shards; from ``value`` if a file is corrupt or cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        size: Size,
        channels: Literal[1, 3] = 3,
        classes: bool | Literal["folders"] = False,
        on_corrupt: Literal["fail", "skip"] = "fail",
    ) -> None:
        self._size = height_and_width(size)
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.shape = (channels, *self._size)
        self.class_names: list[str] = []
        self._channels: Literal[1, 3] = channels
        self._files = open_files(self.path)
        self._names = image_names(self._files, self.path)
        self._labels: dict[str, int] | None = None
        # Before corrupt files are skipped, so that these never renumber the classes.
        if classes is True:
            self._take_labels()
        if classes and self._labels is None:
            self._take_folders(sure=classes == "folders")
        if on_corrupt == "skip":
            self._skip_corrupt()
        self._class_index = {name: index for index, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._names)

    def value(self, index: int) -> np.ndarray:
        """Image ``index``: uint8 ``[C, height, width]``.

        Raises:
            UserError: if the file is corrupt or cannot be read.
        """
        return self._decode(self._names[index])

    def label(self, index: int) -> int | None:
        """The class of image ``index``, None without ``classes``."""
        if self._labels is not None:
            return self._labels[composed(self._names[index])]
        return self._class_index[_class_of(self._names[index])] if self.class_names else None

    def fingerprint(self) -> str:
        """A hash of the options and of each file's name and stamp, without reading images.

        The stamp is a file's size and modification time in a folder, its size and CRC-32 in a zip file. So a copy of a
        zip file has the fingerprint of the original, and a copy of a folder only if it keeps the times.
        """
        digest = hashlib.sha256(f"{self.shape} {self.class_names} {len(self)}".encode())
        for name in self._names:
            digest.update(f"{name}\0{self._files.stamp(name)}\0".encode())
        if self._labels is not None:
            digest.update(str([self.label(index) for index in range(len(self))]).encode())
        return digest.hexdigest()[:16]

    def notes(self) -> list[str]:
        """Notes about images that are cropped or contain further pictures."""
        return picture_losses(self._files, self._names, self.path, self._size)

    def _take_labels(self) -> None:
        """Take the classes of ``dataset.json``, where it exists with labels."""
        if (found := labels_in(self._files, self.path)) is None:
            return
        # Labels of more files than are here, too: a part of a set has the classes of the whole.
        labels, self.class_names = found
        lacking = [name for name in self._names if composed(name) not in labels]
        if lacking:
            raise UserError(
                f"{DATASET_JSON} of {self.path} has no label for {len(lacking)} of the {len(self._names)} images, the "
                f"first is {lacking[0]}: add them, or set classes: false"
            )
        self._labels = labels
        self.num_classes = len(self.class_names) or max(labels.values()) + 1

    def _take_folders(self, sure: bool) -> None:
        """Take the first-level folders as the classes."""
        for name in self._names:
            if "/" not in name:
                raise UserError(
                    f"{name} in {self.path} lies in no folder, so it has no class: move it, or set classes: false"
                )
        self.class_names = sorted({_class_of(name) for name in self._names})
        self.num_classes = len(self.class_names)
        if not sure and _are_shards(self.class_names):
            raise UserError(
                f"the folders of {self.path} are numbered ({in_brief(self.class_names)}) as shards are, and there is "
                f"no {DATASET_JSON} with labels: set classes: folders if they are the classes, else classes: false"
            )
        if not sure and self.num_classes == 1:
            raise UserError(
                f"all images in {self.path} lie in the folder {self.class_names[0]!r}, which makes one class: the "
                "classes must be the first level (pack the zip file from within that folder), or set classes: false "
                "(classes: folders where that one is meant)"
            )

    def _decode(self, name: str) -> np.ndarray:
        try:
            return read_image(self._files, name, self.path, self._size, self._channels)
        except CorruptImageError as error:
            raise CorruptImageError(f"{error}, or set on_corrupt: skip") from error

    def _is_whole(self, name: str) -> bool:
        try:
            self._decode(name)
        except CorruptImageError:
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


class CorruptImageError(UserError):
    """A file with the name of an image that is not a whole image."""


def is_image(name: str) -> bool:
    """True where a file of this name counts as an image."""
    return not any(map(_is_hidden, PurePosixPath(name).parts)) and name.lower().endswith(SUFFIXES)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _class_of(name: str) -> str:
    return composed(name.split("/", 1)[0])


def _are_shards(names: list[str]) -> bool:
    """True for folders numbered with leading zeros: EDM's 00000, 00001, ..., FFHQ's 00000, 01000, ..."""
    return all(name.isdecimal() and len(name) == len(names[0]) >= 2 for name in names) and names[0].startswith("0")


def composed(name: str) -> str:
    """A name in Unicode normal form C, since macOS stores accents as separate characters."""
    return unicodedata.normalize("NFC", name)


def image_names(files: _Folder | _Zip, path: Path) -> list[str]:
    """The names of the images among files, in the same order on every operating system.

    Raises:
        UserError: if there are none.
    """
    names = sorted(filter(is_image, files.names()), key=lambda name: (composed(name), name))
    if not names:
        raise UserError(f"no image in {path}: there must be files that end in {', '.join(SUFFIXES)}")
    return names


def labels_in(files: _Folder | _Zip, path: Path) -> tuple[dict[str, int], list[str]] | None:
    """The labels in ``dataset.json`` by the files' :func:`composed` names, and the names of the classes.

    Returns:
        Labels and names; None where there is no such file, or no labels in it.

    Raises:
        UserError: if it is damaged.
    """
    where = f"{DATASET_JSON} of {path}"
    try:
        text = files.read(DATASET_JSON)
    except (FileNotFoundError, KeyError):  # Of a folder, of a zip file.
        return None
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {where} ({error}): bring it back, or set classes: false") from error
    found = read_labels(text, where)
    return None if found is None else ({composed(name): label for name, label in found[0].items()}, found[1])


def read_image(
    files: _Folder | _Zip,
    name: str,
    path: Path,
    size: tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
) -> np.ndarray:
    """One image of a folder or zip file, converted by `lit_diffusion.data.pixels.to_pixels`.

    Raises:
        CorruptImageError: if it is not a whole image.
        UserError: if it cannot be read.
    """
    try:
        return decode(files.read(name), size, channels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow, its decoders and zipfile can raise anything for a damaged file.
        reason = " ".join(str(error).split()) or type(error).__name__
        # Only the operating system sets errno: then the file may be whole, and skipping it would hide a full queue
        # of open files or a lost network drive.
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {name} in {path}: {error.strerror or reason}") from error
        raise CorruptImageError(f"{name} in {path} is not a whole image ({reason}): replace or remove it") from error


def picture_losses(
    files: _Folder | _Zip, names: list[str], path: Path, size: tuple[int, int] | None = None
) -> list[str]:
    """Notes about parts of a folder's images that are lost, see `lit_diffusion.data.pixels.losses`."""
    return losses(str(path), len(names), lambda index: _opened(files, names[index]), size)


def any_in_colour(files: _Folder | _Zip, names: list[str]) -> bool:
    """True where one of the images is in color; reads the headers of files until one is."""

    def in_colour(name: str) -> bool:
        try:
            with _opened(files, name) as picture:
                return not is_grey(picture)
        except Exception:  # Reading it raises the error with its name.
            return False

    return any(map(in_colour, names))


@contextmanager
def _opened(files: _Folder | _Zip, name: str) -> Iterator[Image.Image]:
    """A picture that is read lazily."""
    from PIL import Image

    with files.open(name) as file, Image.open(file) as picture:
        yield picture


def open_files(path: Path) -> _Folder | _Zip:
    """The files below a folder, or in a zip file, with ``names()``, and ``read(name)`` for the bytes of one.

    Raises:
        UserError: if the path is neither.
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
        """The names of the files, each file once: its own name if it is in this folder, else that of the first link.

        A link to a folder that contains the link is a loop, and a link to a folder that contains this one leads out of
        it: neither is followed. Broken links have names, too, and fail when they are read.

        Raises:
            UserError: if a folder cannot be listed.
        """
        root = os.path.realpath(self._path)
        found: dict[str, str] = {}  # from real paths
        listed: set[str] = set()
        links = self._list(root, "", found, listed)
        while links:
            further = []
            for name, link in sorted(links):
                real = os.path.realpath(link)
                if os.path.isdir(real):
                    if Path(real) not in {Path(root), *Path(root).parents, *Path(link).parents}:
                        further += self._list(real, f"{name}/", found, listed)
                elif os.path.isfile(real) or not os.path.exists(real):
                    found.setdefault(real, name)
            links = further
        return list(found.values())

    def _list(self, folder: str, prefix: str, found: dict[str, str], listed: set[str]) -> list[tuple[str, str]]:
        """Add a folder's files, at any depth; return the links in it, names and paths."""
        links = []
        waiting = [(folder, prefix)]
        while waiting:
            folder, prefix = waiting.pop()
            if folder in listed:
                continue
            listed.add(folder)
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                raise UserError(f"cannot list {folder}, below {self._path}: {error.strerror or error}") from error
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_symlink():
                    links.append((prefix + entry.name, entry.path))
                elif entry.is_dir():
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.is_file():  # no pipe or socket, whose read would block
                    found.setdefault(entry.path, prefix + entry.name)
        return links

    def open(self, name: str) -> IO[bytes]:
        return (self._path / name).open("rb")

    def read(self, name: str) -> bytes:
        path = self._path / name
        try:
            return path.read_bytes()
        except OSError:
            if path.is_symlink() and not path.exists():
                raise ValueError(f"a link to {os.readlink(path)}, which is not there") from None
            raise

    def stamp(self, name: str) -> str:
        path = self._path / name
        status = path.stat() if path.exists() else path.lstat()
        return f"{status.st_size} {status.st_mtime_ns}"


class _Zip:
    """The files in a zip file.

    Each process opens the file at its first read: a handle that a DataLoader's worker inherits by fork shares its
    position with the parent's, and a handle cannot be sent to a spawned worker.
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
        """The names of the members, each once: the last of one name counts, as when unpacking."""
        return list({member.filename: None for member in self._archive().infolist() if not member.is_dir()})

    def open(self, name: str) -> IO[bytes]:
        return self._archive().open(name)

    def read(self, name: str) -> bytes:
        return self._archive().read(name)

    def stamp(self, name: str) -> str:
        member = self._archive().getinfo(name)
        return f"{member.file_size} {member.CRC}"
