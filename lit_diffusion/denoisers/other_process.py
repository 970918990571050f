"""A denoiser read on another process than its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_diffusion.conditions import Condition
from lit_diffusion.denoisers.base import Denoiser, Prediction, WrappedDenoiser
from lit_diffusion.processes import Process, expand_like


class OtherProcess(WrappedDenoiser):
    r"""A denoiser read on another process: at the time of its own that has the same noise-to-signal ratio.

    .. math::  \frac{\sigma'(t')}{\alpha'(t')} = \frac{\sigma(t)}{\alpha(t)}, \qquad
               x'_{t'} = \frac{\sigma'(t')}{\sigma(t)}\, x_t

    have one clean datum and one noise, so what is said of the one is true of the other (Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, section 2: any schedule and scaling goes with any network).

    Args:
        denoiser: the one inside.
        process: on which it is read.
    """

    process: Any = property(lambda wrapped: wrapped.read_on)

    def __init__(self, denoiser: Denoiser, process: Process) -> None:
        super().__init__(denoiser)
        self.read_on = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, began: Tensor | None = None) -> Prediction:
        """See :meth:`Denoiser.forward`."""
        coefficients, own = self.process.coefficients(t), self._own_time(t)
        # Of sigma, not of alpha: that may be 0 on both.
        scale = self.denoiser.process.sigma(own) / coefficients.sigma
        began = None if began is None else self._own_time(began)
        found = self.denoiser(expand_like(scale, x_t) * x_t, own, cond, began)
        return replace(found, x_t=x_t, coefficients=coefficients)

    def _own_time(self, t: Tensor) -> Tensor:
        own = self.denoiser.process
        return own.t_at_log_snr(self.process.log_snr(t)).clamp(own.t_min, own.t_max)
