r"""DDPM's objectives: the simple loss, the variational bound, and their hybrid.

.. math::
    L_{simple} &= E_{t, \epsilon} |F_\theta(x_t, t) - F|^2 / D \\
    L_{vlb} &= \sum_t L_{t-1} / (D \ln 2), \quad
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)), \quad L_0 = -\log p_\theta(x_0 | x_1) \\
    L_{hybrid} &= L_{simple} + 0.001\, L_{vlb}

(Ho et al. 2020, eqs. 5, 12 and 14; Nichol and Dhariwal 2021, eq. 16, where L_vlb does not move the mean). F is what the
network predicts: the noise in DDPM. With a fixed variance ``L_{t-1}`` is DDPM's weighted loss
``beta^2 / (2 sigma^2 alpha (1 - abar)) |eps - eps_theta|^2``. The prior's term has no parameters and is left out
here; see :mod:`lit_diffusion.likelihood`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_diffusion.conditions import Condition
from lit_diffusion.data.facts import GreyLevels
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.objectives.base import Loss
from lit_diffusion.processes import expand_like
from lit_diffusion.randomness import keyed_normal, keyed_uniform
from lit_diffusion.reverse import ReverseChain, ReverseVariance, bound_term

LossName = Literal["simple", "bound", "hybrid"]
LevelLaw = Literal["levels", "second_moment"]

HYBRID_WEIGHT = 0.001
"""Of the bound, in bits per dimension, beside the simple loss (Nichol and Dhariwal 2021, section 3.1)."""


class SecondMoments(nn.Module):
    r"""Which noise level to train on, by how large the losses were lately.

    .. math::  p_t \propto \sqrt{E[L_t^2]}

    over the last ten losses of each level, mixed with 0.001 of the uniform law, and uniform until every level has ten
    (Nichol and Dhariwal 2021, eq. 18 and section 3.3). What it remembers is in the checkpoint.

    Args:
        levels: T.
        remembered: losses kept of each level.
        uniform_share: of the uniform law in the mixture.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, levels: int, remembered: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("history", torch.zeros(levels, remembered, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(levels, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Of the levels, from the least noise to the most: float64 ``[T]``."""
        levels, remembered = self.history.shape
        if bool((self.counts < remembered).any()):
            return torch.full_like(self.history[:, 0], 1.0 / levels)
        moments = self.history.square().mean(1).sqrt()
        share = self.uniform_share
        return (1.0 - share) * moments / moments.sum().clamp(min=1e-300) + share / levels

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Level indices int64 ``[B]`` from uniform numbers ``[B]``, and the weights ``1 / (T p)`` float64 ``[B]``."""
        probabilities = self.probabilities()
        cumulated = probabilities.cumsum(0)
        index = torch.searchsorted(cumulated, u.to(torch.float64) * cumulated[-1], right=True)
        index = index.clamp(max=len(probabilities) - 1)
        return index, 1.0 / (len(probabilities) * probabilities[index])

    @torch.no_grad()
    def remember(self, index: Tensor, loss: Tensor) -> None:
        """Take in the losses ``[B]`` of level indices ``[B]``, in their order; the oldest of a level goes first."""
        levels, remembered = self.history.shape
        order = torch.argsort(index, stable=True)
        index, loss = index[order], loss[order].to(self.history.dtype)
        arrived = torch.bincount(index, minlength=levels)
        # Which of its level's losses each is, in the order in which they came.
        place = torch.arange(len(index), device=index.device) - (arrived.cumsum(0) - arrived)[index]
        kept = place >= arrived[index] - remembered
        slot = (self.counts[index] + place) % remembered
        self.history[index[kept], slot[kept]] = loss[kept]
        self.counts += arrived


class DiffusionObjective(nn.Module):
    """The losses above, for a process on a grid.

    Args:
        levels: T.
        loss: ``simple``, ``bound`` (in bits per dimension) or ``hybrid``.
        variance: of the reverse steps that the bound scores. It does not clip the predicted datum, as the papers' code
            does not while it trains: where a prediction is clipped it would learn nothing.
        time_law: in training: ``levels``, all alike, or ``second_moment``, see :class:`SecondMoments`.

    Raises:
        UserError: for a name that is not one of these, and for a learned variance that the loss would not train.
    """

    def __init__(self, levels: int, loss: LossName, variance: ReverseVariance, time_law: LevelLaw = "levels") -> None:
        super().__init__()
        require_choice("", "loss", loss, get_args(LossName))
        require_choice("", "time_law", time_law, get_args(LevelLaw))
        if variance == "learned" and loss == "simple":
            raise UserError("loss: simple does not train a learned variance; choose hybrid or bound")
        self.loss = loss
        self.chain = ReverseChain(variance, clip_x0=None)
        self.second_moments = SecondMoments(levels) if time_law == "second_moment" else None

    def forward(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        seed: int,
        index: Tensor,
        grey_levels: GreyLevels | None,
        cond: Condition | None = None,
    ) -> Loss:
        """The loss of the images that are number ``index`` ``[B]`` of a run: their times and noise are keyed by it.

        In evaluation mode all levels are drawn alike, whatever the law has learned: held-out losses are of one law.
        """
        levels = denoiser.process.levels
        assert levels is not None
        u = keyed_uniform(seed, "time", index)
        if self.second_moments is None or not self.training:
            level, weight = (u.to(torch.float64) * levels).long().clamp(max=levels - 1), None
        else:
            level, weight = self.second_moments.draw(u)
        eps = keyed_normal(seed, "noise", index, tuple(x0.shape[1:]), dtype=x0.dtype)
        loss = self.at(denoiser, x0, level, eps, grey_levels, cond)
        if weight is None:
            return loss
        weighted, kept = loss.per_sample * weight.to(x0.dtype), {"index": level, "loss": loss.shown}
        return Loss(weighted, loss.t, unweighted=loss.shown, kept=kept)

    def at(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        level: Tensor,
        eps: Tensor,
        grey_levels: GreyLevels | None,
        cond: Condition | None = None,
    ) -> Loss:
        """The loss at given level indices ``0 .. T - 1`` ``[B]`` and noise, whatever the law of t."""
        process = denoiser.process
        assert process.levels is not None
        self.chain.check(denoiser)
        t = (level + 1).to(torch.float64) / process.levels
        prediction = denoiser(process.perturb(x0, t, eps), t, cond)
        per_sample = x0.new_zeros(len(x0))
        if self.loss != "bound":
            target = expand_like(prediction.u, x0) * x0 + expand_like(prediction.v, x0) * eps
            per_sample = (prediction.raw.to(x0.dtype) - target).flatten(1).square().mean(1)
        if self.loss != "simple":
            scored, factor = prediction, 1.0
            if self.loss == "hybrid":
                scored, factor = replace(prediction, raw=prediction.raw.detach()), HYBRID_WEIGHT
            s = level.to(torch.float64) / process.levels
            nats = bound_term(scored, denoiser, x0, s, self.chain, grey_levels)
            bits = process.levels / (x0[0].numel() * math.log(2.0)) * nats
            per_sample = per_sample + factor * bits.to(x0.dtype)
        return Loss(per_sample, t)

    def remember(self, **kept: Tensor) -> None:
        """Tell the law of the levels what the losses of a whole step kept; nothing for a law that does not learn."""
        if self.second_moments is not None:
            self.second_moments.remember(**kept)
