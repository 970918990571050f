"""What the tests of the fast solvers share: orders on a mixture, laws on Gaussian data, other schedulers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helpers.laws import GAUSSIAN, MIXTURE, Given, Law, Network, noise_of, on_their_table, order
from torch import Tensor

from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser
from lit_diffusion.processes import VE, VP, Flow, PowerVE, Process
from lit_diffusion.samplers import Run
from lit_diffusion.samplers.exponential import ExponentialIntegrator
from lit_diffusion.samplers.ode import integrate

SMOOTH = {
    "VE": VE(0.3, 2.0, t_min_sampling=1e-2),
    "VP": VP(1.0, 6.0, t_min_sampling=0.05),
    "EDM": PowerVE(0.2, 3.0),
    "Flow": Flow(0.1, 0.1, t_max=0.9),
}
"""Processes on which few steps are in the regime of their order, and which end above 0."""

X = noise_of(20, dtype=torch.float64).normal()


@cache
def flowed(name: str, times: tuple[float, ...]) -> Tensor:
    """The states at falling times of the probability-flow ODE of the mixture, by an adaptive solver: ``[N, B, D]``."""
    process = SMOOTH[name]
    denoiser, start = ExactDenoiser(MIXTURE, process), process.prior_std * X
    return integrate(process, lambda t, x: denoiser(x, t).velocity, start, times, 1e-10, 1e-10)


@torch.no_grad()
def error_of(sampler: ExponentialIntegrator, name: str, exact: int = 0) -> float:
    """The largest distance at the end between a sampler's states and the ODE's.

    Args:
        sampler: the sampler.
        name: the process.
        exact: so many of the first steps begin at the ODE's state, so that the history begins exact.
    """
    process = SMOOTH[name]
    plan = sampler.plan(process)
    times = tuple(float(move.t) for move in plan)
    goal = flowed(name, (times[0], float(plan[-1].s)))[-1]
    given = flowed(name, times[: exact + 2])
    x, run = process.prior_std * X, Run(ExactDenoiser(MIXTURE, process), noise_of(len(X)), None, plan)
    for i, move in enumerate(plan):
        x = sampler.step(run, given[i] if i <= exact else x, move)
    return float((x - goal).norm(dim=1).max())


def order_of(make: Any, name: str, steps: int, exact: int = 0) -> float:
    """The order of convergence of ``make(steps)``, from so many steps and twice as many."""
    return order(*(error_of(make(count), name, exact) for count in (steps, 2 * steps)))


class Each(Given):
    """Given numbers, others at each request."""

    def __init__(self, z: Tensor) -> None:
        super().__init__(z[0])
        self.rest = iter(z)

    def normal(self) -> Tensor:
        return next(self.rest)


@torch.no_grad()
def law_of_run(sampler: ExponentialIntegrator, process: Process, law: Law) -> Law:
    """The law of a whole run on :data:`GAUSSIAN`, of which every step may depend on those before.

    The run is an affine map of its start and of the noise of each step: it is made of unit vectors, and no number is
    drawn.
    """
    dimension = len(law[0])
    plan = sampler.plan(process)
    unit = torch.eye(dimension * (1 + len(plan)), dtype=torch.float64)
    inputs = torch.cat((torch.zeros_like(unit[:1]), unit)).unflatten(1, (1 + len(plan), dimension)).transpose(0, 1)
    run, x = Run(ExactDenoiser(GAUSSIAN, process), Each(inputs[1:]), None, plan), inputs[0]
    for move in plan:
        x = sampler.step(run, x, move)
    b = x[0]
    A, B = (x[1:] - b).T.split((dimension, dimension * len(plan)), dim=1)
    return A @ law[0] + b, A @ law[1] @ A.T + B @ B.T


def against(scheduler: Any, sampler: ExponentialIntegrator, steps: int, nodes: tuple[float, ...] = ()) -> float:
    """The largest relative distance, over the steps of one random network, from a scheduler of diffusers.

    Args:
        scheduler: on a table of 1000 betas, whose last step ends at its smallest level.
        sampler: on all of the scheduler's times if it has no nodes.
        steps: steps of ``sampler``.
        nodes: where inside its steps a singlestep solver evaluates, as shares of the step in lambda.
    """
    process, network = on_their_table(scheduler), Network()
    denoiser = NetworkDenoiser(network, process, "eps", "index")
    scheduler.set_timesteps(steps * (1 + len(nodes)))
    if not nodes:
        times = [*(scheduler.timesteps.double() + 1.0).div(1000.0).tolist(), 0.001]
    else:
        times = torch.linspace(1.0, 0.001, steps + 1, dtype=torch.float64).mul(1000.0).round().div(1000.0).tolist()
    sampler.spacing, sampler.steps = times, None
    plan, asked = sampler.plan(process), []
    for move in plan:
        asked.append(float(move.t))
        for share in nodes:
            t, s = (torch.tensor([each], dtype=torch.float64) for each in (move.t, move.s))
            ends = process.log_snr(torch.cat((t, s)))
            asked.append(float(process.t_at_log_snr(ends[0] + share * (ends[1] - ends[0]))))
    at = torch.tensor([*asked, 0.001], dtype=torch.float64)
    # Theirs are in float32, and on the timesteps also between the ends of a step.
    scheduler.sigmas = process.sigma(at) / process.alpha(at)
    scheduler.timesteps = at[:-1] * 1000.0 - 1.0
    shape, worst = (1, 4, 4), 0.0
    noise = noise_of(3, 0, shape, dtype=torch.float64)
    ours, states = noise_of(3, 0, shape, dtype=torch.float64), []
    sampler.sample(denoiser, ours, on_step=lambda progress: states.append(progress.x))
    x = noise.normal()
    with torch.no_grad():
        for i, t in enumerate(asked):
            raw = denoiser(x, torch.full((3,), t, dtype=torch.float64)).eps
            keys = (
                {"variance_noise": noise.normal()} if "sde" in getattr(scheduler.config, "algorithm_type", "") else {}
            )
            x = scheduler.step(raw, scheduler.timesteps[i], x, **keys).prev_sample
            if (i + 1) % (1 + len(nodes)) == 0:
                state = states[i // (1 + len(nodes))]
                worst = max(worst, float((state - x).norm() / x.norm()))
    return worst
