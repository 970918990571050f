r"""Langevin dynamics at one noise level, and annealed from the largest to the smallest noise level.

.. math::  x \leftarrow x + \frac{\eta}{2} s(x) + \sqrt{\eta}\, z, \qquad z \sim N(0, I)

This is the convention of NCSN (Song and Ermon 2019, https://arxiv.org/abs/1907.05600) and the meaning of the key
``eta`` everywhere in this project. NCSNv2 (Song and Ermon 2020, https://arxiv.org/abs/2006.09011) writes
``x + e s + sqrt(2 e) z``: its ``e`` is ``eta / 2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser, require_clip
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process, expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers.base import Move, Run, Sampler, at_time, denoised
from lit_diffusion.samplers.times import timesteps_to_t_min

Initial = Literal["uniform", "gaussian"]


@dataclass(frozen=True)
class LangevinMove(Move):
    """One Langevin step at a noise level, ``s = t``, with step size ``eta``: one number for all rows, or ``[B]``."""

    eta: float | Tensor


def langevin_update(x: Tensor, score: Tensor, eta: float | Tensor, z: Tensor) -> Tensor:
    """``x + (eta/2) score + sqrt(eta) z``; eta is one number for all rows or ``[B]``."""
    if isinstance(eta, Tensor):
        return x + expand_like(0.5 * eta, x) * score + expand_like(eta.sqrt(), x) * z
    return x + (0.5 * eta) * score + math.sqrt(eta) * z


def _refuse_divergence(eta: float, sigma: float) -> None:
    """Refuse a step size at which the chain diverges around a mode of width sigma.

    There it is ``x <- (1 - eta / (2 sigma^2)) x + ...``, whose factor must exceed -1.
    """
    if not eta > 0.0:
        raise UserError(f"Langevin step eta is {eta:g}; it must be positive")
    if eta >= 4.0 * sigma**2:
        raise UserError(
            f"Langevin step eta {eta:g} is not below 4 sigma^2 = {4 * sigma**2:g} at sigma {sigma:g}: the chain "
            f"diverges; choose a smaller eta (it is the eta of x + eta/2 s + sqrt(eta) z)"
        )


class _LangevinSampler(Sampler):
    """The base of plain and annealed dynamics: their initial states and their step."""

    def __init__(self, initial: Initial, uniform_range: tuple[float, float]) -> None:
        require_choice("", "initial", initial, get_args(Initial))
        low, high = uniform_range
        if not low < high:
            raise UserError(f"uniform_range is [{low:g}, {high:g}]; the first must be below the second")
        self.initial = initial
        self.uniform_range = (low, high)

    def start(self, process: Process, noise: SampleNoise) -> Tensor:
        """Uniform on ``uniform_range``, or the prior ``N(0, sigma(1)^2 I)``."""
        if self.initial == "gaussian":
            return super().start(process, noise)
        low, high = self.uniform_range
        return low + (high - low) * noise.uniform()

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One Langevin step at the move's noise level."""
        assert isinstance(move, LangevinMove)
        return langevin_update(x, run.predict(x, move.t).score, move.eta, run.noise.normal())


class Langevin(_LangevinSampler):
    r"""Langevin dynamics at one noise level: from any score, or from an energy with a Metropolis correction.

    .. math::  x \leftarrow x + \frac{\eta}{2} s(x) + \sqrt{\eta}\, z, \qquad z \sim N(0, I)

    For a Gaussian of variance ``s^2`` the chain's variance is ``s^2 / (1 - eta / (4 s^2))``: the discretization's bias,
    which the Metropolis correction removes (MALA: Roberts and Tweedie 1996, https://doi.org/10.2307/3318418).

    Args:
        steps: number of steps.
        eta: step size of ``x + (eta/2) s + sqrt(eta) z``, in units of the data squared; below ``4 sigma^2``.
        sigma: noise level of the score, as the noise-to-signal ratio ``sigma / alpha`` of the process; null: the
            smallest of the process.
        initial: law of the initial states, ``uniform`` on ``uniform_range`` or ``gaussian``, the process's prior.
        uniform_range: range of a uniform start, in data units.
        metropolis: if true, accept or reject each step so that the chain's law is exact; needs a denoiser with an
            energy.

    Raises:
        UserError: for fewer than one step or an empty range.
    """

    def __init__(
        self,
        steps: int = 1000,
        eta: float = 2e-5,
        sigma: float | None = None,
        initial: Initial = "uniform",
        uniform_range: tuple[float, float] = (0.0, 1.0),
        metropolis: bool = False,
    ) -> None:
        super().__init__(initial, uniform_range)
        if steps < 1:
            raise UserError(f"steps is {steps}; Langevin dynamics needs at least one")
        self.steps = steps
        self.eta = eta
        self.sigma = sigma
        self.metropolis = metropolis

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a diverging step size, a noise level between the grid's for a network of these, a missing energy."""
        if self.metropolis and not denoiser.has_energy:
            raise UserError("metropolis needs a model with an energy; this one has only a score: set metropolis: false")
        process = denoiser.process
        t = torch.tensor([plan[0].t], dtype=torch.float64)
        if denoiser.on_grid_only and abs(float(process.grid()[process.level_index(t)] - t)) > 1e-6:
            raise UserError(
                f"sigma {self.sigma:g} lies between the noise levels of this model, whose network is trained on these "
                f"alone: {', '.join(f'{float(sigma):.4g}' for sigma in process.sigma(process.grid()))}; choose one"
            )
        _refuse_divergence(self.eta, float(denoiser.process.sigma(t)))

    def plan(self, process: Process) -> list[LangevinMove]:
        """One move, ``steps`` times."""
        t = process.t_min if self.sigma is None else process.t_at_sigma(self.sigma)
        return [LangevinMove(t, t, self.eta)] * self.steps

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """A step, with ``metropolis`` accepted with probability ``min(1, p(x') q(x|x') / (p(x) q(x'|x)))``."""
        if not self.metropolis:
            return super().step(run, x, move)
        assert isinstance(move, LangevinMove)
        before = run.predict(x, move.t)
        proposal = langevin_update(x, before.score, move.eta, run.noise.normal())
        after = run.predict(proposal, move.t)
        eta = at_time(x, move.eta)
        assert before.energy is not None
        assert after.energy is not None

        def log_transition(end: Tensor, begin: Tensor, score: Tensor) -> Tensor:
            drift = expand_like(0.5 * eta, x) * score
            return -(end - begin - drift).flatten(1).double().square().sum(1) / (2.0 * eta)

        log_ratio = (
            before.energy.double()
            - after.energy.double()
            + log_transition(x, proposal, after.score)
            - log_transition(proposal, x, before.score)
        )
        accepted = run.noise.uniform(()).double().log() < log_ratio
        return torch.where(accepted.view(-1, *[1] * (x.ndim - 1)), proposal, x)


class AnnealedLangevin(_LangevinSampler):
    r"""Annealed Langevin dynamics: ``steps_per_level`` steps at each noise level from the largest to ``sigma_L``.

    .. math::  x \leftarrow x + \frac{\eta_i}{2} s(x, \sigma_i) + \sqrt{\eta_i}\, z, \qquad
               \eta_i = \eta\, \frac{\sigma_i^2}{\sigma_L^2}

    (Song and Ermon 2019, https://arxiv.org/abs/1907.05600, algorithm 1; Song and Ermon 2020,
    https://arxiv.org/abs/2006.09011, algorithm 1.)

    Args:
        steps_per_level: number of steps at each noise level, the papers' T.
        eta: step size at the smallest noise level, of ``x + (eta/2) s + sqrt(eta) z``; below ``4 sigma_L^2``. NCSN on
            CIFAR-10: 4e-5 (its code's 2e-5 is eta/2); NCSNv2: 1.24e-5.
        denoise: if true, end with one step of Tweedie's formula ``x + sigma_L^2 s`` (NCSNv2), which removes the last
            noise.
        initial: law of the initial states, ``uniform`` on ``uniform_range`` (both papers) or ``gaussian``, the prior.
        uniform_range: range of a uniform start, in data units.
        num_levels: number of noise levels to visit, evenly spaced in time and on the process's grid where it has one;
            null: the whole grid, which continuous time does not have.
        clip_x0: range to which the mean of ``denoise`` is clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.

    Raises:
        UserError: for fewer than one step a level or two noise levels, or an empty range.
    """

    def __init__(
        self,
        steps_per_level: int = 100,
        eta: float = 4e-5,
        denoise: bool = False,
        initial: Initial = "uniform",
        uniform_range: tuple[float, float] = (0.0, 1.0),
        num_levels: int | None = None,
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(initial, uniform_range)
        require_clip(clip_x0)
        if steps_per_level < 1:
            raise UserError(f"steps_per_level is {steps_per_level}; annealed Langevin dynamics needs at least one")
        if num_levels is not None and num_levels < 2:
            raise UserError(f"num_levels is {num_levels}; annealed Langevin dynamics visits at least two, or null")
        self.steps_per_level = steps_per_level
        self.eta = eta
        self.denoise = denoise
        self.num_levels = num_levels
        self.clip_x0 = clip_x0

    def _times(self, process: Process) -> Tensor:
        """The times of the noise levels, from noise to data."""
        if self.num_levels is None:
            return process.grid().flip(0)
        return torch.tensor(timesteps_to_t_min(process, self.num_levels - 1), dtype=torch.float64)

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a diverging step size, the same fraction of sigma^2 at every noise level."""
        last = torch.tensor([plan[-1].t], dtype=torch.float64)
        _refuse_divergence(self.eta, float(denoiser.process.sigma(last)))

    def plan(self, process: Process) -> list[LangevinMove]:
        """The moves, ``steps_per_level`` at each noise level."""
        times = self._times(process)
        sigmas = process.sigma(times)
        etas = self.eta * (sigmas / sigmas[-1]) ** 2
        return [
            LangevinMove(t, t, eta)
            for t, eta in zip(times.tolist(), etas.tolist(), strict=True)
            for _ in range(self.steps_per_level)
        ]

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """The posterior mean at the smallest noise level with ``denoise``, else the state."""
        return denoised(run, x, run.plan[-1].t, self.clip_x0) if self.denoise else x
