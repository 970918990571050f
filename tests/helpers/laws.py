"""What the samplers' tests share.

On Gaussian data every sampler's step is linear, and the laws of the reverse SDE and of the ODE are known. A fixed
random network is for the comparison with other implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.denoisers.analytic import ExactDenoiser, GaussianMixture
from lit_diffusion.processes import VE, VP, Betas, Process, SubVP, linear_betas
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.samplers import Predictor, Run, Sampler

Law = tuple[Tensor, Tensor]
"""Mean ``[D]`` and covariance ``[D, D]``."""

PAPERS = {"VE": VE(0.01, 50.0), "VP": VP(), "SubVP": SubVP(), "DDPM": Betas(linear_betas())}

GENTLE = {
    "VE": VE(0.3, 2.0, t_min_sampling=1e-4),
    "VP": VP(1.0, 6.0, t_min_sampling=1e-4),
    "SubVP": SubVP(1.0, 6.0, t_min_sampling=1e-4),
    "Betas": Betas(linear_betas(20_000, 5e-5, 3e-4)),
}
"""Processes on which few steps are already in the regime of their order."""


def wide(*values: float) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def noise_of(count: int, seed: int = 0, shape: tuple[int, ...] = (3,), first: int = 0, **keys) -> SampleNoise:
    """The noise of samples ``first .. first + count - 1``."""
    return SampleNoise(seed, first + torch.arange(count), shape, **keys)


class Given(SampleNoise):
    """The same given numbers at every request."""

    def __init__(self, z: Tensor) -> None:
        super().__init__(0, torch.arange(len(z)), tuple(z.shape[1:]), z.dtype)
        self.z = z

    def normal(self) -> Tensor:
        return self.z


class Gaussian(GaussianMixture):
    """``N(m, C)``."""

    def __init__(self, m: Tensor, C: Tensor) -> None:
        super().__init__(torch.ones(1), m[None], C[None])
        self.m, self.C = self.means[0], self.covariances[0]

    def marginal(self, process: Process, t: float) -> Law:
        """The law of ``x_t``."""
        alpha, sigma = process.alpha(wide(t)), process.sigma(wide(t))
        return alpha * self.m, alpha**2 * self.C + sigma**2 * torch.eye(len(self.m), dtype=torch.float64)

    def _variances(self, process: Process, t: float) -> Tensor:
        return process.alpha(wide(t)) ** 2 * self.eigenvalues[0] + process.sigma(wide(t)) ** 2

    def _along_axes(self, gains: Tensor) -> Tensor:
        return self.eigenvectors[0] * gains @ self.eigenvectors[0].T

    def _flow(self, process: Process, t: float, s: float) -> Tensor:
        return self._along_axes((self._variances(process, s) / self._variances(process, t)).sqrt())

    def flow(self, process: Process, x: Tensor, t: float, s: float) -> Tensor:
        """The solution at s of the probability-flow ODE that is x ``[B, D]`` at t."""
        return process.alpha(wide(s)) * self.m + (x - process.alpha(wide(t)) * self.m) @ self._flow(process, t, s)

    def posterior_mean(self, process: Process, x: Tensor, t: float) -> Tensor:
        """``E[x_0 | x_t]`` of x ``[B, D]``."""
        alpha = process.alpha(wide(t))
        gain = self._along_axes(alpha * self.eigenvalues[0] / self._variances(process, t))
        return self.m + (x - alpha * self.m) @ gain

    def flowed(self, process: Process, law: Law, t: float, s: float) -> Law:
        """The law at s of the ODE's solutions that have the given one at t."""
        gain = self._flow(process, t, s)
        return self.flow(process, law[0][None], t, s)[0], gain @ law[1] @ gain

    def reversed(self, process: Process, law: Law, t: float, s: float) -> Law:
        """The law at s of the reverse SDE's solutions that have the given one at t."""
        at_s, at_t = self.marginal(process, s), self.marginal(process, t)
        scale = process.alpha(wide(t)) / process.alpha(wide(s))
        gain = self._along_axes(scale * self._variances(process, s) / self._variances(process, t))
        return at_s[0] + gain @ (law[0] - at_t[0]), at_s[1] + gain @ (law[1] - at_t[1]) @ gain


GAUSSIAN = Gaussian(wide(0.6, -0.3, 1.0), torch.tensor([[1.0, 0.5, -0.2], [0.5, 0.6, 0.1], [-0.2, 0.1, 0.3]]))
"""Variances 0.12, 0.41 and 1.37 along axes of its own."""

MIXTURE = GaussianMixture(
    wide(0.3, 0.7),
    torch.tensor([[1.2, -0.8, 0.0], [-0.6, 0.4, 0.5]]),
    torch.stack((0.3 * GAUSSIAN.C.float(), 0.2 * torch.eye(3))),
)


def affine(step: Callable[[Tensor, SampleNoise], Tensor], dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``b`` and ``B`` of a step ``x -> A x + b + B z``."""
    unit, none = torch.eye(dimension, dtype=torch.float64), torch.zeros(dimension, dimension, dtype=torch.float64)
    out = step(torch.cat((none[:1], unit, none)), Given(torch.cat((none[:1], none, unit))))
    b = out[0]
    return (out[1 : dimension + 1] - b).T, b, (out[dimension + 1 :] - b).T


@torch.no_grad()
def law_of(sampler: Sampler, process: Process, law: Law, to_zero: bool = True, finish: bool = False) -> Law:
    """The law of a sampler's output on :data:`GAUSSIAN` from a start with the given one, without drawing a number.

    Args:
        sampler: one that asks for noise at most once a step.
        process: the process.
        law: at the start.
        to_zero: make also the step that ends at 0, if there is one.
        finish: make also what remains after the last step.
    """
    denoiser, (mean, covariance) = ExactDenoiser(GAUSSIAN, process), law
    steps = [
        lambda x, noise, move=move: sampler.step(Run(denoiser, noise), x, move)
        for move in sampler.plan(process)
        if to_zero or move.s > 0.0
    ]
    if finish:
        plan = sampler.plan(process)
        steps.append(lambda x, noise: sampler.finish(Run(denoiser, noise, plan=plan), x))
    for step in steps:
        A, b, B = affine(step, len(mean))
        mean, covariance = A @ mean + b, A @ covariance @ A.T + B @ B.T
    return mean, covariance


def weak_error(sampler: Predictor, process: Process, exact: Callable[..., Law], to_zero: bool = False) -> float:
    """How far the law of a sampler's output is from the exact one, from a start that is not the marginal."""
    mean, covariance = GAUSSIAN.marginal(process, 1.0)
    start = (mean + 0.5, 1.3 * covariance)
    end = [move.s for move in sampler.plan(process) if to_zero or move.s > 0.0][-1]
    law, goal = law_of(sampler, process, start, to_zero), exact(process, start, 1.0, end)
    return float((law[0] - goal[0]).norm() + (law[1] - goal[1]).norm())


def bias(sampler: Predictor, process: Process, start: Law | None = None) -> float:
    """Of a sampler's mean and covariance at its end, relative to the data's; by default from the exact marginal."""
    mean, covariance = law_of(sampler, process, start or GAUSSIAN.marginal(process, 1.0))
    goal = GAUSSIAN.marginal(process, sampler.plan(process)[-1].s)
    return float((mean - goal[0]).norm() / goal[0].norm() + (covariance - goal[1]).norm() / goal[1].norm())


def order(coarse: float, fine: float) -> float:
    """Of convergence, from the errors of a step and of half of it."""
    return math.log2(coarse / fine)


def assert_moments(x: Tensor, mean: Tensor, covariance: Tensor, most: float = 4.5) -> None:
    """Each mean and covariance of samples ``[N, D]`` is the given one within so many of its standard errors."""
    centred = x.to(torch.float64) - mean
    products = (centred[:, :, None] * centred[:, None, :] - covariance).flatten(1)
    for found in (centred, products):
        assert float((found.mean(0) / (found.std(0) / math.sqrt(len(x)))).abs().max()) < most


def assert_law(sampler: Predictor, process: Process, count: int = 10_000) -> None:
    """Samples from the sampler's own start have the mean and the covariance that its steps on Gaussian data give."""
    start = (torch.zeros(3, dtype=torch.float64), process.prior_std**2 * torch.eye(3, dtype=torch.float64))
    x = sampler.sample(ExactDenoiser(GAUSSIAN, process), noise_of(count, seed=1)).x
    assert_moments(x, *law_of(sampler, process, start, finish=True))


def assert_mixture(sampler: Sampler, process: Process, count: int = 1000) -> None:
    """Samples have the mixture's mean, covariance and weights."""
    x = sampler.sample(ExactDenoiser(MIXTURE, process), noise_of(count, seed=2)).x
    assert_moments(x, MIXTURE.mean(), MIXTURE.covariance())
    first = float((MIXTURE.component_of(x) == 0).double().mean())
    same = MIXTURE.sample(noise_of(50_000, dtype=torch.float64).normal(), noise_of(50_000, seed=5).uniform(()))
    expected = float((MIXTURE.component_of(same) == 0).double().mean())
    assert abs(first - expected) < 4.5 * math.sqrt(0.3 * 0.7 / count)


class Network(Backbone):
    """A random network of the image and the index of its level, in float64; always the same one."""

    def __init__(self, learned_variance: bool = False) -> None:
        super().__init__()
        self.data_shape, self.out_channels = (1, 4, 4), 2 if learned_variance else 1
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, self.out_channels, 3, padding=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return self.second(torch.tanh(self.first(x) + 0.01 * c_noise.double().view(-1, 1, 1, 1)))


def on_their_table(scheduler: Any) -> Betas:
    """A process on a scheduler's float32 table; the scheduler, too, computes in float64 from now on."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    process = Betas(scheduler.betas)
    process.log_alpha_bar[1:] = scheduler.alphas_cumprod.log()
    return process


def as_azulas(denoiser: Denoiser) -> nn.Module:
    """A denoiser as azula's samplers take it."""
    from azula.denoise import DiracPosterior

    class Theirs(nn.Module):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return denoiser.process.alpha(t), denoiser.process.sigma(t)

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            return DiracPosterior(denoiser(x_t, t.expand(len(x_t))).x0)

    return Theirs()
