"""Reference statistics: features of real data, computed once and cached.

They are of the data as they are, every datum once, without padding or augmentation. The file's name is a hash of all
that the features depend on: the data and their indices, shape and grey levels, the extractor with its weights, the
resize.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_diffusion.data.source import Source
from lit_diffusion.distributed import gather_rows, sum_over_ranks
from lit_diffusion.errors import UserError
from lit_diffusion.files import atomic_write, cache_folder
from lit_diffusion.images import to_uint8
from lit_diffusion.metrics.extractors import Extractor
from lit_diffusion.metrics.gaussian import Gaussian, Moments
from lit_diffusion.randomness import keyed_permutation

CACHE_FORMAT = 1
MOST_FEATURES = 50_000
"""The largest number of data whose features are kept, for neighbors and kernels; mean and covariance are of all."""
BATCH = 250
# RuntimeError: where the damage looks like a password or a compression that zipfile does not have.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class RealData:
    """Real data as an extractor takes them.

    Attributes:
        values: a function from positions int64 ``[b]`` to uint8 images ``[b, H, W, C]``, or points float32 ``[b, D]``.
        count: number of data.
        shape: shape of one datum, ``(C, H, W)`` or ``(D,)``.
        describe: makes their record; its fingerprint may need a pass over all data.
    """

    values: Callable[[Tensor], np.ndarray]
    count: int
    shape: tuple[int, ...]
    describe: Callable[[], dict[str, Any]]

    @cached_property
    def record(self) -> dict[str, Any]:
        """The data's identity: ``reference_source``, ``split``, ``fingerprint`` and further distinguishing keys."""
        return self.describe()

    @classmethod
    def of(cls, source: Source, indices: Tensor, split: str, mirrored: bool = False) -> RealData:
        """Data number ``indices`` of a source: images scaled to 0 .. 255, points unchanged.

        Args:
            source: the data source.
            indices: numbers of the data, int64 ``[N]``.
            split: name of this part of the source, for the record.
            mirrored: if true, mirror images left to right, as training with flips does with half of them.
        """
        num_grey_levels = source.num_grey_levels

        def values(positions: Tensor) -> np.ndarray:
            found = np.stack([source.value(int(i)) for i in indices[positions]])
            if num_grey_levels is None:
                return found.astype(np.float32)
            images = to_uint8(torch.from_numpy(found).double() / (num_grey_levels - 1), (0.0, 1.0))
            return images[:, :, ::-1].copy() if mirrored else images

        def describe() -> dict[str, Any]:
            record = {
                "reference_source": source.name,
                "split": split,
                "fingerprint": source.fingerprint(),
                "indices": hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16],
                "num_grey_levels": num_grey_levels,
            }
            return {**record, "mirrored": True} if mirrored else record

        return cls(values, len(indices), tuple(source.shape), describe)


@dataclass(frozen=True)
class Reference:
    """Immutable statistics of real data.

    Attributes:
        gaussian: mean and covariance of the features of all data.
        features: features of at most ``MOST_FEATURES`` of the data, float32 ``[M, D]``; none where only moments were
            given.
        positions: positions of those data, int64 ``[M]``.
        record: all that the statistics depend on.
    """

    gaussian: Gaussian
    features: Tensor
    positions: Tensor
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A hash of the record, the same for comparable metric values."""
        return record_key(self.record)


def record_key(record: dict[str, Any]) -> str:
    """16 hexadecimal digits of a record's sha256."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def reference_record(data: RealData, extractor: Extractor) -> dict[str, Any]:
    """The record of a reference, all that it depends on."""
    return {
        "format": CACHE_FORMAT,
        **data.record,
        "count": data.count,
        "shape": list(data.shape),
        **extractor.protocol(data.shape),
    }


def reference_of(
    data: RealData,
    extractor: Extractor,
    folder: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The reference of data, from the cache or computed by all processes together; all processes call it.

    Args:
        data: the real data.
        extractor: the feature extractor.
        folder: folder of the cache; None for ``references`` in the project's cache.
        rank: number of this process, which takes every ``world_size``-th datum.
        world_size: number of processes.
        show_progress: if true, draw a progress bar.
        say: prints one line.

    Raises:
        UserError: if there are fewer than two data.
    """
    record = reference_record(data, extractor)
    path = (folder or cache_folder("references")) / f"{record_key(record)}.npz"
    cached = _read(path, record, say)
    # One process may see a file that another has just written: all must take the same branch.
    if int(sum_over_ranks(torch.tensor(float(cached is not None)))) == world_size and cached is not None:
        return cached
    kept = torch.arange(data.count)
    if data.count > MOST_FEATURES:
        kept = keyed_permutation(0, "reference", data.count)[:MOST_FEATURES].sort().values
    mine = torch.arange(data.count)[rank::world_size]
    moments = Moments(extractor.dimension)
    rows = [torch.empty(0, extractor.dimension)]
    numbers = [torch.empty(0, dtype=torch.int64)]
    parts = mine.split(BATCH) if len(mine) else ()
    name = f"features of {data.count} real data"
    for part in tqdm(parts, desc=name, leave=False, disable=not show_progress, unit=" batches"):
        # One batch shape throughout: a network's last digits depend on it.
        filled = torch.cat((part, part[-1:].expand(min(BATCH, data.count) - len(part))))
        features = extractor(data.values(filled)).features[: len(part)].cpu()
        moments.add(features)
        chosen = torch.isin(part, kept)
        rows.append(features[chosen])
        numbers.append(part[chosen])
    moments.sums = sum_over_ranks(moments.sums)
    order = gather_rows(torch.cat(numbers)[:, None])[:, 0].argsort()
    reference = Reference(moments.gaussian(), gather_rows(torch.cat(rows))[order], kept, record)
    if rank == 0:
        try:
            _write(path, reference)
        except UserError as error:  # A full disk under the cache must not end a run of hours.
            say(f"the reference statistics are not kept: {error}")
    return reference


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _write(path: Path, reference: Reference) -> None:
    arrays = {
        "mean": reference.gaussian.mean.numpy(),
        "covariance": reference.gaussian.covariance.numpy(),
        "count": np.array(reference.gaussian.count),
        "features": reference.features.numpy(),
        "positions": reference.positions.numpy(),
    }
    # Written atomically and with equal contents by every process: concurrent writers do no harm.
    with atomic_write(path) as file:
        texts = {"record": np.array(json.dumps(reference.record)), "sha256": np.array(_digest(arrays))}
        np.savez(file, allow_pickle=False, **arrays, **texts)


def _read(path: Path, record: dict[str, Any], say: Callable[[str], None]) -> Reference | None:
    """The cached reference; None where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found, digest = json.loads(str(arrays.pop("record"))), str(arrays.pop("sha256"))
        if found != record or digest != _digest(arrays):
            raise ValueError("its checksum does not fit its contents")
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        say(f"the reference statistics {path} are damaged and are computed again ({reason})")
        return None
    gaussian = Gaussian(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["covariance"]), int(arrays["count"]))
    return Reference(gaussian, torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["positions"]), record)


def reference_of_moments(path: Path, dimension: int) -> Reference:
    """The reference of a file with ``mu`` and ``sigma``, as other projects publish them, for Frechet distances alone.

    Raises:
        UserError: if they are missing or of another dimension.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = (torch.from_numpy(archive[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (*_UNREADABLE, TypeError) as error:  # TypeError: a single array, which is not an archive.
        raise UserError(f"cannot read mu and sigma of {path}: {' '.join(str(error).split())}") from error
    if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
        raise UserError(
            f"{path} has mu {list(mean.shape)} and sigma {list(covariance.shape)}, this extractor's features have "
            f"{dimension} dimensions"
        )
    digest = _digest({"mu": mean.numpy(), "sigma": covariance.numpy()})[:16]
    record = {"reference_source": path.stem, "split": "as given", "fingerprint": digest}
    return Reference(
        Gaussian(mean, covariance, 0), torch.empty(0, dimension), torch.empty(0, dtype=torch.int64), record
    )
