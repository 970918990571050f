r"""Spacings: the times at which a sampler evaluates the network, falling from the process's t_max.

With ``w_i = i / (N - 1)``, ``i = 0 .. N - 1``, and ``r = sigma / alpha``, each spacing puts N times between the largest
and the smallest one,

.. math::
    \text{uniform:}\quad   & t_i = (1 - w_i)\, t_{max} + w_i\, t_{min} \\
    \text{quadratic:}\quad & t_i = t_{min} + (1 - w_i)^2 (t_{max} - t_{min}) \\
    \text{log\_snr:}\quad  & \log r_i = (1 - w_i) \log r_{max} + w_i \log r_{min} \\
    \text{karras:}\quad    & r_i = \big((1 - w_i)\, r_{max}^{1/\rho} + w_i\, r_{min}^{1/\rho}\big)^\rho \\
    \text{iddpm:}\quad     & r_i = u_{j_i}, \quad j_i = \lfloor (1 - w_i)\, j_{max} + w_i\, j_{min} + \tfrac12 \rfloor

(quadratic: Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502, appendix D.2; log_snr: Lu et al. 2022,
https://arxiv.org/abs/2206.00927, section 3.2; karras: Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5;
iddpm: its table 1, with ``u_j`` the ratios of the cosine betas of Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672). On a grid each time is the nearest grid point, moved where two would coincide. Where
alpha is 0 at t_max r is infinite: the first step goes from t_max to 0.999 t_max, and the others are spaced from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Betas, Process, cosine_betas

Spacing = list[float] | str
"""A row of :data:`SPACINGS` by name, ``karras:RHO`` for another rho than 7, or a list of falling times."""

NEAR_THE_END = 0.999
"""The start of spacings in the log-SNR, as a share of t_max, when the log-SNR is infinite at t_max."""


def uniform(process: Process, count: int) -> Tensor:
    """Equal steps in time: float64 ``[count]``, falling from t_max to the smallest time of sampling."""
    return torch.linspace(process.t_max, process.t_min_sampling, count, dtype=torch.float64)


def quadratic(process: Process, count: int) -> Tensor:
    """Equal steps in the root of time, more of them near the data: like :func:`uniform`."""
    end = process.t_min_sampling
    return end + (process.t_max - end) * torch.linspace(1.0, 0.0, count, dtype=torch.float64) ** 2


def log_snr(process: Process, count: int) -> Tensor:
    """Equal steps in the log-SNR, hence in log(sigma / alpha): like :func:`uniform`."""
    return _spaced_by_ratio(process, count, torch.log, torch.exp)


def karras(process: Process, count: int, rho: float = 7.0) -> Tensor:
    """Equal steps in the rho-th root of sigma / alpha: like :func:`uniform`.

    A larger rho has more of its steps near the data; 1 is uniform in sigma / alpha.
    """
    return _spaced_by_ratio(process, count, lambda ratio: ratio ** (1.0 / rho), lambda root: root**rho)


def iddpm(process: Process, count: int) -> Tensor:
    """Equal steps through the 1000 levels of iDDPM's cosine betas, by their sigma / alpha: like :func:`uniform`.

    Each is the nearest of the levels; their times are those in between where there are not so many of them. The paper's
    ``j_0`` is the level of the end of time.
    """
    cosine = Betas(cosine_betas())

    def level_of(ratio: Tensor) -> Tensor:
        return cosine.t_at_log_snr(-2.0 * ratio.log())

    def ratio_of(t: Tensor) -> Tensor:
        # Half a level away from two is nearer to the smaller ratio: floor(j + 1/2), with j counted from the noise.
        nearest = (t * 1000 - 0.5 - 1e-6).ceil() / 1000
        return torch.exp(-0.5 * cosine.log_snr(nearest if bool((nearest.diff() != 0).all()) else t))

    return _spaced_by_ratio(process, count, level_of, ratio_of)


def _spaced_by_ratio(
    process: Process, count: int, to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """Equal steps in ``to(sigma / alpha)``, whose inverse is ``back``."""
    whole = torch.tensor([process.t_max, process.t_min_sampling], dtype=torch.float64)
    ends, before = whole, whole[:0]
    if bool(process.log_snr(whole[:1]).isinf()):
        ends, before, count = whole * whole.new_tensor([NEAR_THE_END, 1.0]), whole[:1], count - 1
    start, end = to(torch.exp(-0.5 * process.log_snr(ends)))
    # From the last backwards, so that one point after t_max is the smallest time.
    spaced = torch.linspace(float(end), float(start), count, dtype=torch.float64).flip(0)
    times = process.t_at_log_snr(-2.0 * back(spaced).log()).clamp(ends[1], ends[0])
    if len(before) == 0 and count > 0:
        times[0] = ends[0]
    if count > 1 or len(before) > 0:
        times[-1:] = ends[1]
    return torch.cat((before, times))


SPACINGS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
    "iddpm": iddpm,
}
"""Spacings by name."""


def spacing_function(spacing: str) -> Callable[[Process, int], Tensor]:
    """The row of :data:`SPACINGS` for a name, ``karras:RHO`` with its rho.

    Raises:
        UserError: for a name that is not in the table, or a rho that is not a positive number.
    """
    name, colon, given = spacing.partition(":")
    require_choice("", "spacing", name, SPACINGS)
    if not colon:
        return SPACINGS[name]
    try:
        rho = float(given)
    except ValueError:
        rho = math.nan
    if name != "karras" or not 0.0 < rho < math.inf:
        raise UserError(f"spacing is {spacing!r}; only karras has a number, its rho, which is positive: karras:7")
    return partial(karras, rho=rho)


def require_spacing(spacing: Spacing, steps: int | None, intervals: bool) -> None:
    """Refuse an unknown spacing, and a list of times whose number does not match the steps.

    Args:
        spacing: the spacing.
        steps: number of steps; None: any.
        intervals: if true, times are the ends of the steps, one more than there are steps.

    Raises:
        UserError: naming the key.
    """
    if isinstance(spacing, str):
        spacing_function(spacing)
        return
    if len(spacing) < 1 + intervals or any(s >= t for t, s in pairwise(spacing)):
        raise UserError(f"spacing is {spacing}; a list of times falls, from t_max to the last time")
    if steps is not None and steps != len(spacing) - intervals:
        count = len(spacing) - intervals
        raise UserError(f"spacing lists the times of {count} steps and steps is {steps}; set steps null")


def timesteps_to_zero(process: Process, steps: int | None, spacing: Spacing = "uniform") -> list[float]:
    """The times ``t_max = t_1 > .. > t_S`` at which a sampler of S steps that ends at 0 evaluates the network.

    ``uniform`` and ``quadratic`` include t_max, ``t_{S-i} = t_max (1 - i / S)`` or its square; in continuous time
    they are shrunk towards t_max where the last would be below the smallest time of sampling. On a grid of L points
    they are ``round(L i / S)`` or ``round(L i^2 / S^2)`` (Song, Meng and Ermon 2021, appendix D.2).

    Args:
        process: the process of the times.
        steps: S; None for the whole grid, 1000 in continuous time.
        spacing: see :data:`SPACINGS`.

    Raises:
        UserError: for more steps than the grid has points, and times that the process does not have.
    """
    if not isinstance(spacing, str):
        return _given(process, spacing)
    _require_levels(process)
    count, t_max = steps or process.num_timesteps or 1000, process.t_max
    _require_points(process, count)
    if spacing not in ("uniform", "quadratic"):
        return _of_the_process(process, spacing_function(spacing)(process, count))
    fraction = torch.arange(count, 0, -1, dtype=torch.float64) / count
    if spacing == "quadratic":
        fraction = fraction**2
    if process.num_timesteps is not None:
        return _grid_points(process.num_timesteps, fraction * process.num_timesteps)
    times = fraction * t_max
    last, end = float(times[-1]), process.t_min_sampling
    return (t_max - (t_max - times) * ((t_max - end) / (t_max - last)) if last < end else times).tolist()


def timesteps_to_t_min(process: Process, steps: int | None, spacing: Spacing = "uniform") -> list[float]:
    """The times ``t_max = t_0 > .. > t_S`` of a sampler of S steps that ends at the smallest time of sampling.

    Args:
        process: the process of the times.
        steps: S; None for the whole grid, 1000 in continuous time.
        spacing: see :data:`SPACINGS`.

    Raises:
        UserError: for more steps than the grid has, and times that the process does not have.
    """
    if not isinstance(spacing, str):
        return _given(process, spacing)
    _require_levels(process)
    count = (steps or (process.num_timesteps or 1001) - 1) + 1
    _require_points(process, count)
    if spacing == "uniform" and process.num_timesteps is not None:
        return _grid_points(process.num_timesteps, torch.linspace(process.num_timesteps, 1, count, dtype=torch.float64))
    return _of_the_process(process, spacing_function(spacing)(process, count))


def _of_the_process(process: Process, times: Tensor) -> list[float]:
    """Falling times, rounded to the grid where the process has one."""
    return (
        times.tolist()
        if process.num_timesteps is None
        else _grid_points(process.num_timesteps, times * process.num_timesteps)
    )


def _grid_points(num_timesteps: int, position: Tensor) -> list[float]:
    """The times of the grid points ``1 .. num_timesteps`` nearest to falling positions, no two the same."""
    step = torch.arange(1, len(position) + 1, dtype=torch.float64)
    index = position.flip(0).round().minimum(num_timesteps - len(position) + step)
    return (((index - step).clamp(min=0.0).cummax(0).values + step) / num_timesteps).flip(0).tolist()


def _given(process: Process, times: list[float]) -> list[float]:
    """Listed times, on a grid replaced by the exact grid points."""
    _require_levels(process)
    if abs(times[0] - process.t_max) > 1e-6:
        raise UserError(f"spacing begins at time {times[0]:g}; samples start at t_max, {process.t_max:g}")
    for t in times[1:]:
        process.require_time("spacing", t)
    wanted = torch.tensor([process.t_max, *times[1:]], dtype=torch.float64)
    if process.num_timesteps is None:
        return wanted.tolist()
    _require_points(process, len(times))
    found = (wanted * process.num_timesteps).round() / process.num_timesteps
    if float((found - wanted).abs().max()) * process.num_timesteps > 1e-3:
        wrong = float(wanted[(found - wanted).abs().argmax()])
        raise UserError(
            f"spacing has the time {wrong:g}, which is not one of this model's, i / {process.num_timesteps}"
        )
    return found.tolist()


def _require_levels(process: Process) -> None:
    if process.num_timesteps == 1:
        raise UserError(
            "this model has one noise level, and no trajectory leads from noise to data through it; choose langevin"
        )


def _require_points(process: Process, points: int) -> None:
    if process.num_timesteps is not None and points > process.num_timesteps:
        raise UserError(
            f"steps: this sampler visits {points} timesteps and the model has {process.num_timesteps}; ask for fewer "
            f"steps"
        )
