"""One file per paper."""

from lit_diffusion.methods.base import Method
from lit_diffusion.methods.dsm import DSM
from lit_diffusion.methods.ncsn import NCSN
from lit_diffusion.methods.ncsnv2 import NCSNv2

__all__ = ["DSM", "NCSN", "Method", "NCSNv2"]
