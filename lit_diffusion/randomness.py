r"""Random numbers keyed by their purpose, instead of drawn from a stateful generator.

Every random number of a run is a pure function of ``(seed, stream name, index, draw)``: the noise of the n-th training
image, the time to which it is noised, its flip, the k-th Langevin increment of sample i. Nothing depends on the batch
size, the number of processes, the worker that loaded an image or on interruptions of the run, and there is no generator
state to save.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405), in integer arithmetic on any device: the bits are the same on every device,
floats made from them agree up to the rounding of ``log`` and ``cos``.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def stream_key(seed: int, stream: str) -> int:
    """The 64-bit Philox key of a named stream under a seed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def philox4x32(counter: Tensor, key: int) -> Tensor:
    """Philox4x32-10: four random 32-bit words for each 128-bit counter.

    Args:
        counter: int64 ``[..., 4]``, each entry a word in ``[0, 2^32)``.
        key: 64 bits.

    Returns:
        int64 ``[..., 4]``, each entry a word in ``[0, 2^32)``.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product; the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _require_wide(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"keyed numbers are float32 or float64, not {dtype}: round what they make")


def random_words(seed: int, stream: str, index: Tensor, count: int, draw: int = 0) -> Tensor:
    """Random 32-bit words, ``count`` for each index: int64 ``[B, count]`` on the index's device."""
    index = index.to(torch.int64)
    blocks = torch.arange((count + 3) // 4, device=index.device)
    counter = torch.empty(*index.shape, len(blocks), 4, dtype=torch.int64, device=index.device)
    counter[..., 0] = blocks
    counter[..., 1] = draw
    counter[..., 2] = (index & _MASK)[..., None]
    counter[..., 3] = ((index >> 32) & _MASK)[..., None]
    return philox4x32(counter, stream_key(seed, stream)).flatten(-2)[..., :count]


def keyed_uniform(
    seed: int,
    stream: str,
    index: Tensor,
    shape: tuple[int, ...] = (),
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers strictly inside (0, 1): ``[B, *shape]`` for indices ``[B]``."""
    _require_wide(dtype)
    words = random_words(seed, stream, index, math.prod(shape), draw)
    # 23 bits and a half: the largest value that float32 distinguishes from 1.
    return ((words >> 9).to(dtype) + 0.5).mul_(2.0**-23).view(*index.shape, *shape)


def keyed_normal(
    seed: int,
    stream: str,
    index: Tensor,
    shape: tuple[int, ...] = (),
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers ``[B, *shape]`` for indices ``[B]`` (Box and Muller; the tail reaches 6.7)."""
    _require_wide(dtype)
    count = math.prod(shape)
    words = random_words(seed, stream, index, 2 * ((count + 1) // 2), draw)
    first, second = words.chunk(2, dim=-1)
    radius = (first.to(dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    angle = second.to(dtype).mul_(2.0 * math.pi * 2.0**-32)
    normal = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal[..., :count].reshape(*index.shape, *shape)


def keyed_permutation(seed: int, stream: str, length: int, epoch: int = 0) -> Tensor:
    """A permutation of ``0 .. length - 1`` that belongs to (seed, stream, epoch): int64 ``[length]`` on the CPU."""
    words = random_words(seed, stream, torch.arange(length), 2, draw=epoch)
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)


def keyed_choice(seed: int, stream: str, index: Tensor, weights: Tensor, draw: int = 0) -> Tensor:
    """Random choices k with probability in proportion to ``weights[k]``: int64 ``[B]``.

    Args:
        seed: the seed.
        stream: name of the stream.
        index: int64 ``[B]``.
        weights: ``[K]`` on the index's device, none below 0, not all 0; an entry of weight 0 is never chosen.
        draw: number of the draw, for several choices an index.
    """
    edges = (weights.double() / weights.sum()).cumsum(0)[:-1]
    uniform = keyed_uniform(seed, stream, index, draw=draw, dtype=torch.float64)
    return torch.bucketize(uniform, edges, right=True)


class SampleNoise:
    """The noise of a batch of samples, request by request.

    The k-th request of sample i is a function of ``(seed, i, k)`` alone, so a sample does not depend on its batch.

    Args:
        seed: the samples' seed.
        indices: the samples' numbers under that seed, int64 ``[B]``.
        shape: shape of one sample.
        dtype: float32 or float64.
    """

    def __init__(self, seed: int, indices: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.seed = seed
        self.indices = indices
        self.shape = tuple(shape)
        self.dtype = dtype
        self._draws = 0

    def _next(self) -> int:
        self._draws += 1
        return self._draws - 1

    def stream(self, name: str) -> SampleNoise:
        """Noise of the same samples for another purpose, independent of the requests made so far."""
        return SampleNoise(stream_key(self.seed, name), self.indices, self.shape, self.dtype)

    def normal(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Standard normal numbers ``[B, *shape]``, by default of a sample's shape."""
        shape = self.shape if shape is None else shape
        return keyed_normal(self.seed, "sample", self.indices, shape, self._next(), self.dtype)

    def uniform(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """Uniform numbers in (0, 1): ``[B, *shape]``, by default of a sample's shape."""
        shape = self.shape if shape is None else shape
        return keyed_uniform(self.seed, "sample", self.indices, shape, self._next(), self.dtype)
