r"""UniPC, a multistep predictor of order p whose every step is corrected by the next one's evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.denoisers import ClipX0
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import expand_like
from lit_diffusion.samplers.base import Move, Run
from lit_diffusion.samplers.exponential import Evaluation, Integrand, Interval, Multistep, Past, Term
from lit_diffusion.samplers.sde import LargeSteps
from lit_diffusion.samplers.times import Spacing

Variant = Literal["bh1", "bh2"]

LONGEST_OF_NOISE = 0.5
"""The longest step of UniPC of the noise in lambda: from 0.7 on errors of a tenth end far from the data in 20 steps."""


@dataclass(frozen=True, kw_only=True)
class Step(Past):
    """What a step keeps for its correction.

    Attributes:
        at: the step.
        x: the state from which it was taken.
        reached: the state that it predicted.
        order: its order.
    """

    at: Interval
    x: Tensor
    reached: Tensor
    order: int


class UniPC(Multistep):
    r"""UniPC-p: UniP's multistep predictor of order p, and UniC's corrector of order p + 1, at one evaluation a step.

    .. math::
        x_s &= x_s^{(1)} + c \sum_{m=1}^{p-1} \frac{a_m}{r_m} B(h)\, (f_m - f_0) \\
        x_s^c &= x_s^{(1)} + c \sum_{m=1}^{p} \frac{a_m^c}{r_m} B(h)\, (f_m - f_0), \qquad f_p = f(x_s, s), \; r_p = 1

    (Zhao et al. 2023, https://arxiv.org/abs/2302.04867, section 3) with DDIM's step ``x_s^(1)``, f and c of
    :mod:`~lit_diffusion.samplers.exponential`, and earlier predictions ``f_m`` at ``lambda_t + r_m h``. The a solve the
    paper's linear equations: the polynomial through the predictions is integrated exactly, whatever B is. With
    one difference alone, UniP-2 and UniC-1, a is 1/2 and B counts. The evaluation at the predicted ``x_s`` corrects the
    step that led there and predicts the next; the last step is not corrected, which would take one more.
    Of the noise the corrector multiplies an error of the datum at a step's end by ``e^h - 1``, at every step.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        order: the predictor's order p, from 1 to 3.
        variant: ``bh1``, ``B = h``, or ``bh2``, ``B = e^h - 1`` (of the noise; of the data with -h).
        integrand: the prediction of the polynomial: ``data`` or ``noise``.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.
        lower_order_final: in fewer than 15 steps take the last one at order 1, the one before at most at order 2.
        large_steps: ``refuse`` steps of the noise longer than 0.5 in lambda, or ``allow`` them.

    Raises:
        UserError: for an order that is not 1, 2 or 3, a name that is not one of these, a spacing that does not match
            ``steps``, or an empty range.
    """

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 3,
        variant: Variant = "bh2",
        integrand: Integrand = "data",
        spacing: Spacing = "log_snr",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
        lower_order_final: bool = True,
        large_steps: LargeSteps = "refuse",
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0, lower_order_final)
        if order not in (1, 2, 3):
            raise UserError(f"order is {order}; UniPC's is 1, 2 or 3")
        require_choice("", "variant", variant, get_args(Variant))
        require_choice("", "integrand", integrand, get_args(Integrand))
        self.order = order
        self.variant = variant
        require_choice("", "large_steps", large_steps, get_args(LargeSteps))
        self.integrand = integrand
        self.longest = LONGEST_OF_NOISE if integrand == "noise" else math.inf
        self.large_steps = large_steps

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """Correct the step that led to x by the evaluation there, and predict the next."""
        last: Step | None = run.state
        at = self.interval(run, x, move)
        points = (self.evaluate(run, x, at.t), *(last.points if last else ()))[: self.order]
        if last is not None:
            # As a difference, so that what another sampler has done to x since, a correction or a constraint, stays.
            moved = self.corrected(last, points[0]) - last.reached
            x, points = x + moved, (self._at_corrected(points[0], moved, run), *points[1:])
        done = last.steps if last else 0
        used = points[: self.allowed(run, done)]
        reached = self.extrapolated(run, x, at, used)
        run.state = Step(steps=done + 1, points=points, at=at, x=x, reached=reached, order=len(used))
        return reached

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """UniP's step."""
        return at.reached(x, points[0], *self._terms(at, points))

    def corrected(self, last: Step, now: Evaluation) -> Tensor:
        """UniC's step: the last one again, with the evaluation at its end."""
        first, *earlier = last.points[: last.order]
        return last.at.reached(last.x, first, *self._terms(last.at, (first, now, *earlier)))

    def _at_corrected(self, now: Evaluation, moved: Tensor, run: Run) -> Evaluation:
        """The evaluation at a predicted state as that of the corrected one: the same noise, if that is predicted."""
        if self.integrand == "data":
            return now
        return replace(now, x0=now.x0 + moved / expand_like(run.process.alpha(now.t), moved))

    def _terms(self, at: Interval, points: Sequence[Evaluation]) -> list[Term]:
        if len(points) != 2:
            return at.interpolated(points)
        weight, difference = at.half_slope(*points)
        B = at.phi(1) if self.variant == "bh2" else torch.ones_like(at.h)  # Over the h of c.
        return [(B * weight, difference)]
