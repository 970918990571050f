r"""DPM-Solver and DPM-Solver++, exponential integrators of order 1 to 3, and their form for the SDE.

With ``h = lambda_s - lambda_t`` as in :mod:`~lit_diffusion.samplers.exponential`, differences D of predictions are
added to DDIM's step: of the noise in DPM-Solver (Lu et al. 2022, https://arxiv.org/abs/2206.00927), of the data in
DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2211.01095).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from lit_diffusion.denoisers import ClipX0, Denoiser
from lit_diffusion.errors import require_choice
from lit_diffusion.processes import expand_like
from lit_diffusion.samplers.base import Move, Run
from lit_diffusion.samplers.exponential import Evaluation, ExponentialIntegrator, Interval, Multistep
from lit_diffusion.samplers.ode import refuse_grid_only
from lit_diffusion.samplers.sde import LargeSteps
from lit_diffusion.samplers.times import Spacing


class DPMSolver1(ExponentialIntegrator):
    r"""DPM-Solver-1, order 1: DDIM's deterministic step, by default on steps equal in lambda.

    .. math::  x_s = \frac{\alpha_s}{\alpha_t} x_t - \sigma_s (e^h - 1)\, \hat\epsilon(x_t, t)

    (Lu et al. 2022, https://arxiv.org/abs/2206.00927, eq. 3.7.)

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    integrand = "noise"

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        at = self.interval(run, x, move)
        return at.reached(x, self.evaluate(run, x, at.t))


class Singlestep(ExponentialIntegrator):
    """The base of solvers that evaluate the network inside their steps, and keep nothing from one to the next.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    def __init__(
        self,
        steps: int | None = 10,
        spacing: Spacing = "log_snr",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0)

    def require_fit(self, denoiser: Denoiser, plan: Sequence[Move]) -> None:
        """Refuse a network that is trained on its grid's timesteps alone, and what the base refuses."""
        refuse_grid_only(denoiser, "a singlestep solver")
        super().require_fit(denoiser, plan)

    def midpoint(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """The step of order 2 by the prediction in its middle, to which a step of order 1 leads."""
        at = self.interval(run, x, move)
        first, half = self.evaluate(run, x, at.t), at.part(0.5)
        middle = self.evaluate(run, half.reached(x, first), half.s)
        return at.reached(x, first, (at.phi(1), middle.value - first.value))


class SinglestepOfNoise(Singlestep):
    r"""The base of singlestep solvers of the noise, with a bound on their steps.

    An error of the datum predicted inside a step, at ``lambda_t + r h``, is one of ``e^(r h)`` times its size at the
    step's end, and a clipped datum's no less. Steps longer than 4 in lambda, where samples begin to end far from the
    data, are refused.

    Args:
        steps: number of steps; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.
        large_steps: ``refuse`` such steps, or ``allow`` them.

    Raises:
        UserError: for a name that is not one of these, a spacing that does not match ``steps``, or an empty range.
    """

    integrand = "noise"
    longest = 4.0

    def __init__(
        self,
        steps: int | None = 10,
        spacing: Spacing = "log_snr",
        denoise: bool = False,
        clip_x0: ClipX0 = "data",
        large_steps: LargeSteps = "refuse",
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0)
        require_choice("", "large_steps", large_steps, get_args(LargeSteps))
        self.large_steps = large_steps


class DPMSolver2(SinglestepOfNoise):
    r"""DPM-Solver-2, order 2: the noise predicted in the middle of a step.

    .. math::
        u &= \frac{\alpha_m}{\alpha_t} x_t - \sigma_m (e^{h/2} - 1)\, \hat\epsilon(x_t, t), \qquad
             \lambda_m = \lambda_t + h / 2 \\
        x_s &= \frac{\alpha_s}{\alpha_t} x_t - \sigma_s (e^h - 1)\, \hat\epsilon(u, m)

    (Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithm 1.)

    Args:
        steps: number of steps of two evaluations each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.
        large_steps: ``refuse`` steps longer than 4 in lambda, where the network's errors grow, or ``allow`` them.

    Raises:
        UserError: for a name that is not one of these, a spacing that does not match ``steps``, an empty range, and a
            network that is trained on its grid's timesteps alone.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        return self.midpoint(run, x, move)


class DPMSolver3(SinglestepOfNoise):
    r"""DPM-Solver-3, order 3: the noise predicted at a third and at two thirds of a step.

    .. math::
        u_1 &= \frac{\alpha_1}{\alpha_t} x_t - \sigma_1 (e^{h/3} - 1)\, \epsilon_0, \qquad
             \epsilon_0 = \hat\epsilon(x_t, t), \quad D_i = \hat\epsilon(u_i, t_i) - \epsilon_0,
             \quad \lambda_i = \lambda_t + i h / 3 \\
        u_2 &= \frac{\alpha_2}{\alpha_t} x_t - \sigma_2 (e^{2h/3} - 1)\, \epsilon_0
             - 2 \sigma_2 \Big(\frac{e^{2h/3} - 1}{2h/3} - 1\Big) D_1 \\
        x_s &= \frac{\alpha_s}{\alpha_t} x_t - \sigma_s (e^h - 1)\, \epsilon_0
             - \tfrac32 \sigma_s \Big(\frac{e^h - 1}{h} - 1\Big) D_2

    (Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithm 2.)

    Args:
        steps: number of steps of three evaluations each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping. The noise is that of the clipped datum.
        large_steps: ``refuse`` steps longer than 4 in lambda, where the network's errors grow, or ``allow`` them.

    Raises:
        UserError: for a name that is not one of these, a spacing that does not match ``steps``, an empty range, and a
            network that is trained on its grid's timesteps alone.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        at = self.interval(run, x, move)
        first, third, thirds = self.evaluate(run, x, at.t), at.part(1.0 / 3.0), at.part(2.0 / 3.0)
        value = self.evaluate(run, third.reached(x, first), third.s).value
        second = thirds.reached(x, first, (2.0 * thirds.phi(2), value - first.value))
        value = self.evaluate(run, second, thirds.s).value
        return at.reached(x, first, (1.5 * at.phi(2), value - first.value))


class DPMSolverPP2S(Singlestep):
    r"""DPM-Solver++(2S), order 2: the datum predicted in the middle of a step.

    .. math::
        u &= \frac{\sigma_m}{\sigma_t} x_t + \alpha_m (1 - e^{-h/2})\, \hat x_0(x_t, t), \qquad
             \lambda_m = \lambda_t + h / 2 \\
        x_s &= \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h})\, \hat x_0(u, m)

    (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 1 with ``r = 1/2``.)

    Args:
        steps: number of steps of two evaluations each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.

    Raises:
        UserError: for a spacing that does not match ``steps``, an empty range, and a network that is trained on its
            grid's timesteps alone.
    """

    def step(self, run: Run, x: Tensor, move: Move) -> Tensor:
        """One step from t to s."""
        return self.midpoint(run, x, move)


class DPMSolverPP2M(Multistep):
    r"""DPM-Solver++(2M), order 2 by one evaluation a step.

    .. math::
        D &= \hat x_0(x_t, t) + \frac{h}{2 h_0} \big(\hat x_0(x_t, t) - \hat x_0(x_{t_0}, t_0)\big) \\
        x_s &= \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h})\, D

    (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2), where the step before, from ``t_0`` to t, was
    ``h_0`` long in lambda. The first step is of order 1.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.
        lower_order_final: in fewer than 15 steps take the last one at order 1, as the authors do.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    order = 2

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The step by one or two evaluations."""
        if len(points) == 1:
            return at.reached(x, points[0])
        weight, difference = at.half_slope(*points)
        return at.reached(x, points[0], (at.phi(1) * weight, difference))


class DPMSolverPP3M(DPMSolverPP2M):
    r"""DPM-Solver++(3M), order 3 by one evaluation a step: the parabola through the last three predictions.

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \big((1 - e^{-h})\, f + h^2 \varphi_2(-h)\, f'
              + h^3 \varphi_3(-h)\, f''\big)

    with f, f' and f'' the parabola's value and derivatives in lambda at t (multistep solvers of the data
    prediction: Lu et al. 2022, https://arxiv.org/abs/2211.01095, section 4). Code in wide use has half of this f'', and
    with it order 2. The first step is of order 1, the second that of :class:`DPMSolverPP2M`.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.
        lower_order_final: in fewer than 15 steps take the last one at order 1 and the one before at order 2, as the
            authors do.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    order = 3

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The step by one to three evaluations."""
        if len(points) < 3:
            return super().extrapolated(run, x, at, points)
        return at.reached(x, points[0], *at.interpolated(points))


class SDEDPMSolverPP2M(Multistep):
    r"""SDE-DPM-Solver++(2M): the reverse SDE, with the extrapolated datum of DPM-Solver++(2M).

    .. math::
        x_s = \frac{\sigma_s}{\sigma_t} e^{-h} x_t + \alpha_s (1 - e^{-2h})\, D + \sigma_s \sqrt{1 - e^{-2h}}\; z,
        \qquad D = f_0 + \frac{h}{2 h_0} (f_0 - f_1)

    (Lu et al. 2022, https://arxiv.org/abs/2211.01095), with ``f_0`` and ``f_1`` the data predicted at the
    beginning of this step and of the one before, which was ``h_0`` long. Where D is exact this is the posterior
    ``q(x_s | x_t, x_0)``; the first step is ancestral sampling's with the variance ``beta_tilde``.

    Args:
        steps: number of steps of one evaluation each; null: every timestep of the model, or 1000 in continuous time.
        spacing: spacing of the steps: ``log_snr``, equal steps in lambda, ``karras:RHO``, ``uniform`` in time,
            ``quadratic``, or a list of falling times, both ends included.
        denoise: if true, end with the posterior mean at the smallest time, one more evaluation.
        clip_x0: range to which predicted clean data are clipped: ``data``, the data's own (points have none), or
            ``[low, high]``; null: no clipping.
        lower_order_final: in fewer than 15 steps take the last one at order 1, as the authors do.

    Raises:
        UserError: for a spacing that does not match ``steps``, or an empty range.
    """

    order = 2

    takes = ("mean",)

    def __init__(
        self,
        steps: int | None = 20,
        spacing: Spacing = "log_snr",
        denoise: bool = True,
        clip_x0: ClipX0 = "data",
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps, spacing, denoise, clip_x0, lower_order_final)

    def extrapolated(self, run: Run, x: Tensor, at: Interval, points: Sequence[Evaluation]) -> Tensor:
        """The draw by one or two evaluations."""
        posterior, D = run.process.transition(at.s, at.t), points[0].x0
        if len(points) == 2:
            weight, difference = at.half_slope(*points)
            D = D + expand_like(weight, x) * difference
        mean = expand_like(posterior.xt_coefficient, x) * x + expand_like(posterior.x0_coefficient, x) * D
        return mean + expand_like(posterior.beta_tilde.sqrt(), x) * run.noise.normal()
