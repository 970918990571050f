r"""Denoisers: what a network's output means, and what can be read from it.

A backbone's raw output F is one linear combination of what it must guess,

.. math::  F = u\, x_0 + v\, \epsilon, \qquad x_t = \alpha x_0 + \sigma \epsilon,

and ``(u, v)`` is all that tells one parametrization from another: they are the rows of :data:`PARAMETRIZATIONS`.
Solving the two equations gives every view in closed form, with ``det = alpha v - sigma u``:

.. math::
    x_0 = \frac{v x_t - \sigma F}{det}, \quad \epsilon = \frac{\alpha F - u x_t}{det}, \quad
    s = -\frac{\epsilon}{\sigma}, \quad velocity = \alpha' x_0 + \sigma' \epsilon.

Each view is one map ``p x_t + q F`` with p and q in float64, never taken through another view: eps through a rounded x0
loses all its digits where sigma is small.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.conditions import Condition
from lit_diffusion.cuda_graphs import RecordedBackbone
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Level, Process, expand_like

Parametrization = Literal["eps", "score", "raw_score", "x0", "v", "velocity", "edm", "mean"]
NoiseInput = Literal["index", "log_sigma", "quarter_log_sigma", "time", "time_999"]
InputScale = Literal["none", "unit_variance"]
ClipX0 = Literal["data"] | tuple[float, float] | None
"""The range in which a predicted clean datum is kept: the data's own, a given one, or none."""


def _edm(level: Level, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    root = torch.sqrt((level.alpha * sigma_data) ** 2 + level.sigma**2)
    return level.sigma / (sigma_data * root), -level.alpha * sigma_data / root


def _mean(level: Level, process: Process, sigma_data: float) -> tuple[Tensor, Tensor]:
    """DDPM's posterior mean ``E[x_{t-1} | x_t, x_0] = on_x0 x_0 + on_xt x_t`` (Ho et al. 2020, eq. 7)."""
    if process.levels is None:
        raise UserError("parametrization 'mean' is DDPM's step to the level below: the process needs levels")
    step = process.transition((level.t - 1.0 / process.levels).clamp(min=0.0), level.t)
    return step.on_x0 + step.on_xt * level.alpha, step.on_xt * level.sigma


PARAMETRIZATIONS: dict[str, Callable[[Level, Process, float], tuple[Tensor, Tensor]]] = {
    "eps": lambda level, process, sd: (torch.zeros_like(level.t), torch.ones_like(level.t)),
    "score": lambda level, process, sd: (torch.zeros_like(level.t), -torch.ones_like(level.t)),
    "raw_score": lambda level, process, sd: (torch.zeros_like(level.t), -1.0 / level.sigma),
    "x0": lambda level, process, sd: (torch.ones_like(level.t), torch.zeros_like(level.t)),
    "v": lambda level, process, sd: (-level.sigma, level.alpha),
    "velocity": lambda level, process, sd: (level.dalpha, level.dsigma),
    "edm": _edm,
    "mean": _mean,
}
"""``(u, v)`` of ``F = u x_0 + v eps`` by name: ``score`` is NCSNv2's ``F = sigma score``, ``raw_score`` NCSN's
``F = score``, ``v`` Salimans and Ho's ``alpha eps - sigma x_0``, ``edm`` Karras et al. 2022, ``mean`` DDPM's posterior
mean."""


def _index(process: Process, level: Level) -> Tensor:
    if process.levels is None:
        raise UserError("noise_input 'index' needs a process with levels; continuous time has no index")
    return (level.t * process.levels - 1.0).clamp(0.0, process.levels - 1.0)


NOISE_INPUTS: dict[str, Callable[[Process, Level], Tensor]] = {
    "index": _index,
    "log_sigma": lambda process, level: torch.log(level.sigma / level.alpha),
    "quarter_log_sigma": lambda process, level: 0.25 * torch.log(level.sigma / level.alpha),
    "time": lambda process, level: level.t,
    "time_999": lambda process, level: 999.0 * level.t,
}
"""``c_noise`` by name: what the backbone is told of the noise level. ``index`` is DDPM's t - 1, 0 .. levels - 1 on the
grid and interpolated between its points; no time is told as another than these."""


@dataclass(frozen=True)
class Prediction:
    """One evaluation of a denoiser and its views, each ``[B, ...]`` like ``x_t`` and in its type.

    Attributes:
        x_t: the noisy input.
        raw: the backbone's output F.
        level: the coefficients of the process at each row's time.
        u: weight of x_0 in F, float64 ``[B]``.
        v: weight of eps in F, float64 ``[B]``.
        energy: ``E(x_t)`` with ``score = -grad E``, up to a constant: ``[B]``, None where the model has none.
        variance_share: the learned reverse variance, as the share w of ``log beta`` in
            ``log variance = w log beta + (1 - w) log beta_tilde`` (Nichol and Dhariwal 2021, eq. 15): ``[B, ...]`` like
            ``x_t``, None where the variance is not learned.
    """

    x_t: Tensor
    raw: Tensor
    level: Level
    u: Tensor
    v: Tensor
    energy: Tensor | None = None
    variance_share: Tensor | None = None

    def _view(self, p: Tensor, q: Tensor) -> Tensor:
        determinant = self.level.alpha * self.v - self.level.sigma * self.u
        raw = self.raw.to(self.x_t.dtype)
        return expand_like(p / determinant, self.x_t) * self.x_t + expand_like(q / determinant, self.x_t) * raw

    @property
    def x0(self) -> Tensor:
        """The posterior mean ``E[x_0 | x_t]`` (Tweedie)."""
        return self._view(self.v, -self.level.sigma)

    @property
    def eps(self) -> Tensor:
        """The expected noise ``E[eps | x_t]``."""
        return self._view(-self.u, self.level.alpha)

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x_t) = -eps / sigma``."""
        return self._view(self.u / self.level.sigma, -self.level.alpha / self.level.sigma)

    @property
    def velocity(self) -> Tensor:
        """``E[alpha' x_0 + sigma' eps | x_t]``: the drift of the probability-flow ODE."""
        level = self.level
        return self._view(
            level.dalpha * self.v - level.dsigma * self.u, level.dsigma * level.alpha - level.dalpha * level.sigma
        )


class Denoiser(nn.Module, ABC):
    """Anything that predicts the clean datum from a noisy one, on a process. Samplers see only this."""

    process: Process
    learned_variance: bool = False
    """Whether predictions say the reverse variance."""

    on_grid_only: bool = False
    """Whether it knows the grid's levels only, and no time between them."""

    data_range: tuple[float, float] | None = None
    """The least and the largest value of what it denoises, None where there are none: points, exact densities."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """Predict from ``x_t`` ``[B, ...]`` at times ``t`` ``[B]`` in (0, 1].

        Args:
            x_t: noisy data.
            t: their times.
            cond: the condition, ``[B]`` rows.
            began: times ``[B]`` at which the step of a sampler began that asks: what is on at some noise levels only,
                such as guidance in an interval, is on or off for whole steps by it; None: t itself.
        """


def require_clip(clip: ClipX0) -> None:
    """Refuse what is no range.

    Raises:
        UserError: naming the key.
    """
    if isinstance(clip, str):
        require_choice("", "clip_x0", clip, ("data",))
    elif clip is not None and not clip[0] < clip[1]:
        raise UserError(f"clip_x0 is [{clip[0]:g}, {clip[1]:g}]; the first must be below the second, or null for none")


def clip_range(clip: ClipX0, denoiser: Denoiser) -> tuple[float, float] | None:
    """The range that is meant with a denoiser, None for none."""
    return denoiser.data_range if clip == "data" else clip


def clipped(x0: Tensor, clip: ClipX0, denoiser: Denoiser) -> Tensor:
    """A predicted clean datum, kept in the range that is meant with its denoiser."""
    found = clip_range(clip, denoiser)
    return x0 if found is None else x0.clamp(*found)


def clip_in_words(clip: ClipX0, denoiser: Denoiser) -> str:
    """A range with what it means here: ``data [-1, 1]``, ``[-1, 1]``, ``null``; ``data`` where the data have none."""
    found = clip_range(clip, denoiser)
    said = "" if found is None else f"[{found[0]:g}, {found[1]:g}]"
    return f"data {said}".rstrip() if clip == "data" else said or "null"


class NetworkDenoiser(Denoiser):
    """A backbone, a process and what the backbone's output means.

    Only the backbone ever runs under autocast: the coefficients are float64, the views and everything after them are
    in the state's own type.

    Args:
        backbone: the network.
        process: the forward noising.
        parametrization: what the network's output is, a row of :data:`PARAMETRIZATIONS`.
        noise_input: what it is told of the noise level, a row of :data:`NOISE_INPUTS`.
        input_scale: ``none`` feeds x_t as it is; ``unit_variance`` divides it by ``sqrt(alpha^2 sigma_data^2 +
            sigma^2)``, which trains better where sigma is large (always on for ``edm``).
        sigma_data: standard deviation of the normalised data, for ``edm`` and ``unit_variance``.
        learned_variance: the second half of the network's output channels says the reverse variance.

    Raises:
        UserError: for a name that is not in the tables, one that asks for levels on a process that has none, or a
            network whose output has another number of channels than that asks for.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: Process,
        parametrization: Parametrization,
        noise_input: NoiseInput,
        input_scale: InputScale = "none",
        sigma_data: float = 0.5,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        require_choice("", "parametrization", parametrization, PARAMETRIZATIONS)
        require_choice("", "noise_input", noise_input, NOISE_INPUTS)
        require_choice("", "input_scale", input_scale, get_args(InputScale))
        self.backbone = backbone
        self.process = process
        self.parametrization = parametrization
        self.noise_input = noise_input
        self.unit_variance = input_scale == "unit_variance" or parametrization == "edm"
        self.sigma_data = sigma_data
        self.learned_variance = learned_variance
        self.on_grid_only = backbone.level_indexed
        if learned_variance or backbone.out_channels is not None:
            channels = backbone.data_shape[0] * (2 if learned_variance else 1)
            if backbone.out_channels != channels:
                raise UserError(
                    f"the backbone has out_channels {backbone.out_channels}; data of {backbone.data_shape[0]} channels "
                    f"with{'' if learned_variance else 'out'} a learned variance need out_channels: {channels}"
                )
        # A level index or a step below asks for a grid: find out now, not in the first step.
        end = process.level(torch.ones(1, dtype=torch.float64))
        PARAMETRIZATIONS[parametrization](end, process, sigma_data)
        NOISE_INPUTS[noise_input](process, end)
        self.autocast_dtype: torch.dtype | None = None
        """The type the backbone computes in under mixed precision, None for float32 throughout."""
        self.compiled = False
        self.rows: int | None = None
        """How many rows the backbone is given at once, filled up and taken apart; None: as many as there are."""
        self.recorded: RecordedBackbone | None = None
        """Evaluates the backbone where no gradient is asked for; None: the backbone does."""

    def compile_backbone(self, rows: int | None) -> None:
        """Compile the backbone in place, as one graph, for batches of one size, which is all that it is given then.

        There are two such graphs, one for training and one for what takes no gradients; gradients in evaluation mode
        (likelihoods, pictures by noise level) are computed without. The names of the weights stay, and weights that are
        written over in place are seen.

        Args:
            rows: of the batches, those of training; None: whatever comes, compiled again for each size.
        """
        self.rows = rows
        self.compiled = True
        self.backbone.compile(fullgraph=True, dynamic=False)

    def _evaluate(self, x: Tensor, c_noise: Tensor, cond: Condition | None) -> Tensor:
        rows, given = self.rows, len(x)
        if self.compiled and torch.is_grad_enabled() and not self.training:
            return self.backbone.forward(x, c_noise, cond)
        backbone = self.backbone if self.recorded is None or torch.is_grad_enabled() else self.recorded
        if rows is None or given == rows:
            return backbone(x, c_noise, cond)
        number = torch.arange(-(-given // rows) * rows, device=x.device).clamp(max=given - 1)  # The last row fills up.
        parts = [backbone(x[part], c_noise[part], None if cond is None else cond[part]) for part in number.split(rows)]
        return torch.cat(parts)[:given]

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """See :meth:`Denoiser.forward`."""
        level = self.process.level(t)
        u, v = PARAMETRIZATIONS[self.parametrization](level, self.process, self.sigma_data)
        x_in = x_t
        if self.unit_variance:
            scale = torch.rsqrt((level.alpha * self.sigma_data) ** 2 + level.sigma**2)
            x_in = expand_like(scale, x_t) * x_t
        c_noise = NOISE_INPUTS[self.noise_input](self.process, level).to(torch.float32)
        x_in = x_in.to(next(self.backbone.parameters()).dtype)
        with torch.autocast(x_t.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            raw = self._evaluate(x_in, c_noise, cond)
        share = None
        if self.learned_variance:
            raw, told = raw.chunk(2, dim=1)
            share = 0.5 * (told.to(x_t.dtype) + 1.0)
        return Prediction(x_t, raw, level, u, v, variance_share=share)
