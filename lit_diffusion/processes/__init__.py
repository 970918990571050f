"""Forward noising processes and their coefficients at given times."""

from lit_diffusion.processes.base import LOG_2PI, Coefficients, LogProcess, Process, Transition, expand_like
from lit_diffusion.processes.discrete import Betas, cosine_betas, linear_betas
from lit_diffusion.processes.flow import Flow
from lit_diffusion.processes.power import PowerVE
from lit_diffusion.processes.ve import VE
from lit_diffusion.processes.vp import VP, SubVP

__all__ = [
    "LOG_2PI",
    "VE",
    "VP",
    "Betas",
    "Coefficients",
    "Flow",
    "LogProcess",
    "PowerVE",
    "Process",
    "SubVP",
    "Transition",
    "cosine_betas",
    "expand_like",
    "linear_betas",
]
