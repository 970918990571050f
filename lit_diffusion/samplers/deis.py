r"""DEIS, an exponential integrator with a polynomial in the time, and iPNDM, with Adams and Bashforth's fixed weights.

In ``rho = sigma / alpha`` the probability-flow ODE is ``d(x / alpha) / d rho = eps``, so that

.. math::  x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \int_{\rho_t}^{\rho_s} \hat\epsilon\, d\rho

(Zhang and Chen 2023, https://arxiv.org/abs/2204.13902).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0
from lit_diffusion.errors import UserError
from lit_diffusion.samplers.base import Run
from lit_diffusion.samplers.exponential import Evaluation, Interval, Multistep
from lit_diffusion.samplers.times import Spacing

NODES = 32
"""Points of the Gauss-Legendre quadrature of a step."""

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the latest slope and of those before it, by the order of the method."""


@cache
def quadrature() -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and weights of Gauss and Legendre's quadrature, float64 ``[NODES]``; computed once."""
    roots, weights = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy(0.5 * (roots + 1.0)), torch.from_numpy(0.5 * weights)


class DEIS(Multistep):
    r"""DEIS-tAB: the noises of the last steps extrapolated by a polynomial in the time t.

    .. math::
        x_s = \frac{\alpha_s}{\alpha_t} x_t + \sum_j C_j \epsilon_j, \qquad
        C_j = \alpha_s \int_t^s \frac{d\rho}{d\tau} \prod_{i \ne j} \frac{\tau - t_i}{t_j - t_i}\, d\tau,
        \qquad \rho = \sigma / \alpha

    (Zhang and Chen 2023, https://arxiv.org/abs/2204.13902, tAB), with ``epsilon_j`` the noise predicted at
    the beginning ``t_j`` of this step and of those before it. ``C_j`` is computed by quadrature in lambda.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        order: number of noises, from 1 (DDIM) to 4, the paper's tAB3.
        spacing: spacing of the steps: ``quadratic``, the paper's, ``uniform`` in time, or, on which polynomials in time
            are extrapolated further, ``log_snr``, ``karras:RHO``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.
        lower_order_final: in fewer than 15 steps take the last one at order 1, the one before at most at order 2, and
            so on.

    Raises:
        UserError: for an order outside 1 to 4, a spacing that does not match ``steps``, or an empty range.
    """

    integrand = "noise"

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 4,
        spacing: Spacing = "quadratic",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0, lower_order_final)
        require_order("DEIS", order)
        self.order = order

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The step by one to four noises."""
        u, mass = (each.to(at.t.device)[:, None] for each in quadrature())
        # d rho = -e^{-lambda} d lambda, and alpha_s e^{-lambda} = sigma_s e^{(1 - u) h}; -sigma_s h is the frame's c.
        tau, mass = run.process.t_at_log_snr(2.0 * (at.start + u * at.h)), mass * torch.exp((1.0 - u) * at.h)
        terms = []
        for j in range(1, len(points)):  # The polynomials' sum is 1: of that of eps_0 the differences are left.
            basis = torch.ones_like(tau)
            for i in range(len(points)):
                if i != j:
                    basis = basis * (tau - points[i].t) / (points[j].t - points[i].t)
            terms.append(((mass * basis).sum(0), points[j].value - points[0].value))
        return at.reached(x, points[0], *terms)


class IPNDM(Multistep):
    r"""iPNDM: DDIM's step with the noises of the last steps in the fixed weights of Adams and Bashforth.

    .. math::
        \epsilon' = \tfrac{1}{24} (55 \epsilon_0 - 59 \epsilon_1 + 37 \epsilon_2 - 9 \epsilon_3), \qquad
        x_s = \frac{\alpha_s}{\alpha_t} x_t + \Big(\sigma_s - \frac{\alpha_s}{\alpha_t} \sigma_t\Big) \epsilon'

    (Zhang and Chen 2023, https://arxiv.org/abs/2204.13902; the weights are those of Liu et al. 2022,
    https://arxiv.org/abs/2202.09778, without its Runge-Kutta start: the first three steps are of order 1, 2 and 3.)
    They are for equal steps in ``sigma / alpha``, the spacing ``karras:1``, on which it has its order; on others it has
    order 2.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        order: number of noises, from 1 (DDIM) to 4, iPNDM's own.
        spacing: spacing of the steps: ``karras:RHO``, ``log_snr``, ``uniform`` in time, ``quadratic``, or a list of
            falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.

    Raises:
        UserError: for an order outside 1 to 4, a spacing that does not match ``steps``, or an empty range.
    """

    integrand = "noise"

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 4,
        spacing: Spacing = "karras:7",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0, lower_order_final=False)
        require_order("iPNDM", order)
        self.order = order

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The step by one to four noises."""
        _, *earlier = ADAMS_BASHFORTH[len(points) - 1]  # Their sum is 1: of that of eps_0 the differences are left.
        first, length = points[0], at.phi(1)
        terms = [(w * length, point.value - first.value) for w, point in zip(earlier, points[1:], strict=True)]
        return at.reached(x, first, *terms)


def require_order(name: str, order: int) -> None:
    """Refuse an order outside 1 to 4.

    Raises:
        UserError: naming it.
    """
    if order not in (1, 2, 3, 4):
        raise UserError(f"order is {order}; {name} goes by 1 to 4 noises")
