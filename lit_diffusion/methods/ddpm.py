r"""Denoising diffusion probabilistic models (DDPM), with the improvements of improved DDPM.

.. math::  x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \qquad
           \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)

(Ho, Jain and Abbeel 2020, https://arxiv.org/abs/2006.11239, eq. 4; Nichol and Dhariwal 2021,
https://arxiv.org/abs/2102.09672.) The network learns to predict the noise (eq. 14), or another ``parametrization``, and
samples are drawn from the reverse chain (algorithm 2).
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
    r"""DDPM: a network that predicts the noise at T timesteps, sampled by ancestral sampling.

    .. math::
        L_{simple} = E_{t, x_0, \epsilon}
        \big\| \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \big\|^2,
        \qquad \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)

    (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 14; the other losses, the cosine schedule and the learned
    variance: Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672.)

    Args:
        backbone: the network; a learned variance doubles its ``out_channels``, which the command line sets.
        num_timesteps: T, the number of timesteps.
        schedule: schedule of the betas: ``linear`` from beta_1 to beta_T (DDPM) or ``cosine`` (Nichol and Dhariwal
            2021, eq. 17).
        beta_1: the first beta of the linear schedule.
        beta_T: the last beta of the linear schedule; for another T than 1000 scale both by 1000 / T.
        parametrization: meaning of the network's output: ``eps`` (the paper), ``x0``, ``mean`` of the reverse step,
            ``v``, ...
        c_noise: encoding of the timestep that the network receives: ``index``, t - 1, or another.
        variance: variance of the reverse steps: ``beta``, ``beta_tilde`` (both the paper's), or ``learned`` between
            them in log space. ``doctor`` reports a sampler of another variance.
        loss: ``simple`` (L_simple), ``bound`` (the variational bound in bits per dimension: with a fixed variance the
            paper's weighted L) or ``hybrid`` (both; the bound trains the variance alone).
        time_law: law of the training timesteps: ``levels``, all alike, or ``second_moment``, those with larger losses
            more often; held-out losses use all alike.
        sampler: default sampler; null: ancestral sampling on all timesteps with this variance.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.

    Raises:
        UserError: for a name that is not one of these, fewer than 2 timesteps, or a learned variance with
            ``loss: simple``.
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
        """Numbers for the keys left to the data, with the output channels of a learned variance."""
        found = super().resolve_auto(init_args, data, say)
        backbone = (init_args.get("backbone") or {}).get("init_args", {})
        if init_args.get("variance") == "learned" and "out_channels" in backbone and backbone["out_channels"] is None:
            found["backbone.init_args.out_channels"] = 2 * data.data_spec.shape[0]
        return found

    def loss(self, batch: Batch, seed: int) -> Loss:
        """The chosen loss of each datum, at a timestep drawn for each."""
        return self.objective(self.denoiser, batch.x, seed, batch.index, batch.cond, self.grey_levels, batch.eps)

    def loss_given_t(self, batch: Batch, t: Tensor, eps: Tensor) -> Loss:
        """The chosen loss at the grid points nearest to given times ``[B]``, and noise ``[B, ...]``."""
        return self.objective.at(self.denoiser, batch.x, t, eps, batch.cond, self.grey_levels)
