r"""Denoising diffusion probabilistic models (Ho, Jain and Abbeel 2020), improved as by Nichol and Dhariwal 2021.

.. math::  x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
           \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)

(eq. 4). The network learns to predict the noise (eq. 14), or whatever ``parametrization`` says, and samples are drawn
from the reverse chain (algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import CNoise, NetworkDenoiser, Parametrization
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DiffusionObjective, Loss
from lit_diffusion.objectives.diffusion import LevelLaw, LossName
from lit_diffusion.processes import Betas, cosine_betas, linear_betas
from lit_diffusion.reverse import ReverseVariance
from lit_diffusion.samplers import Ancestral, Sampler
from lit_diffusion.training.datamodule import Batch, DataModule

Schedule = Literal["linear", "cosine"]


class DDPM(Method):
    """DDPM: a network that predicts the noise at any of T levels, sampled by ancestral sampling.

    Args:
        backbone: the network; a learned variance doubles its ``out_channels``, which the command line does by itself.
        num_timesteps: T, the number of noise levels.
        schedule: of the betas: ``linear`` from beta_1 to beta_T (DDPM) or ``cosine`` (Nichol and Dhariwal 2021, eq.
            17).
        beta_1: the first beta of the linear schedule.
        beta_T: the last; with other than 1000 levels scale both by 1000 / levels.
        parametrization: what the network's output is: ``eps`` (the paper), ``x0``, ``mean`` of the reverse step,
            ``v``, ...
        c_noise: what it is told of the level: ``index``, t - 1, or another.
        variance: of the reverse steps: ``beta``, ``beta_tilde`` (both the paper's), or ``learned`` between them in
            log space. A sampler of another variance is said.
        loss: ``simple`` (L_simple), ``bound`` (the variational bound in bits per dimension: with a fixed variance the
            paper's weighted L) or ``hybrid`` (both; the bound trains the variance alone).
        time_law: ``levels`` draws all levels alike, ``second_moment`` those with the larger losses more often;
            held-out losses are of all levels alike.
        sampler: default sampler, null for ancestral sampling on all levels with this variance.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_timesteps: int = 1000,
        schedule: Schedule = "linear",
        beta_1: float = 1e-4,
        beta_T: float = 0.02,
        parametrization: Parametrization = "eps",
        c_noise: CNoise = "index",
        variance: ReverseVariance = "beta",
        loss: LossName = "simple",
        time_law: LevelLaw = "levels",
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        require_choice("", "schedule", schedule, get_args(Schedule))
        if num_timesteps < 2:
            raise UserError(f"num_timesteps is {num_timesteps}; a diffusion needs at least 2, the paper's has 1000")
        betas = linear_betas(num_timesteps, beta_1, beta_T) if schedule == "linear" else cosine_betas(num_timesteps)
        super().__init__(
            NetworkDenoiser(backbone, Betas(betas), parametrization, c_noise, learned_variance=variance == "learned"),
            DiffusionObjective(num_timesteps, loss, variance, time_law),
            sampler or Ancestral(variance=variance),
            **training,
        )
        self.reverse_variance = variance

    @classmethod
    def resolve_auto(cls, init_args: dict[str, Any], data: DataModule, say: Callable[[str], None]) -> dict[str, Any]:
        """The output channels of a learned variance, too."""
        found = super().resolve_auto(init_args, data, say)
        backbone = (init_args.get("backbone") or {}).get("init_args", {})
        if init_args.get("variance") == "learned" and "out_channels" in backbone and backbone["out_channels"] is None:
            found["backbone.init_args.out_channels"] = 2 * data.data_spec.shape[0]
        return found

    def loss(self, batch: Batch, seed: int) -> Loss:
        """The chosen loss of each image at a level of its own."""
        return self.objective(self.denoiser, batch.x, seed, batch.index, batch.cond, self.grey_levels, batch.eps)

    def loss_given_t(self, batch: Batch, t: Tensor, eps: Tensor) -> Loss:
        """The same at given times, those of the grid's levels, and noise."""
        return self.objective.at(self.denoiser, batch.x, t, eps, batch.cond, self.grey_levels)
