"""Weights of the feature networks: their files, download and checksums.

Only ``fetch weights NAME`` downloads them. A metric reads the files on disk, or fails at once with the command to run.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.files import atomic_write, cache_folder


@dataclass(frozen=True)
class WeightsFile:
    """One published file of weights.

    Attributes:
        model: name of the network in protocols.
        url: address of the file.
        sha256: checksum of the whole file.
    """

    model: str
    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name on this machine."""
        return self.url.rsplit("/", 1)[1]


WEIGHTS = {
    "inception": WeightsFile(
        "inception-v3-compat",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": WeightsFile(
        "vgg16",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "dinov2": WeightsFile(
        "dinov2-vit-l-14",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "clip": WeightsFile(
        "clip-vit-b-32",
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
}


def weights_folder() -> Path:
    """The folder of fetched weights: ``$LIT_DIFFUSION_WEIGHTS``, or ``weights`` in the cache."""
    return cache_folder("weights", "LIT_DIFFUSION_WEIGHTS")


def sha256_of(path: Path) -> str:
    """The sha256 of a file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def find_weights(name: str, given: str | Path | None = None) -> tuple[Path, str]:
    """The file of a network's weights and its sha256.

    Args:
        name: a key of ``WEIGHTS``.
        given: a file of the user; None for the fetched one, whose sha256 must be the published one.

    Raises:
        UserError: if it is missing, with the command that fetches it, or damaged.
    """
    require_choice("", "weights", name, WEIGHTS)
    command = f"python -m lit_diffusion fetch weights {name}"
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"there is no weights file {path}: check weights_path, or leave it out and run `{command}`")
        return path, sha256_of(path)
    wanted = WEIGHTS[name]
    path = weights_folder() / wanted.name
    if not path.is_file():
        raise UserError(f"the {name} weights are not on this machine ({path}): run `{command}`, or give weights_path")
    found = sha256_of(path)
    if found != wanted.sha256:
        raise UserError(f"{path} is damaged (sha256 {found[:16]}..., not {wanted.sha256[:16]}...): run `{command}`")
    return path, found


def fetch_weights(name: str) -> Path:
    """Download a network's weights, unless an intact file is there.

    The file appears under its name only when it is complete and its sha256 is the published one.

    Raises:
        UserError: for an unknown network, a failed download, or a file other than the published one.
    """
    require_choice("", "weights", name, WEIGHTS)
    wanted = WEIGHTS[name]
    path = weights_folder() / wanted.name
    if path.is_file() and sha256_of(path) == wanted.sha256:
        return path
    digest = hashlib.sha256()
    with _downloading(wanted.url, path):
        source = urllib.request.urlopen(wanted.url, timeout=60)
    with source, atomic_write(path) as file:
        total = int(source.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=wanted.name) as bar:
            while True:
                with _downloading(wanted.url, path):  # Not around the writing: a full disk is another error.
                    chunk = source.read(1 << 20)
                if not chunk:
                    break
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != wanted.sha256:
            raise UserError(
                f"what {wanted.url} sent is not the published file (sha256 {digest.hexdigest()[:16]}..., not "
                f"{wanted.sha256[:16]}...), nothing was kept: try again, or copy the file to {path} yourself"
            )
    return path


@contextmanager
def _downloading(url: str, path: Path) -> Iterator[None]:
    """Turn a failure of the network into a UserError of one line."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url} ({reason}): try again, or copy the file to {path} yourself") from error
