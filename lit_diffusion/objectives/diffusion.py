r"""DDPM's objectives: the simple loss, the variational bound, and their hybrid.

.. math::
    L_{simple} &= E_{t, \epsilon} |F_\theta(x_t, t) - F|^2 / D \\
    L_{vlb} &= \sum_t L_{t-1} / (D \ln 2), \quad
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)), \quad L_0 = -\log p_\theta(x_0 | x_1) \\
    L_{hybrid} &= L_{simple} + 0.001\, L_{vlb}

(Ho et al. 2020, https://arxiv.org/abs/2006.11239, eqs. 5, 12 and 14; Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672, eq. 16, where the gradient of L_vlb does not reach the mean). F is the network's
target: the noise in DDPM. With a fixed variance ``L_{t-1}`` is DDPM's weighted loss
``beta^2 / (2 sigma^2 alpha (1 - abar)) |eps - eps_theta|^2``. The prior's term has no parameters and is left out;
:mod:`lit_diffusion.likelihood` has it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.objectives.base import Loss
from lit_diffusion.objectives.denoising import output_error
from lit_diffusion.objectives.laws import Levels, SecondMoments
from lit_diffusion.objectives.objective import Objective
from lit_diffusion.reverse import ReverseChain, ReverseVariance, bound_term

LossName = Literal["simple", "bound", "hybrid"]
LevelLaw = Literal["levels", "second_moment"]

HYBRID_WEIGHT = 0.001
"""The weight of the bound in L_hybrid, in bits per dimension (Nichol and Dhariwal 2021, section 3.1)."""


class DiffusionObjective(Objective):
    r"""DDPM's losses ``L_simple``, ``L_vlb`` and ``L_hybrid = L_simple + 0.001 L_vlb`` for a process on a grid.

    .. math::
        L_{simple} = E_{t, \epsilon} |F_\theta(x_t, t) - F|^2 / D, \qquad
        L_{vlb} = \frac{1}{D \ln 2} \Big(\sum_{t > 1} KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t))
        - \log p_\theta(x_0 | x_1)\Big)

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239; Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672.) The
    bound does not clip the predicted datum: a clipped prediction has no gradient.

    Args:
        num_timesteps: T.
        loss: ``simple``, ``bound`` (in bits per dimension) or ``hybrid``.
        variance: the variance of the reverse steps that the bound scores.
        time_law: the law of t in training: ``levels``, all timesteps alike, or ``second_moment``, see
            :class:`~lit_diffusion.objectives.laws.SecondMoments`.

    Raises:
        UserError: for a name that is not in the tables, and for a learned variance that the loss would not train.
    """

    def __init__(
        self, num_timesteps: int, loss: LossName, variance: ReverseVariance, time_law: LevelLaw = "levels"
    ) -> None:
        require_choice("", "loss", loss, get_args(LossName))
        require_choice("", "time_law", time_law, get_args(LevelLaw))
        if variance == "learned" and loss == "simple":
            raise UserError("loss: simple does not train a learned variance; choose hybrid or bound")
        super().__init__(SecondMoments(num_timesteps) if time_law == "second_moment" else Levels())
        self.loss = loss
        self.chain = ReverseChain(variance, clip_x0=None)

    def at(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Condition | None = None,
        grey_levels: GreyLevels | None = None,
    ) -> Loss:
        """The loss at the grid points nearest to given times ``[B]``, and noise ``[B, ...]``."""
        process = denoiser.process
        assert process.num_timesteps is not None
        self.chain.check(denoiser)
        index = process.level_index(t)
        t = (index + 1).to(torch.float64) / process.num_timesteps
        prediction = denoiser(process.perturb(x0, t, eps), t, cond)
        per_sample = x0.new_zeros(len(x0))
        if self.loss != "bound":
            per_sample = output_error(prediction, x0, eps).flatten(1).square().mean(1)
        if self.loss != "simple":
            scored, factor = prediction, 1.0
            if self.loss == "hybrid":
                scored, factor = replace(prediction, raw=prediction.raw.detach()), HYBRID_WEIGHT
            s = index.to(torch.float64) / process.num_timesteps
            nats = bound_term(scored, denoiser, x0, s, self.chain, grey_levels)
            bits = process.num_timesteps / (x0[0].numel() * math.log(2.0)) * nats
            per_sample = per_sample + factor * bits.to(x0.dtype)
        return Loss(per_sample, t)
