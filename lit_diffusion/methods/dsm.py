r"""Denoising score matching at one noise level.

.. math::  L = E \Big\| s_\theta(x + \sigma \epsilon) + \frac{\epsilon}{\sigma} \Big\|^2

(Vincent 2011, "A connection between score matching and denoising autoencoders", https://doi.org/10.1162/NECO_a_00142.)
It learns the score of the data smoothed by :math:`N(0, \sigma^2 I)`; Tweedie's formula :math:`E[x | \tilde x] =
\tilde x + \sigma^2 s(\tilde x)` turns it into a denoiser. With ``parametrization: x0`` and the backbone
``TiedAutoencoder`` it is Vincent's denoising autoencoder,
:math:`s = (W' \mathrm{sigmoid}(W \tilde x + b) + c - \tilde x) / \sigma^2`.
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import NetworkDenoiser, Parametrization
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingScoreMatching
from lit_diffusion.processes import VE
from lit_diffusion.samplers import Langevin, Sampler


class DSM(Method):
    r"""Denoising score matching at one noise level, with Langevin dynamics as the sampler.

    .. math::  L = \frac{\sigma^2}{2} E \Big\| s_\theta(x + \sigma \epsilon) + \frac{\epsilon}{\sigma} \Big\|^2

    (Vincent 2011, https://doi.org/10.1162/NECO_a_00142.)

    Args:
        backbone: the network; with one noise level it needs no time embedding (``time_embedding: none``).
        sigma: the noise level, in units of the normalized data.
        parametrization: meaning of the network's output: ``score`` (sigma times the score), ``raw_score``, ``x0``, ...
        sampler: default sampler; null: 1000 Langevin steps of eta = sigma^2 / 10 from the unit cube.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma: float,
        parametrization: Parametrization = "score",
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        super().__init__(
            NetworkDenoiser(backbone, VE(sigma, sigma, num_timesteps=1), parametrization, "log_sigma"),
            DenoisingScoreMatching(time_law="levels", weight="sigma2", reduction="half_sum"),
            sampler or Langevin(steps=1000, eta=0.1 * sigma**2),
            **training,
        )
