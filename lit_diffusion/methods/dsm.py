r"""Denoising score matching at one noise level (Vincent 2011, "A connection between score matching and denoising
autoencoders").

.. math::  L = E \Big\| s_\theta(x + \sigma \epsilon) + \frac{\epsilon}{\sigma} \Big\|^2

learns the score of the data smoothed by :math:`N(0, \sigma^2 I)`; Tweedie's formula :math:`E[x | \tilde x] = \tilde x +
\sigma^2 s(\tilde x)` turns it into a denoiser. With ``parametrization: x0`` and the backbone ``TiedAutoencoder`` it is
Vincent's denoising autoencoder, :math:`s = (W' \mathrm{sigmoid}(W \tilde x + b) + c - \tilde x) / \sigma^2`.
"""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.datamodule import Batch
from lit_diffusion.denoisers import NetworkDenoiser, Parametrization
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingLoss, DenoisingScoreMatching
from lit_diffusion.processes import VE
from lit_diffusion.samplers import Langevin, Sampler


class DSM(Method):
    """Denoising score matching at one noise level, with Langevin dynamics as the sampler.

    Args:
        backbone: the network; there is one level, so it need not be told of it (``noise_features: none``).
        sigma: the noise level, in units of the normalised data.
        parametrization: what the network's output is: ``score`` (sigma times the score), ``raw_score``, ``x0``, ...
        sampler: default sampler, null for 1000 Langevin steps of eta = sigma^2 / 10 from the unit cube.
        optimizer: optimiser class and arguments.
        warmup_images: the learning rate rises linearly over so many images (or give warmup_steps).
        warmup_steps: the learning rate rises linearly over so many steps (or give warmup_images).
        gradient_clip: largest norm of the gradient, null for none.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma: float,
        parametrization: Parametrization = "score",
        sampler: Sampler | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        warmup_images: int | None = None,
        warmup_steps: int | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__(
            NetworkDenoiser(backbone, VE(sigma, sigma, levels=1), parametrization, "log_sigma"),
            sampler or Langevin(steps=1000, eta=0.1 * sigma**2),
            optimizer,
            warmup_images,
            warmup_steps,
            gradient_clip,
        )
        self.objective = DenoisingScoreMatching(time_law="levels", weight="sigma2", reduction="half_sum")

    def loss(self, batch: Batch, seed: int) -> DenoisingLoss:
        """``sigma^2/2 |s + eps/sigma|^2`` of each datum."""
        return self.objective(self.denoiser, batch.x, seed, batch.index, batch.cond)
