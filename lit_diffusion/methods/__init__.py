"""Methods, one file per paper."""

from lit_diffusion.methods.base import Method
from lit_diffusion.methods.ddim import DDIM
from lit_diffusion.methods.ddpm import DDPM
from lit_diffusion.methods.dsm import DSM
from lit_diffusion.methods.edm import EDM
from lit_diffusion.methods.flow_matching import FlowMatching
from lit_diffusion.methods.ncsn import NCSN
from lit_diffusion.methods.ncsnv2 import NCSNv2
from lit_diffusion.methods.score_sde import ScoreSDE

__all__ = ["DDIM", "DDPM", "DSM", "EDM", "NCSN", "FlowMatching", "Method", "NCSNv2", "ScoreSDE"]
