"""Mixed precision for the backbone alone.

Lightning's own plugin puts the whole ``training_step`` under autocast, and with it times, schedules, losses and
metrics. Ours leaves that context empty; the denoiser opens autocast around the backbone and nothing else.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lit_diffusion.errors import UserError

PrecisionName = Literal["32-true", "bf16-mixed", "16-mixed"]

_DTYPES: dict[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The backbone's autocast type, None for plain float32.

    Raises:
        UserError: for a precision that is not one of ``32-true``, ``bf16-mixed``, ``16-mixed``.
    """
    if precision not in _DTYPES:
        raise UserError(f"precision is {precision!r}; choose one of {', '.join(get_args(PrecisionName))}")
    return _DTYPES[precision]


def precision_name(dtype: torch.dtype | None) -> str:
    """The inverse of :func:`autocast_dtype`."""
    return next(name for name, found in _DTYPES.items() if found == dtype)


class BackboneMixedPrecision(MixedPrecision):
    """Lightning's mixed precision without its autocast; the scaler is the training step's, see ``TrainedModule``."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Open no autocast: the denoiser opens it around the backbone."""
        yield
