"""Figures: scatter plots, score fields, lines, bars. Matplotlib without a display, imported when used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHADE = "Blues"
"""Colour map of densities and errors in every figure."""


def new_figure(rows: int, columns: int, side: float = 3.4) -> tuple[Any, Any]:
    """A figure and its axes ``[rows, columns]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: nothing global, nothing to close, no display.
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def render(figure: Any, dpi: int = 110) -> np.ndarray:
    """A figure as uint8 ``[H, W, 3]``."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def points_panel(axes: Any, points: np.ndarray, title: str, limits: tuple[float, float] | None = None) -> None:
    """A scatter plot of ``[N, 2]``."""
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4, linewidths=0, color="tab:blue")
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")
    if limits is not None:
        axes.set_xlim(limits)
        axes.set_ylim(limits)


def field_panel(axes: Any, grid: np.ndarray, vectors: np.ndarray, shade: np.ndarray, title: str) -> None:
    """Arrows ``[n, n, 2]`` on a square grid of coordinates ``[n]`` over a shading ``[n, n]``."""
    axes.pcolormesh(grid, grid, shade, cmap=SHADE, shading="gouraud")
    every = max(1, len(grid) // 20)
    thin = slice(every // 2, None, every)
    axes.quiver(grid[thin], grid[thin], vectors[thin, thin, 0], vectors[thin, thin, 1], width=0.004, color="0.2")
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal")


def lines_panel(
    axes: Any,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Named lines over common positions, with a mark at each."""
    for name, y in lines.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)


def bars_panel(
    axes: Any, labels: Sequence[str], heights: Sequence[float], x_label: str, y_label: str, title: str
) -> None:
    """A bar for each label."""
    positions = range(len(labels))
    axes.bar(positions, heights)
    axes.set_xticks(positions, labels, rotation=90, fontsize=7)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=9)


def scatter(points: np.ndarray, path: Path, title: str) -> None:
    """A scatter plot of the first two coordinates of ``[N, D]`` as a PNG."""
    from lit_diffusion.images import save_png

    figure, axes = new_figure(1, 1, side=5.0)
    points_panel(axes[0, 0], points[:, :2], title)
    save_png(render(figure), path)
