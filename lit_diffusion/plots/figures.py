"""Scatter plots, score fields, lines, curves and bars by Matplotlib, without a display, imported when used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SHADE = "Blues"
"""Color map of densities and errors in every figure."""


_DARK = {"paper": "#1c2128", "ink": "#c9d1d9", "edge": "#545d68"}
_THEMES: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {
        "figure.facecolor": _DARK["paper"],
        "axes.facecolor": _DARK["paper"],
        "legend.facecolor": _DARK["paper"],
        "text.color": _DARK["ink"],
        "axes.labelcolor": _DARK["ink"],
        "xtick.color": _DARK["ink"],
        "ytick.color": _DARK["ink"],
        "axes.edgecolor": _DARK["edge"],
        "legend.edgecolor": _DARK["edge"],
        "grid.color": _DARK["edge"],
    },
}
_CYCLES = {
    "light": ["#1f6feb", "#d1571b", "#2b8a3e", "#8a3ffc", "#b02a5b", "#0f7b8a", "#8a6d00", "#57606a"],
    "dark": ["#6cb6ff", "#f69d50", "#6bc46d", "#b083f0", "#f47ba8", "#56c8d8", "#daaa3f", "#adbac7"],
}


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Context with the colors of a ``light`` or a ``dark`` page."""
    from cycler import cycler
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "axes.prop_cycle": cycler(color=_CYCLES[name]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        **_THEMES[name],
    }
    with rc_context(settings):
        yield


def new_figure(rows: int, columns: int, side: float = 3.4) -> tuple[Any, Any]:
    """Make a figure and its axes ``[rows, columns]``, each of ``side`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: nothing global, nothing to close, no display.
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def render(figure: Any, dpi: int = 110) -> np.ndarray:
    """Render a figure to uint8 ``[H, W, 3]``."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def points_panel(axes: Any, points: np.ndarray, title: str, limits: tuple[float, float] | None = None) -> None:
    """Draw a scatter plot of ``[N, 2]``, or a histogram of ``[N, 1]``."""
    axes.set_title(title, fontsize=9)
    if points.shape[1] == 1:
        axes.hist(points[:, 0], bins=100, color="tab:blue")
        return
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4, linewidths=0, color="tab:blue")
    axes.set_aspect("equal")
    if limits is not None:
        axes.set_xlim(limits)
        axes.set_ylim(limits)


def field_panel(axes: Any, grid: np.ndarray, vectors: np.ndarray, shade: np.ndarray, title: str) -> None:
    """Draw arrows ``[n, n, 2]`` on a square grid of coordinates ``[n]`` over a shading ``[n, n]``."""
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
    """Draw named lines over common positions, with a mark at each."""
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


def curves_panel(
    axes: Any,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    colors: str | None = None,
    faint: str | None = None,
) -> None:
    """Draw named curves, each over its own positions; logarithmic where values span more than a factor of 10.

    Args:
        axes: axes to draw on.
        curves: positions and values by name; a value that is not finite is a gap.
        x_label: label of the positions.
        y_label: label of the values.
        colors: name of a color map, for curves that have an order; None: distinct colors.
        faint: name of a curve that is drawn thin and pale.
    """
    from matplotlib import colormaps

    for number, (name, (x, y)) in enumerate(curves.items()):
        style: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.55} if name == faint else {"linewidth": 1.5}
        if len(x) <= 30:
            style |= {"marker": "o", "markersize": 3.5}
        if colors is not None:
            style["color"] = colormaps[colors](0.2 + 0.65 * number / max(len(curves) - 1, 1))
        axes.plot(x, y, label=literal(name), **style)
    set_scale(axes, [value for _, y in curves.values() for value in y])
    axes.set_xlabel(literal(x_label))
    axes.set_ylabel(literal(y_label))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False}
        axes.legend(fontsize=8, framealpha=0.7, **(beside if len(curves) > 6 else {}))


def counts_axis(axes: Any) -> None:
    """Format an x axis of large counts, from 0, in thousands and millions: 240k."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def literal(text: str) -> str:
    """Escape a text for matplotlib: a ``$`` in a name begins no mathematics."""
    return text.replace("$", r"\$")


def set_scale(axes: Any, values: Sequence[float]) -> None:
    """Make the y axis logarithmic for positive values that span more than a factor of 10."""
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if len(finite) and finite.min() > 0.0 and finite.max() > 10.0 * finite.min():
        axes.set_yscale("log")


def bars_panel(
    axes: Any, labels: Sequence[str], heights: Sequence[float], x_label: str, y_label: str, title: str
) -> None:
    """Draw a bar for each label."""
    positions = range(len(labels))
    axes.bar(positions, heights)
    axes.set_xticks(positions, labels, rotation=90, fontsize=7)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=9)


def scatter(points: np.ndarray, path: Path, title: str) -> None:
    """Save a scatter plot of the first two coordinates of ``[N, D]`` as a PNG."""
    from lit_diffusion.images import save_png

    figure, axes = new_figure(1, 1, side=5.0)
    points_panel(axes[0, 0], points[:, :2], title)
    save_png(render(figure), path)
