r"""Likelihoods: the exact one of the probability-flow ODE, and the variational bound of the reverse chain.

.. math::  \log p_{t_0}(x) = \log p_1(x_1) + \int_{t_0}^1 \mathrm{tr}\, \frac{\partial v}{\partial x}\, dt

along the ODE ``dx/dt = v(x, t)`` from ``x`` at ``t_0`` to ``x_1`` (Song et al. 2021, https://arxiv.org/abs/2011.13456,
eq. 39), and

.. math::
    -\log p(x_0) \le KL(q(x_1 | x_0) \| p(x_1)) + \sum_{s > 0} KL(q(x_s | x_t, x_0) \| p(x_s | x_t))
    - E \log p(x_0 | x_{t_1})

over the steps of ancestral sampling (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5). They are likelihoods of
two different models, the ODE and the chain, that share a network: neither number bounds the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.errors import UserError
from lit_diffusion.processes import expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.reverse import ReverseChain, bound_term, gaussian_kl
from lit_diffusion.samplers.base import Run, at_time
from lit_diffusion.samplers.ode import integrate, refuse_grid_only, require_tolerances, row_norm
from lit_diffusion.samplers.times import Spacing, timesteps_to_zero

Trace = Literal["hutchinson", "exact"]
Probe = Literal["rademacher", "gaussian"]

LARGEST_EXACT = 256
"""The largest dimension in which an exact trace, one backward pass a dimension, is allowed."""


def bits_per_dimension(log_prob: Tensor, dimension: int, grey_levels: GreyLevels | None = None) -> Tensor:
    """``-log2 p / D`` of log-densities in nats ``[B]``, integrated over the bin of a grey level where there are any."""
    log_volume = 0.0 if grey_levels is None else dimension * math.log(grey_levels.width)
    return -(log_prob + log_volume) / (dimension * math.log(2.0))


def dequantized(x: Tensor, noise: SampleNoise, grey_levels: GreyLevels | None) -> Tensor:
    """Grey levels spread uniformly over their bins, ``x + (u - 1/2) width``; points unchanged.

    The expected log-density of the result is a lower bound of the grey levels' log-probability (Theis et al. 2016,
    https://arxiv.org/abs/1511.01844, eq. 3).
    """
    return x if grey_levels is None else x + (noise.uniform() - 0.5) * grey_levels.width


@dataclass(frozen=True)
class FlowLikelihood:
    """The ODE's log-density of a batch and its parts, ``log_prob = terminal + trace``, float64.

    Attributes:
        log_prob: ``log p_{t_0}(x)`` in nats, ``[B]``.
        terminal: ``log p_1(x_1)``, ``[B]``.
        trace: the integral of the velocity's divergence, ``[B]``.
        x_1: the ODE's state at the largest time, ``[B, ...]``.
        evaluations: network evaluations of the slowest datum, each with its backward passes.
    """

    log_prob: Tensor
    terminal: Tensor
    trace: Tensor
    x_1: Tensor
    evaluations: int


def flow_log_prob(
    denoiser: Denoiser,
    x: Tensor,
    noise: SampleNoise,
    cond: Condition | None = None,
    trace: Trace = "hutchinson",
    probe: Probe = "rademacher",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float | None = None,
    on_time: Callable[[float], None] | None = None,
) -> FlowLikelihood:
    r"""The log-density of data under the probability-flow ODE, in float64.

    .. math::  \log p_{t_0}(x) = \log p_1(x_1) + \int_{t_0}^1 \mathrm{tr}\, \frac{\partial v}{\partial x}\, dt

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 39.)

    Args:
        denoiser: the model.
        x: data ``[B, ...]``, the state at ``t_min``.
        noise: the data's random numbers, from which the probes are drawn.
        cond: the condition, ``[B]`` rows.
        trace: ``exact``, one backward pass a dimension, or ``hutchinson``: ``E[e' J e]``, unbiased, with the same
            probes e along the whole trajectory (Hutchinson 1990; Grathwohl et al. 2019,
            https://arxiv.org/abs/1810.01367).
        probe: ``rademacher``, entries of -1 and 1, which has the least variance, or ``gaussian``.
        probes: number of probes, averaged.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        t_min: the time of the data, at or above the smallest time of the process; None: that time.
        on_time: called after every step of the solver with the time of the slowest datum.

    Raises:
        UserError: for a network that is trained on its grid's timesteps alone, a time without training, an exact trace
            in too many dimensions, or a solver that fails.
    """
    refuse_grid_only(denoiser, "the ODE's likelihood")
    require_tolerances(rtol, atol)
    start = denoiser.process.t_min if t_min is None else t_min
    denoiser.process.require_time("t_min", start)
    shape, dimension = x.shape, x[0].numel()
    row = tuple(shape[1:])
    if trace == "exact" and dimension > LARGEST_EXACT:
        raise UserError(f"trace: exact takes {dimension} backward passes an evaluation; choose hutchinson")
    run = Run(denoiser, noise, cond)
    vectors: list[Tensor] = []
    if trace == "hutchinson":
        for _ in range(probes):
            vector = noise.normal(row) if probe == "gaussian" else torch.where(noise.uniform(row) < 0.5, -1.0, 1.0)
            vectors.append(vector.to(torch.float64))

    def slope(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            position = state[:, :dimension].reshape(shape).detach().requires_grad_()
            velocity = run.predict(position, t).velocity
            if trace == "exact":
                flat = velocity.flatten(1)
                divergence = torch.zeros(len(x), dtype=torch.float64, device=x.device)
                for k in range(dimension):
                    (row,) = torch.autograd.grad(flat[:, k].sum(), position, retain_graph=k + 1 < dimension)
                    divergence += row.flatten(1)[:, k]
            else:
                products = []
                for k, vector in enumerate(vectors):
                    (row,) = torch.autograd.grad((velocity * vector).sum(), position, retain_graph=k + 1 < len(vectors))
                    products.append((row * vector).flatten(1).sum(1))
                divergence = torch.stack(products).mean(0)
        return torch.cat((velocity.detach().flatten(1), divergence[:, None] / dimension), dim=1)

    def norm(error: Tensor) -> Tensor:
        # The tolerances hold for the state and for the nats a dimension, however many dimensions there are.
        return torch.maximum(row_norm(error[:, :dimension]), error[:, -1].abs())

    begin = torch.cat((x.flatten(1).double(), torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)), dim=1)

    def on_step(t: float, state: Tensor) -> None:
        if on_time is not None:
            on_time(t)

    end = integrate(denoiser.process, slope, begin, (start, denoiser.process.t_max), rtol, atol, on_step, norm)[-1]
    x_1, divergence = end[:, :dimension].view(shape), dimension * end[:, -1]
    terminal = denoiser.process.prior_log_prob(x_1)
    return FlowLikelihood(terminal + divergence, terminal, divergence, x_1, run.evaluations)


@dataclass(frozen=True)
class VariationalBound:
    """The bound of ``-log p(x_0)`` of a batch, ``total = prior + decoder + kl``, in nats, float64.

    Attributes:
        prior: ``KL(q(x_1 | x_0) || p(x_1))``, ``[B]``.
        steps: the terms of the steps, ``[B, S]``: first the decoder's, then the KL terms, from the least noise to the
            most.
        times: the times at which the steps start, float64 ``[S]``.
    """

    prior: Tensor
    steps: Tensor
    times: Tensor

    @property
    def decoder(self) -> Tensor:
        """``-E log p(x_0 | x_{t_1})``, ``[B]``."""
        return self.steps[:, 0]

    @property
    def kl(self) -> Tensor:
        """The sum over all steps but the decoder's, ``[B]``."""
        return self.steps[:, 1:].sum(1)

    @property
    def total(self) -> Tensor:
        """The bound, the sum of the prior and all steps: ``[B]``."""
        return self.prior + self.steps.sum(1)


def require_chain(denoiser: Denoiser, what: str) -> None:
    """Refuse a model with one noise level.

    Args:
        denoiser: the model.
        what: the caller, for the message.

    Raises:
        UserError: naming the caller.
    """
    if denoiser.process.num_timesteps == 1:
        raise UserError(f"{what} needs a chain of noise levels, and this model has one noise level")


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    x0: Tensor,
    noise: SampleNoise,
    chain: ReverseChain,
    grey_levels: GreyLevels | None = None,
    cond: Condition | None = None,
    steps: int | None = None,
    spacing: Spacing = "uniform",
    sampled: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> VariationalBound:
    r"""The variational bound of ancestral sampling's reverse chain.

    .. math::
        KL(q(x_1 | x_0) \| p(x_1)) + \sum_{s > 0} KL(q(x_s | x_t, x_0) \| p(x_s | x_t)) - E \log p(x_0 | x_{t_1})

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5.) Each expectation over the noise is estimated with one
    draw a datum: the sum is unbiased.

    Args:
        denoiser: the model.
        x0: data ``[B, ...]``; grey levels at the centers of their bins.
        noise: the data's random numbers.
        chain: the variances and the clipping of the reverse chain.
        grey_levels: the data's grey levels; None for points, whose decoder is a density.
        cond: the condition, ``[B]`` rows.
        steps: S; None for every timestep of the model, 1000 in continuous time.
        spacing: the spacing of a subsequence of S timesteps.
        sampled: number of the S - 1 KL terms to evaluate for each datum, evenly spread with a random offset and
            weighted accordingly: unbiased, with more variance; None: all of them.
        on_step: called with the number of terms done and to do.

    Raises:
        UserError: for a variance that the model does not have, or a model with one noise level.
    """
    chain.check(denoiser)
    process = denoiser.process
    require_chain(denoiser, "the variational bound")
    times = torch.tensor(timesteps_to_zero(process, steps, spacing)[::-1], dtype=torch.float64, device=x0.device)
    count = len(times)
    ends = torch.cat((times.new_zeros(1), times[:-1]))
    before_last = float(times[min(1, count - 1)])
    end = at_time(x0, process.t_max)
    alpha, sigma = expand_like(process.alpha(end), x0.double()), expand_like(process.sigma(end), x0.double())
    prior_log_variance = 2.0 * torch.as_tensor(process.prior_std, dtype=torch.float64, device=x0.device).log()
    prior = gaussian_kl(
        alpha * x0.double(), 2.0 * sigma.log(), torch.zeros_like(prior_log_variance), prior_log_variance
    )
    terms = torch.zeros(len(x0), count, dtype=torch.float64, device=x0.device)
    whole = sampled is None or sampled >= count - 1
    draws = count - 1 if whole or sampled is None else sampled
    offset = noise.uniform(()).to(torch.float64)
    rows = torch.arange(len(x0), device=x0.device)
    for draw in range(draws + 1):
        if draw == 0 or whole:
            index, weight = torch.full_like(rows, draw), 1.0
        else:
            index = 1 + ((draw - 1 + offset) * (count - 1) / draws).long().clamp(max=count - 2)
            weight = (count - 1) / draws
        t = times[index]
        x_t = process.perturb(x0, t, noise.normal(tuple(x0.shape[1:])).to(x0.dtype))
        term = bound_term(denoiser(x_t, t, cond), denoiser, x0, ends[index], chain, grey_levels, before_last)
        terms[rows, index] += weight * term
        if on_step is not None:
            on_step(draw + 1, draws + 1)
    return VariationalBound(prior.flatten(1).sum(1), terms, times)
