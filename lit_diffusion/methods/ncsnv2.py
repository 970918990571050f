r"""NCSNv2 (Song and Ermon 2020, "Improved techniques for training score-based generative models",
https://arxiv.org/abs/2006.09011).

The paper's five techniques, computed from the data instead of taken from its tables:

1. ``sigma_max: auto``: the largest distance between two training images (technique 1);
2. ``num_levels: auto``: the ratio of neighboring noise levels from the dimension (technique 2);
3. a network without noise level, ``s(x, sigma) = F(x) / sigma`` (technique 3): ``parametrization: score`` with a
   backbone of ``time_embedding: none``;
4. ``eta: auto``: the Langevin step that keeps the chain's variance closest to the noise level's (technique 4);
5. averaged weights (technique 5): the EMA callback.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.data.distances import Diameter, largest_distance
from lit_diffusion.denoisers import CIn, CNoise, Parametrization
from lit_diffusion.errors import UserError
from lit_diffusion.methods.ncsn import NCSN
from lit_diffusion.samplers import AnnealedLangevin, Sampler
from lit_diffusion.training.datamodule import DataModule

Auto = Literal["auto"]


def level_ratio(dimension: int) -> float:
    r"""Technique 2: the ratio gamma of neighboring noise levels whose noise shells overlap by one half.

    .. math::  \Phi(\sqrt{2D}(\gamma - 1) + 3\gamma) - \Phi(\sqrt{2D}(\gamma - 1) - 3\gamma) = 0.5

    The paper says "about 0.5" and its tables overlap a little more: for CIFAR-10's 50 to 0.01 this gives 220 noise
    levels, the table has 232. Set ``num_levels`` to a number to reproduce a table.

    Raises:
        UserError: in fewer than 5 dimensions, where shells always overlap by more.
    """
    root = math.sqrt(2.0 * dimension)

    def excess(ratio: float) -> float:
        center = root * (ratio - 1.0)
        return float(norm.cdf(center + 3.0 * ratio) - norm.cdf(center - 3.0 * ratio)) - 0.5

    if excess(1e3) > 0.0:
        raise UserError(f"num_levels: auto has no solution in {dimension} dimensions; give a number")
    return float(brentq(excess, 1.0 + 1e-9, 1e3))


def level_count(sigma_max: float, sigma_min: float, dimension: int) -> int:
    """Technique 2: the smallest number of noise levels that keeps every ratio at or below :func:`level_ratio`."""
    return 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(level_ratio(dimension)))


def variance_ratio(e: float, steps: int, ratio: float) -> float:
    r"""Technique 4: the chain's variance over the noise level's after T steps, with ``e`` in units of ``sigma_L^2``.

    .. math::  \frac{s_T^2}{\sigma_i^2} = (1 - e)^{2T} \Big(\gamma^2 - \frac{2 e}{1 - (1-e)^2}\Big)
               + \frac{2 e}{1 - (1-e)^2}

    (proposition 3; the paper's convention ``x + e s + sqrt(2 e) z``).
    """
    stationary = 2.0 / (2.0 - e)
    return (1.0 - e) ** (2 * steps) * (ratio**2 - stationary) + stationary


def best_eta(sigma_max: float, sigma_min: float, num_levels: int, steps: int) -> float:
    """Technique 4: the step at sigma_min of ``x + (eta/2) s + sqrt(eta) z`` whose variance ratio is closest to 1.

    It is twice the paper's epsilon. CIFAR-10's sigma 50 to 0.01 with 232 noise levels and 5 steps gives 1.24e-5.
    """
    ratio = (sigma_max / sigma_min) ** (1.0 / max(num_levels - 1, 1))
    found = minimize_scalar(
        lambda e: abs(variance_ratio(e, steps, ratio) - 1.0),
        bounds=(1e-9, 1.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return 2.0 * float(found.x) * sigma_min**2


class NCSNv2(NCSN):
    r"""NCSNv2: NCSN with noise levels and step from the data, and a network without noise level.

    .. math::  L = \frac{1}{L} \sum_i \frac{\sigma_i^2}{2} E \Big\| s_\theta(x + \sigma_i \epsilon, \sigma_i)
               + \frac{\epsilon}{\sigma_i} \Big\|^2, \qquad s_\theta(x, \sigma) = F_\theta(x) / \sigma

    (Song and Ermon 2020, https://arxiv.org/abs/2006.09011.)

    Args:
        backbone: the network; the paper's has no time embedding (``time_embedding: none``).
        sigma_max: the largest noise level; ``auto``: the largest distance between two training images.
        sigma_min: the smallest noise level.
        num_levels: number of noise levels; ``auto``: from the dimension.
        steps_per_level: Langevin steps T at each noise level when sampling.
        eta: Langevin step at sigma_min of ``x + (eta/2) s + sqrt(eta) z``; ``auto``: from T and the ratio of levels.
        denoise: if true, end sampling with one step of Tweedie's formula.
        parametrization: meaning of the network's output: ``score`` (the paper), sigma times the score.
        c_noise: encoding of the noise level that the network receives; unused with ``time_embedding: none``.
        c_in: ``none`` (the paper) or ``unit_variance``: divide the noisy input by its standard deviation.
        sigma_data: standard deviation of the normalized data, for ``unit_variance`` and ``edm``.
        sampler: default sampler; null: annealed Langevin dynamics with the keys above.
        optimizer: optimizer class and arguments; the paper's is Adam at 1e-4.
        **training: warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.

    Raises:
        UserError: for a key that is still ``auto``, which the command line resolves from the data.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma_max: float | Auto = "auto",
        sigma_min: float = 0.01,
        num_levels: int | Auto = "auto",
        steps_per_level: int = 5,
        eta: float | Auto = "auto",
        denoise: bool = True,
        parametrization: Parametrization = "score",
        c_noise: CNoise = "log_sigma",
        c_in: CIn = "none",
        sigma_data: float = 0.5,
        sampler: Sampler | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
        **training: Any,
    ) -> None:
        if isinstance(sigma_max, str) or isinstance(num_levels, str) or isinstance(eta, str):
            raise UserError(
                "NCSNv2: sigma_max, num_levels and eta are 'auto'; the command line finds them from the data, "
                "in Python code give the numbers"
            )
        super().__init__(
            backbone,
            sigma_max,
            sigma_min,
            num_levels,
            parametrization,
            c_noise,
            c_in,
            sigma_data,
            sampler or AnnealedLangevin(steps_per_level, eta, denoise, initial="uniform"),
            optimizer=optimizer,
            **training,
        )

    @classmethod
    def resolve_auto(cls, init_args: dict[str, Any], data: DataModule, say: Callable[[str], None]) -> dict[str, Any]:
        """Numbers of techniques 1, 2 and 4, in that order, each from the numbers before it."""
        found = super().resolve_auto(init_args, data, say)
        dimension = math.prod(data.data_spec.shape)
        sigma_max, sigma_min, num_levels = init_args["sigma_max"], init_args["sigma_min"], init_args["num_levels"]
        if sigma_max == "auto":
            diameter: Diameter = largest_distance(data.training_values, len(data.train_indices))
            sigma_max = found["sigma_max"] = float(f"{diameter.found:.4g}")
            say(f"sigma_max {sigma_max:g}: {diameter.statement}")
        if num_levels == "auto":
            num_levels = found["num_levels"] = level_count(sigma_max, sigma_min, dimension)
            ratio = level_ratio(dimension)
            say(f"num_levels {num_levels}: ratio {ratio:.4g} at most in {dimension} dimensions (technique 2)")
        if init_args["eta"] == "auto":
            steps = init_args["steps_per_level"]
            eta = found["eta"] = float(f"{best_eta(sigma_max, sigma_min, num_levels, steps):.4g}")
            say(f"eta {eta:g}: Langevin step for {steps} steps a level (technique 4; x + eta/2 s + sqrt(eta) z)")
        return found
