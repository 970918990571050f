r"""Interpolation between samples, by spherical interpolation of the noise of a deterministic sampler.

.. math::  x_1(w) = \frac{\sin((1 - w) \theta)}{\sin\theta} x_1^a + \frac{\sin(w \theta)}{\sin\theta} x_1^b,
           \qquad \cos\theta = \frac{x_1^a \cdot x_1^b}{|x_1^a| |x_1^b|}

(Song, Meng and Ermon 2021, https://arxiv.org/abs/2010.02502, appendix D.5, after Shoemake 1985,
https://doi.org/10.1145/325334.325242.) On the straight line between two Gaussian vectors the norm shrinks, to states on
which no network was trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.evaluation.model import GenerativeModel
from lit_diffusion.processes import expand_like
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.runs.console import print_note
from lit_diffusion.samplers import DDIM
from lit_diffusion.samplers.base import Samples, Strays


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Spherical interpolation between the rows of two states ``[B, ...]``, linear where they are parallel.

    ``slerp(a, b, w) = (sin((1 - w) theta) a + sin(w theta) b) / sin(theta)``, with the angle theta between a and b.

    Args:
        first: states at weight 0.
        second: states at weight 1.
        weight: w, between 0 and 1.
    """
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    parallel = angle.sin() < 1e-6
    sine = torch.where(parallel, 1.0, angle.sin())
    of_first = torch.where(parallel, 1.0 - weight, torch.sin((1.0 - weight) * angle) / sine)
    of_second = torch.where(parallel, weight, torch.sin(weight * angle) / sine)
    return expand_like(of_first, first) * first + expand_like(of_second, second) * second


@torch.no_grad()
def interpolate(
    method: GenerativeModel,
    first: Tensor,
    second: Tensor,
    columns: int,
    sampler: DDIM,
    cond: Condition | None = None,
    second_cond: Condition | None = None,
) -> Samples:
    """Samples from the noise between two states.

    Between states of different classes each point has the class of the nearer end, the first's in the middle, since no
    network is conditioned on anything between two labels.

    Args:
        method: the model.
        first: states at time 1, ``[B, ...]``, e.g. from ``DDIM.encode`` or the prior.
        second: as many further states.
        columns: number of points, both ends included.
        sampler: the deterministic sampler.
        cond: the condition of the first states, ``[B]`` rows.
        second_cond: the condition of the second states; None: that of the first.

    Returns:
        ``x`` is ``[B, columns, ...]`` in data space, ``farthest`` ``[B, columns]``.
    """
    rows = len(first)
    unused = SampleNoise(0, torch.arange(rows, device=first.device), tuple(first.shape[1:]))
    made: list[Samples] = []
    for k in range(columns):
        weight = k / (columns - 1)
        nearer = cond if weight <= 0.5 or second_cond is None else second_cond
        start = slerp(first, second, weight)
        column = sampler.sample(method.denoiser, unused, nearer, start=start)
        made.append(replace(column, x=method.decode(column.x, unused.stream("decode"), nearer)))
    farthest = torch.stack([column.farthest for column in made], dim=1)
    if (strays := Strays.among(farthest.flatten())).count:
        print_note(str(strays))
    x = torch.stack([column.x for column in made], dim=1)
    return Samples(x, made[0].evaluations, farthest)
