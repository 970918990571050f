"""A network as a denoiser: backbone, process and parametrization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers.base import Denoiser, InterpolatedVariance, Prediction
from lit_diffusion.denoisers.parametrizations import C_NOISE, PARAMETRIZATIONS, CNoise, Parametrization
from lit_diffusion.errors import UserError, require_choice
from lit_diffusion.processes import Process, expand_like

if TYPE_CHECKING:  # Denoisers and samplers do without the networks' own modules.
    from lit_diffusion.backbones.base import Backbone

CIn = Literal["none", "unit_variance"]


class NetworkDenoiser(Denoiser):
    r"""A backbone, a process and a parametrization, the meaning of the backbone's output.

    .. math::  F_\theta(c_{in} x_t,\, c_{noise},\, cond) = u\, x_0 + v\, \epsilon
               \quad\Longleftrightarrow\quad x_0 = c_{skip}\, x_t + c_{out}\, F_\theta

    (in the notation of Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 7.) Only the backbone runs under
    autocast: the coefficients are float64, the views and everything after them have the state's own type.

    Args:
        backbone: the network.
        process: the forward process.
        parametrization: the meaning of the network's output, a row of :data:`PARAMETRIZATIONS`.
        c_noise: the encoding of the noise level that the network receives, a row of :data:`C_NOISE`.
        c_in: ``none`` leaves x_t as it is; ``unit_variance`` divides it by ``sqrt(alpha^2 sigma_data^2 +
            sigma^2)``, which trains better where sigma is large (always on for ``edm``).
        sigma_data: standard deviation of the normalized data, for ``edm`` and ``unit_variance``.
        learned_variance: if true, the second half of the network's output channels is the reverse variance, see
            :class:`~lit_diffusion.denoisers.InterpolatedVariance`.

    Raises:
        UserError: for a name that is not in the tables, one that needs a grid on a process in continuous time or is
            undefined where the process has no signal left, and a network with the wrong number of output channels.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: Process,
        parametrization: Parametrization,
        c_noise: CNoise,
        c_in: CIn = "none",
        sigma_data: float = 0.5,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        require_choice("", "parametrization", parametrization, PARAMETRIZATIONS)
        require_choice("", "c_noise", c_noise, C_NOISE)
        require_choice("", "c_in", c_in, get_args(CIn))
        self.backbone = backbone
        self.process = process
        self.parametrization = parametrization
        self.c_noise = c_noise
        self.unit_variance = c_in == "unit_variance" or parametrization == "edm"
        self.sigma_data = sigma_data
        self.learned_variance = learned_variance
        self.on_grid_only = backbone.level_indexed
        if learned_variance or backbone.out_channels is not None:
            channels = backbone.data_shape[0] * (2 if learned_variance else 1)
            if backbone.out_channels != channels:
                raise UserError(
                    f"the backbone has out_channels {backbone.out_channels}; data of {backbone.data_shape[0]} channels "
                    f"with{'' if learned_variance else 'out'} a learned variance need out_channels: {channels}"
                )
        # An index or a step below needs a grid: fail now, not in the first step.
        end = process.coefficients(torch.tensor([process.t_max], dtype=torch.float64))
        u, v = PARAMETRIZATIONS[parametrization](end, process, sigma_data)
        conditioning = C_NOISE[c_noise](process, end)
        if float(end.alpha) == 0.0:
            _require_meaning(parametrization, float(end.alpha * v - end.sigma * u) != 0.0, c_noise, float(conditioning))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """See :meth:`Denoiser.forward`."""
        coefficients = self.process.coefficients(t)
        u, v = PARAMETRIZATIONS[self.parametrization](coefficients, self.process, self.sigma_data)
        x_in = x_t
        if self.unit_variance:
            scale = torch.rsqrt((coefficients.alpha * self.sigma_data) ** 2 + coefficients.sigma**2)
            x_in = expand_like(scale, x_t) * x_t
        conditioning = C_NOISE[self.c_noise](self.process, coefficients).to(torch.float32)
        raw = self.backbone.evaluate(x_in, conditioning, cond)
        variance = None
        if self.learned_variance:
            raw, output = raw.chunk(2, dim=1)
            variance = InterpolatedVariance(0.5 * (output.to(x_t.dtype) + 1.0))
        return Prediction(x_t, raw, coefficients, u, v, reverse_log_variance=variance)


def _require_meaning(parametrization: str, says_x0: bool, c_noise: str, value: float) -> None:
    """Refuse names that are undefined at the largest time of a process with alpha 0 there."""
    if not says_x0:
        raise UserError(
            f"parametrization {parametrization!r} does not determine the data where alpha is 0, at this process's "
            f"largest time: choose velocity, x0, v or edm, or set the process's t_max below 1"
        )
    if not math.isfinite(value):
        raise UserError(
            f"c_noise {c_noise!r} is infinite where alpha is 0, at this process's largest time: choose time or "
            f"time_999, or set the process's t_max below 1"
        )
