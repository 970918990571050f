r"""Denoising score matching: the law of t, the weight, the loss of each datum.

.. math::  L(\theta) = E_{t}\, \lambda(t)\, E_{x_0, \epsilon}\,
           \Big\| s_\theta(\alpha x_0 + \sigma \epsilon, t) + \frac{\epsilon}{\sigma} \Big\|^2

(Vincent 2011, https://doi.org/10.1162/NECO_a_00142, eq. 9; Song and Ermon 2019, https://arxiv.org/abs/1907.05600,
eqs. 5 and 6). It is computed as ``lambda/sigma^2 |eps_theta - eps|^2``, the same number without dividing two small
ones. For each t its minimizer is the score of the smoothed density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.denoisers import Denoiser, Prediction
from lit_diffusion.errors import require_choice
from lit_diffusion.objectives.base import Loss
from lit_diffusion.objectives.laws import TimeLaw, law_of
from lit_diffusion.objectives.objective import Objective
from lit_diffusion.processes import Coefficients, Process, expand_like

TimeLawName = Literal["levels", "uniform", "importance", "log_uniform", "log_normal", "logit_normal"]
Weight = Literal["sigma2", "one", "g2", "raw"]
Reduction = Literal["half_sum", "mean"]

WEIGHTS: dict[str, Callable[[Process, Coefficients], Tensor]] = {
    "sigma2": lambda process, coefficients: coefficients.sigma**2,
    "one": lambda process, coefficients: torch.ones_like(coefficients.sigma),
    "g2": lambda process, coefficients: process.diffusion(coefficients.t) ** 2,
}
"""``lambda(t)``: ``sigma2`` weighs all noise levels alike (NCSN, DDPM's simple loss), ``one`` is plain score matching,
``g2`` the likelihood weighting, with ``half_sum`` an upper bound of the negative log-likelihood in nats up to a
constant (Song et al. 2021, "Maximum likelihood training", https://arxiv.org/abs/2101.09258, theorem 1)."""


class DenoisingScoreMatching(Objective):
    r"""Denoising score matching, or a regression of the network's own target.

    .. math::  \ell = \frac{\lambda(t)}{\sigma^2} \| \epsilon_\theta(x_t, t) - \epsilon \|^2
               \quad\text{or, for the weight raw,}\quad
               \ell = \| F_\theta(x_t, t) - (u\, x_0 + v\, \epsilon) \|^2

    with a half in front, or the mean over the dimensions (Vincent 2011, https://doi.org/10.1162/NECO_a_00142). With
    ``raw``, the loss in the network's own output space, DDPM's simple loss (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, eq. 14), EDM's, whose weight is ``1 / c_out^2`` (Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, table 1), and the regression of a flow's velocity (Lipman et al. 2023,
    https://arxiv.org/abs/2210.02747) are one objective, under the parametrizations ``eps``, ``edm`` and ``velocity``.

    Args:
        time_law: the law of t: a name, one of the rows of :data:`~lit_diffusion.objectives.laws.LAWS`, or a law.
        weight: ``lambda(t)``, a row of :data:`WEIGHTS`, or ``raw``.
        reduction: the reduction over the dimensions of a datum: ``half_sum`` (NCSN's and score-SDE's 1/2 norm^2) or
            ``mean`` (DDPM's).

    Raises:
        UserError: for a name that is not in the tables.
    """

    def __init__(
        self, time_law: TimeLawName | TimeLaw, weight: Weight = "sigma2", reduction: Reduction = "half_sum"
    ) -> None:
        super().__init__(law_of(time_law))
        require_choice("", "weight", weight, get_args(Weight))
        require_choice("", "reduction", reduction, get_args(Reduction))
        self.weight = weight
        self.reduction = reduction

    def at(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        cond: Condition | None = None,
        grey_levels: GreyLevels | None = None,
    ) -> Loss:
        """The loss at given times ``[B]`` and noise, whatever the law of t."""
        prediction = denoiser(denoiser.process.perturb(x0, t, eps), t, cond)
        if self.weight == "raw":
            return Loss(self._reduced(output_error(prediction, x0, eps)), t)
        per_sample = self._reduced(prediction.eps - eps)
        weight = WEIGHTS[self.weight](denoiser.process, prediction.coefficients) / prediction.coefficients.sigma**2
        return Loss(per_sample * weight.to(per_sample.dtype), t)

    def _reduced(self, error: Tensor) -> Tensor:
        square = error.flatten(1).square()
        return 0.5 * square.sum(1) if self.reduction == "half_sum" else square.mean(1)


def output_error(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """The error of the network's output, ``F - (u x_0 + v eps)``: ``[B, ...]`` like x0."""
    target = expand_like(prediction.u, x0) * x0 + expand_like(prediction.v, x0) * eps
    return prediction.raw.to(x0.dtype) - target
