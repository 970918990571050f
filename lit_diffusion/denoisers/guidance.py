"""Guidance: the denoiser that samples are drawn with, made of the one that was trained."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lit_diffusion.denoisers.base import Denoiser


class Guidance(ABC):
    """A configuration that makes a denoiser of denoisers, on the same process.

    A subclass keeps every argument of its constructor as an attribute of its name, as samplers do: protocols say them.
    """

    @abstractmethod
    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The guided denoiser, a :class:`~lit_diffusion.denoisers.WrappedDenoiser` around the given one.

        Raises:
            UserError: for a denoiser that cannot be guided so.
        """
