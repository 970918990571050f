"""The straight line between data and noise of rectified flow and flow matching."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.processes.base import Process


class Flow(Process):
    r"""The straight line ``x_t = (1 - t) x_0 + t eps``: ``alpha = 1 - t``, ``sigma = t``.

    The velocity of its probability-flow ODE is ``E[eps - x_0 | x_t]`` (Liu et al. 2023, "Flow straight and fast",
    https://arxiv.org/abs/2209.03003; Lipman et al. 2023, "Flow matching for generative modeling",
    https://arxiv.org/abs/2210.02747, whose time runs the other way). As an SDE it has ``f = -1 / (1 - t)`` and
    ``g^2 = 2 t / (1 - t)``, infinite at t = 1, where nothing of the data is left: there a network must predict the
    velocity, x0, v or edm, since eps alone does not determine x_0.

    Args:
        t_min: the smallest time of training and of likelihoods.
        t_min_sampling: the smallest time that SDE and ODE samplers visit.
        t_max: the largest time of training, from which sampling starts.
    """

    def __init__(self, t_min: float = 1e-5, t_min_sampling: float = 1e-5, t_max: float = 1.0) -> None:
        super().__init__(None, t_min, t_min_sampling, t_max)

    @property
    def prior_std(self) -> float:
        """``sigma(t_max)``, that is t_max."""
        return self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        """``alpha = 1 - t``."""
        return 1.0 - t.to(torch.float64)

    def dalpha(self, t: Tensor) -> Tensor:
        """``d alpha / dt = -1``."""
        return torch.full_like(t, -1.0, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """``sigma = t``."""
        return t.to(torch.float64)

    def dsigma(self, t: Tensor) -> Tensor:
        """``d sigma / dt = 1``."""
        return torch.ones_like(t, dtype=torch.float64)

    def t_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t with ``log_snr = 2 log((1 - t) / t)``."""
        return torch.sigmoid(-0.5 * log_snr.to(torch.float64))
