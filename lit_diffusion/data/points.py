"""Toy distributions in the plane: float32 points that are functions of (seed, index) alone.

A set of 1,000 points is the beginning of the set of 2,000 points with the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.data.in_memory import InMemory
from lit_diffusion.errors import UserError
from lit_diffusion.randomness import keyed_choice, keyed_normal, keyed_uniform


class GaussianMixturePoints(InMemory):
    r"""A mixture of isotropic Gaussians, :math:`p(x) = \sum_k w_k N(x; \mu_k, s^2 I)`: float32 ``[D]``.

    The default is the toy data of NCSN (Song and Ermon 2019, https://arxiv.org/abs/1907.05600, section 3.2), on which
    Langevin dynamics give wrong weights of the two modes. The label of a point is its component.

    Args:
        means: ``[K, D]``, the centers of the components.
        weights: ``[K]``, positive, with the sum 1.
        std: the standard deviation of every component in every direction; 0 puts all points on the centers.
        size: number of points.
        seed: seed of the points.

    Attributes:
        means: float64 ``[K, D]``.
        weights: float64 ``[K]``.
        std: a float.

    Raises:
        UserError: if ``means``, ``weights`` and ``std`` do not define a mixture.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] = ((-5.0, -5.0), (5.0, 5.0)),
        weights: Sequence[float] = (0.2, 0.8),
        std: float = 1.0,
        size: int = 50_000,
        seed: int = 0,
    ) -> None:
        if not means or not means[0] or len({len(mean) for mean in means}) != 1:
            raise UserError(f"means: {means} are not K centers of D numbers each: give e.g. [[-5, -5], [5, 5]]")
        if len(weights) != len(means) or min(weights) <= 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise UserError(
                f"weights: {weights} must be {len(means)} positive numbers with the sum 1, one for each mean"
            )
        if std < 0:
            raise UserError(f"std: {std} is negative: give the standard deviation of the components, e.g. 1.0")
        self.means = torch.tensor(means, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.std = float(std)
        index = _indices(size)
        component = _choice(seed, index, self.weights)
        noise = keyed_normal(seed, "points/normal", index, (self.means.shape[1],), dtype=torch.float64)
        points = self.means[component] + self.std * noise
        super().__init__(
            _as_points(points),
            component.numpy(),
            name="gaussian-mixture",
            num_grey_levels=None,
            num_classes=len(self.means),
        )


class Spiral(InMemory):
    r"""Spiral arms: :math:`x = r (\cos(2 \pi n r / R + \phi), \sin(2 \pi n r / R + \phi)) + s \epsilon`.

    float32 ``[2]``. Each arm has its own phase :math:`\phi`, and :math:`r = R \sqrt{u}` with u uniform spreads the
    points about evenly along an arm.

    Args:
        arms: number of arms.
        turns: number of turns of each arm, n.
        radius: radius of the ends of the arms, R.
        std: standard deviation of the noise, s.
        size: number of points.
        seed: seed of the points.

    Raises:
        UserError: for fewer than one arm.
    """

    def __init__(
        self,
        arms: int = 2,
        turns: float = 1.5,
        radius: float = 3.0,
        std: float = 0.1,
        size: int = 50_000,
        seed: int = 0,
    ) -> None:
        if arms < 1:
            raise UserError(f"arms: {arms} arms do not make a spiral: give at least 1")
        index = _indices(size)
        uniform = _uniform(seed, index, 1)[:, 0]
        phase = _choice(seed, index, torch.ones(arms)) * (2.0 * math.pi / arms)
        r = radius * uniform.sqrt()
        angle = 2.0 * math.pi * turns * (r / radius) + phase
        points = _on_circle(r, angle) + std * _normal(seed, index)
        super().__init__(_as_points(points), name="spiral", num_grey_levels=None)


class SwissRoll(InMemory):
    r"""The section of the Swiss roll: :math:`x = t (\cos t, \sin t) / 5 + s \epsilon`, t uniform in (1.5 pi, 4.5 pi).

    float32 ``[2]``, within about 3 of the origin: a cross-section of scikit-learn's roll, scaled down.

    Args:
        std: standard deviation of the noise, s.
        size: number of points.
        seed: seed of the points.
    """

    def __init__(self, std: float = 0.1, size: int = 50_000, seed: int = 0) -> None:
        index = _indices(size)
        t = 1.5 * math.pi * (1.0 + 2.0 * _uniform(seed, index, 1)[:, 0])
        points = _on_circle(t / 5.0, t) + std * _normal(seed, index)
        super().__init__(_as_points(points), name="swiss-roll", num_grey_levels=None)


class Checkerboard(InMemory):
    """The uniform distribution on the squares of one color of a checkerboard: float32 ``[2]``.

    The square in the lower left corner is one of them. The density is flat with sharp edges, which a smooth model can
    only approach.

    Args:
        cells: number of squares on each side of the board; even.
        extent: half the side of the board, which covers ``(-extent, extent)`` in both directions.
        size: number of points.
        seed: seed of the points.

    Raises:
        UserError: if ``cells`` is not even.
    """

    def __init__(self, cells: int = 4, extent: float = 4.0, size: int = 50_000, seed: int = 0) -> None:
        if cells < 2 or cells % 2:
            raise UserError(f"cells: {cells} must be even and at least 2, so that both colors have as many squares")
        index = _indices(size)
        column = _choice(seed, index, torch.ones(cells))
        row = 2 * _choice(seed, index, torch.ones(cells // 2), draw=1) + column % 2
        corner = torch.stack((column, row), dim=-1)
        points = (corner + _uniform(seed, index, 2)) * (2.0 * extent / cells) - extent
        super().__init__(_as_points(points), name="checkerboard", num_grey_levels=None)


class Rings(InMemory):
    r"""Concentric rings of equal weight, :math:`x = r_k (\cos \theta, \sin \theta) + s \epsilon`: float32 ``[2]``.

    Args:
        radii: radii of the rings, r.
        std: standard deviation of the noise, s.
        size: number of points.
        seed: seed of the points.

    Raises:
        UserError: without a ring.
    """

    def __init__(
        self,
        radii: Sequence[float] = (0.75, 1.5, 2.25, 3.0),
        std: float = 0.08,
        size: int = 50_000,
        seed: int = 0,
    ) -> None:
        if not radii:
            raise UserError("radii: [] holds no ring: give at least one radius")
        index = _indices(size)
        r = torch.tensor(radii, dtype=torch.float64)[_choice(seed, index, torch.ones(len(radii)))]
        angle = 2.0 * math.pi * _uniform(seed, index, 1)[:, 0]
        points = _on_circle(r, angle) + std * _normal(seed, index)
        super().__init__(_as_points(points), name="rings", num_grey_levels=None)


def _indices(size: int) -> Tensor:
    if size < 1:
        raise UserError(f"size: {size} is not a number of points: give at least 1")
    return torch.arange(size)


def _uniform(seed: int, index: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1): float64 ``[N, count]``."""
    return keyed_uniform(seed, "points/uniform", index, (count,), dtype=torch.float64)


def _normal(seed: int, index: Tensor) -> Tensor:
    """Standard normal numbers: float64 ``[N, 2]``."""
    return keyed_normal(seed, "points/normal", index, (2,), dtype=torch.float64)


def _choice(seed: int, index: Tensor, weights: Tensor, draw: int = 0) -> Tensor:
    return keyed_choice(seed, "points/choice", index, weights, draw)


def _on_circle(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)


def _as_points(points: Tensor) -> np.ndarray:
    return points.to(torch.float32).numpy()
