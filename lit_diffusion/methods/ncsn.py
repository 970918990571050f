r"""Noise conditional score networks (NCSN).

One network is trained on all noise levels of a geometric sequence :math:`\sigma_1 > \dots > \sigma_L`,

.. math::  L = \frac{1}{L} \sum_i \sigma_i^2\, \frac{1}{2} E \Big\| s_\theta(x + \sigma_i \epsilon, \sigma_i)
           + \frac{\epsilon}{\sigma_i} \Big\|^2

and sampled with annealed Langevin dynamics (Song and Ermon 2019, "Generative modeling by estimating gradients of the
data distribution", https://arxiv.org/abs/1907.05600, eqs. 5 and 6, algorithm 1).
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import CIn, CNoise, NetworkDenoiser, Parametrization
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingScoreMatching
from lit_diffusion.processes import VE
from lit_diffusion.samplers import AnnealedLangevin, Sampler


class NCSN(Method):
    r"""NCSN: a noise conditional score network with annealed Langevin sampling.

    .. math::  L = \frac{1}{L} \sum_i \frac{\sigma_i^2}{2} E \Big\| s_\theta(x + \sigma_i \epsilon, \sigma_i)
               + \frac{\epsilon}{\sigma_i} \Big\|^2

    (Song and Ermon 2019, https://arxiv.org/abs/1907.05600, eqs. 5 and 6.)

    Args:
        backbone: the network.
        sigma_max: the largest noise level, in units of the normalized data.
        sigma_min: the smallest noise level.
        num_levels: number of noise levels L, geometric from sigma_max to sigma_min.
        parametrization: meaning of the network's output: ``raw_score`` (the paper), ``score`` (sigma times the score),
            ...
        c_noise: encoding of the noise level that the network receives: ``index`` (the paper, with conditional instance
            normalization) or ``log_sigma``.
        c_in: ``none`` (the paper) or ``unit_variance``: divide the noisy input by its standard deviation.
        sigma_data: standard deviation of the normalized data, for ``unit_variance`` and ``edm``.
        sampler: default sampler; null: annealed Langevin dynamics with the paper's constants.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma_max: float = 1.0,
        sigma_min: float = 0.01,
        num_levels: int = 10,
        parametrization: Parametrization = "raw_score",
        c_noise: CNoise = "index",
        c_in: CIn = "none",
        sigma_data: float = 0.5,
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        process = VE(sigma_min, sigma_max, num_levels)
        super().__init__(
            NetworkDenoiser(backbone, process, parametrization, c_noise, c_in, sigma_data),
            DenoisingScoreMatching(time_law="levels", weight="sigma2", reduction="half_sum"),
            sampler or AnnealedLangevin(),
            **training,
        )
