"""Nearest neighbors in feature space, block by block, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_diffusion.metrics.extractors import full_precision

BLOCK_MB = 256
"""Megabytes of distances that are held at once."""


def distance_blocks(
    queries: Tensor, points: Tensor, device: torch.device, block_mb: int = BLOCK_MB
) -> Iterator[tuple[int, Tensor]]:
    """Squared distances of a few queries at a time to all points: ``(first query, [b, M])``, float32 on ``device``.

    Computed as ``|q|^2 + |p|^2 - 2 q p`` about the points' mean, which keeps the canceling terms small.
    """
    points = points.to(device, torch.float32)
    mean = points.mean(0)
    points = points - mean
    norms = points.square().sum(1)
    rows = max(1, block_mb * 2**20 // (4 * max(1, len(points))))
    for start in range(0, len(queries), rows):
        with full_precision(device):
            block = queries[start : start + rows].to(device, torch.float32) - mean
            squares = torch.addmm(norms[None], block, points.T, alpha=-2.0)
            squares.add_(block.square().sum(1, keepdim=True)).clamp_(min=0.0)
        yield start, squares


def nearest(
    queries: Tensor,
    points: Tensor,
    k: int,
    device: torch.device | None = None,
    block_mb: int = BLOCK_MB,
    excluding_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query: squared distances ``[N, k]`` ascending and positions ``[N, k]``; on the CPU.

    Args:
        queries: ``[N, D]``.
        points: ``[M, D]``.
        k: number of neighbors, at most M, or M - 1 with ``excluding_self``.
        device: device of the computation; None for the CPU.
        block_mb: megabytes of distances that are held at once.
        excluding_self: true where the queries are the points, so that none is its own neighbor.
    """
    values, positions = [], []
    for start, squares in distance_blocks(queries, points, device or torch.device("cpu"), block_mb):
        if excluding_self:
            squares.diagonal(offset=start).fill_(float("inf"))
        found = squares.topk(k, dim=1, largest=False, sorted=True)
        values.append(found.values.cpu())
        positions.append(found.indices.cpu())
    if not values:
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(values), torch.cat(positions)


def nearest_exactly(
    queries: Tensor, points: Tensor, k: int, device: torch.device | None = None, block_mb: int = BLOCK_MB
) -> tuple[Tensor, Tensor]:
    """Exact distances ``[N, k]`` (not squared, float64) of the k nearest points, and their positions.

    They are computed by differences from a few more candidates than k: between near copies the blocks' float32 loses
    all digits.
    """
    _, candidates = nearest(queries, points, min(len(points), k + 3), device, block_mb)
    distances, positions = [], []
    for part in torch.arange(len(queries)).split(256):
        difference = queries[part].cpu().double()[:, None] - points[candidates[part]].cpu().double()
        exact, order = difference.square().sum(-1).sqrt().sort(dim=1)
        distances.append(exact[:, :k])
        positions.append(candidates[part].gather(1, order[:, :k]))
    if not distances:
        return torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(distances), torch.cat(positions)


@dataclass
class Neighbourhood:
    """Real features and the distances between them, shared by several metrics and computed once.

    Attributes:
        features: float32 ``[M, D]``.
        device: device of the computation.
        block_mb: megabytes of distances that are held at once.
    """

    features: Tensor
    device: torch.device
    block_mb: int = BLOCK_MB

    def __post_init__(self) -> None:
        self._squares: Tensor | None = None
        self._nearest: Tensor | None = None

    def squared_radius(self, k: int) -> Tensor:
        """Squared distances to the k-th nearest neighbors: float32 ``[M]``."""
        if self._squares is None or self._squares.shape[1] < k:
            deepest = min(max(k, 5), len(self.features) - 1)
            self._squares, _ = nearest(self.features, self.features, deepest, self.device, self.block_mb, True)
        return self._squares[:, k - 1]

    def nearest_other(self) -> Tensor:
        """Exact distances to the nearest neighbors: float64 ``[M]``."""
        if self._nearest is None:
            # The first of two is the datum itself or an exact copy of it; the second is its nearest neighbor.
            self._nearest = nearest_exactly(self.features, self.features, 2, self.device, self.block_mb)[0][:, 1]
        return self._nearest
