r"""Noise conditional score networks (Song and Ermon 2019, "Generative modeling by estimating gradients of the data
distribution").

Train one network on all levels of a geometric sequence :math:`\sigma_1 > \dots > \sigma_L`,

.. math::  L = \frac{1}{L} \sum_i \sigma_i^2\, \frac{1}{2} E \Big\| s_\theta(x + \sigma_i \epsilon, \sigma_i)
           + \frac{\epsilon}{\sigma_i} \Big\|^2

(eqs. 5 and 6), and sample with annealed Langevin dynamics (algorithm 1).
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import InputScale, NetworkDenoiser, NoiseInput, Parametrization
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingScoreMatching
from lit_diffusion.processes import VE
from lit_diffusion.samplers import AnnealedLangevin, Sampler


class NCSN(Method):
    """NCSN: a noise-conditional score network with annealed Langevin sampling.

    Args:
        backbone: the network.
        sigma_max: the largest noise level, in units of the normalised data.
        sigma_min: the smallest noise level.
        levels: number of levels L, geometric from sigma_max to sigma_min.
        parametrization: what the network's output is: ``raw_score`` (the paper), ``score`` (sigma times the score), ...
        noise_input: what it is told of the level: ``index`` (the paper, with conditional instance normalisation) or
            ``log_sigma``.
        input_scale: ``none`` (the paper) or ``unit_variance``: divide the noisy input by its standard deviation.
        sigma_data: standard deviation of the normalised data, for ``unit_variance`` and ``edm``.
        sampler: default sampler, null for annealed Langevin dynamics with the paper's constants.
        **training: optimiser, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma_max: float = 1.0,
        sigma_min: float = 0.01,
        levels: int = 10,
        parametrization: Parametrization = "raw_score",
        noise_input: NoiseInput = "index",
        input_scale: InputScale = "none",
        sigma_data: float = 0.5,
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        process = VE(sigma_min, sigma_max, levels)
        super().__init__(
            NetworkDenoiser(backbone, process, parametrization, noise_input, input_scale, sigma_data),
            sampler or AnnealedLangevin(),
            **training,
        )
        self.objective = DenoisingScoreMatching(time_law="levels", weight="sigma2", reduction="half_sum")
