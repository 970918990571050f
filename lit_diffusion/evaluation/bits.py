r"""Bits per dimension of data under a model: by the probability-flow ODE and by the variational bound.

.. math::  b = -\log_2 p(x) / D

for D-dimensional data; for images p is the probability of the grey levels, by uniform dequantization (Theis et al.
2016, https://arxiv.org/abs/1511.01844) or by the chain's discretized last step. The two are likelihoods of two models
that share a network (:mod:`lit_diffusion.likelihood`): neither bounds the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.data_spec import GreyLevels
from lit_diffusion.distributed import rank_and_world_size, sum_over_ranks
from lit_diffusion.evaluation.model import GenerativeModel
from lit_diffusion.images import to_uint8
from lit_diffusion.likelihood import (
    Probe,
    Trace,
    bits_per_dimension,
    dequantized,
    flow_log_prob,
    variational_bound,
)
from lit_diffusion.metrics.frechet import frechet_distance
from lit_diffusion.metrics.gaussian import Gaussian, Moments
from lit_diffusion.metrics.mean import Mean
from lit_diffusion.randomness import SampleNoise, stream_key
from lit_diffusion.reverse import ReverseChain
from lit_diffusion.samplers.ode import integrate
from lit_diffusion.samplers.times import Spacing


class EncodedData(Protocol):
    """Data in the diffused space."""

    @property
    def z(self) -> Tensor:
        """The encoded data ``[B, ...]``."""

    @property
    def nats(self) -> Tensor:
        """The cost of the encoder, ``[B]``: ``log p(x) >= log p(z) - nats``."""


class LikelihoodModel(GenerativeModel, Protocol):
    """A model whose likelihood is measured."""

    @property
    def encodes_grey_levels(self) -> bool:
        """True where the encoder's nats include the probability of grey levels."""

    @property
    def diffuses_data(self) -> bool:
        """True where the data themselves are diffused."""

    @property
    def grey_levels(self) -> GreyLevels | None:
        """Grey levels of the diffused data; None for points and for latents."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample in the diffused space."""

    def encode(self, x: Tensor, noise: SampleNoise) -> EncodedData:
        """Encode data into the diffused space."""

    def decode(self, z: Tensor, noise: SampleNoise, cond: Condition | None) -> Tensor:
        """Decode samples of the diffused space to data."""


@dataclass(frozen=True)
class Held:
    """A batch of data to be measured.

    Attributes:
        x: normalized data, ``[B, *shape]``; grey levels at the centers of their bins.
        index: numbers of the data, int64 ``[B]``, which key all noise, whatever the batch.
        cond: the condition, ``[B]`` rows.
    """

    x: Tensor
    index: Tensor
    cond: Condition | None = None

    def noise(self, seed: int) -> SampleNoise:
        """The random numbers of these data."""
        return SampleNoise(stream_key(seed, "evaluation"), self.index, tuple(self.x.shape[1:]))


# ---- the ODE -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ODESettings:
    """Settings of the likelihood by the probability-flow ODE.

    Attributes:
        trace: the divergence: ``hutchinson``, estimated, or ``exact``.
        probe: law of the entries of Hutchinson's probes, ``rademacher`` or ``gaussian``.
        probes: number of probes a datum.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        t_min: the smallest time; None: the process's.
    """

    trace: Trace = "hutchinson"
    probe: Probe = "rademacher"
    probes: int = 1
    rtol: float = 1e-5
    atol: float = 1e-5
    t_min: float | None = None

    def protocol(self) -> dict[str, Any]:
        """The protocol's entries, besides weights, seed and smallest time."""
        trace = self.trace if self.trace == "exact" else f"hutchinson, {self.probes} {self.probe}"
        return {"trace": trace, "rtol": self.rtol, "atol": self.atol}


class ODEBits:
    """Bits per dimension by the ODE, ``-log_2 p(x) / D``, and their mean over data, batch by batch.

    Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 39.

    Args:
        model: the model.
        settings: settings of the solver.
        seed: seed of dequantization, encoder and probes.
    """

    def __init__(self, model: LikelihoodModel, settings: ODESettings, seed: int = 0) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.mean = Mean()
        self.evaluations: list[int] = []
        """The number of network evaluations of each batch."""

    def take(self, data: Held, on_time: Callable[[float], None] | None = None) -> Tensor:
        """Measure a batch: bits per dimension ``[B]``."""
        model, settings, noise = self.model, self.settings, data.noise(self.seed)
        grey_levels = model.require_data_spec().grey_levels
        x = data.x if model.encodes_grey_levels else dequantized(data.x, noise, grey_levels)
        encoded = model.encode(x, noise.stream("encode"))
        found = flow_log_prob(
            model.denoiser,
            encoded.z,
            noise,
            data.cond,
            settings.trace,
            settings.probe,
            settings.probes,
            settings.rtol,
            settings.atol,
            settings.t_min,
            on_time=on_time,
        )
        self.evaluations.append(found.evaluations)
        # The nats of an encoder of grey levels include their probability: there is no density over their bins.
        width = None if model.encodes_grey_levels else grey_levels
        bits = bits_per_dimension(found.log_prob - encoded.nats, data.x[0].numel(), width)
        self.mean.update(bits)
        return bits


# ---- the bound ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoundSettings:
    """Settings of the variational bound.

    Attributes:
        chain: the reverse chain, its variances and its clipping.
        steps: number of steps; None: every timestep of the model, 1000 in continuous time.
        spacing: spacing of fewer steps.
        sampled: number of terms of a datum to evaluate, at random; None: all.
    """

    chain: ReverseChain
    steps: int | None = None
    spacing: Spacing = "uniform"
    sampled: int | None = None


@dataclass(frozen=True)
class BoundResult:
    """The bound over all data, in bits per dimension.

    Attributes:
        value: mean of the bound.
        error: standard error of the mean; NaN for a single datum.
        count: number of data.
        parts: means of ``prior``, ``kl`` and ``decoder``.
        by_step: mean of each step's term, float64 ``[S]``; the decoder's first.
        times: times at which the steps start, float64 ``[S]``.
    """

    value: float
    error: float
    count: int
    parts: dict[str, float]
    by_step: Tensor
    times: Tensor


class BoundBits:
    """Bits per dimension by the variational bound, ``L_vlb / (D ln 2)``, and their mean over data, batch by batch.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 5.

    Args:
        model: the model.
        settings: settings of the chain.
        seed: seed of dequantization, encoder and terms.
    """

    def __init__(self, model: LikelihoodModel, settings: BoundSettings, seed: int = 0) -> None:
        self.model = model
        self.settings = settings
        self.seed = seed
        self.total, self.parts = Mean(), {name: Mean() for name in ("prior", "kl", "decoder")}
        self._by_step = torch.zeros(0, dtype=torch.float64)
        self._times = torch.zeros(0, dtype=torch.float64)

    def take(self, data: Held, on_step: Callable[[int, int], None] | None = None) -> None:
        """Measure a batch; ``on_step`` is called with the number of terms done and to do."""
        model, settings, noise = self.model, self.settings, data.noise(self.seed)
        grey_levels, dimension = model.require_data_spec().grey_levels, data.x[0].numel()
        # Where the data themselves are diffused, the chain's last step is a law of grey levels.
        as_density = not (model.diffuses_data or model.encodes_grey_levels)
        x = dequantized(data.x, noise, grey_levels) if as_density else data.x
        encoded = model.encode(x, noise.stream("encode"))
        bound = variational_bound(
            model.denoiser,
            encoded.z,
            noise,
            settings.chain,
            model.grey_levels,
            data.cond,
            settings.steps,
            settings.spacing,
            settings.sampled,
            on_step,
        )
        scale = 1.0 / (dimension * math.log(2.0))
        of_bins = dimension * math.log(grey_levels.width) if as_density and grey_levels is not None else 0.0
        self.total.update((bound.total + encoded.nats - of_bins) * scale)
        for name, mean in self.parts.items():
            mean.update(getattr(bound, name) * scale)
        by_step = (bound.steps * scale).sum(0).cpu()
        self._by_step = by_step if len(self._by_step) == 0 else self._by_step + by_step
        self._times = bound.times.cpu()

    def result(self) -> BoundResult:
        """The bound over the data of all processes, which all call it."""
        value, error, count = self.total.compute()
        parts = {name: mean.compute()[0] for name, mean in self.parts.items()}
        return BoundResult(value, error, count, parts, sum_over_ranks(self._by_step) / count, self._times)


# ---- the smallest time -------------------------------------------------------------------------------------------


@torch.no_grad()
def frechet_by_time(
    model: LikelihoodModel,
    real: Gaussian,
    times: Sequence[float],
    settings: ODESettings,
    count: int,
    seed: int,
    batch_size: int = 250,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Frechet distances in pixels of samples of one ODE solution, stopped at each of the times.

    Args:
        model: a model of images.
        real: Gaussian of the pixels of real data, see :func:`pixel_moments`.
        times: times from the largest to the smallest.
        settings: settings of the solver.
        count: number of samples over all processes, which all call it.
        seed: the samples' seed.
        batch_size: samples at a time.
        on_batch: called with the number of batches done and to do.
    """
    spec, process = model.require_data_spec(), model.denoiser.process
    made = [Moments(math.prod(spec.shape)) for _ in times]
    rank, world_size = rank_and_world_size()
    parts = torch.arange(count)[rank::world_size].split(batch_size)
    for done, indices in enumerate(parts):
        noise = SampleNoise(seed, indices.to(model.device), model.sample_shape)
        cond = model.condition_by_counts(indices, seed, spec.class_counts)

        def velocity(t: Tensor, x: Tensor, cond: Condition | None = cond) -> Tensor:
            return model.denoiser(x, t, cond).velocity

        x = (process.prior_std * noise.normal()).double()
        states = integrate(process, velocity, x, (process.t_max, *times), settings.rtol, settings.atol)[1:]
        for moments, state in zip(made, states, strict=True):
            moments.add(_pixels(model, model.decode(state.float(), noise.stream("decode"), cond)))
        if on_batch is not None:
            on_batch(done + 1, len(parts))
    return [
        frechet_distance(real, Moments(moments.dimension, sum_over_ranks(moments.sums)).gaussian()) for moments in made
    ]


def pixel_moments(model: LikelihoodModel, batches: Iterable[Tensor]) -> Gaussian:
    """Mean and covariance of the pixels of normalized images ``[b, C, H, W]``."""
    moments = Moments(math.prod(model.require_data_spec().shape))
    for x in batches:
        moments.add(_pixels(model, x))
    return moments.gaussian()


def _pixels(model: LikelihoodModel, x: Tensor) -> Tensor:
    data_spec = model.require_data_spec()
    return torch.from_numpy(to_uint8(x, data_spec)).flatten(1).double() / 255.0
