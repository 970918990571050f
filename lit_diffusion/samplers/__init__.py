"""Samplers, and the table of their short names."""

from lit_diffusion.samplers.ancestral import Ancestral
from lit_diffusion.samplers.base import Move, Predictor, Progress, Run, Sampler, Samples
from lit_diffusion.samplers.churn import ChurnedHeun
from lit_diffusion.samplers.ddim import DDIM
from lit_diffusion.samplers.langevin import AnnealedLangevin, Langevin
from lit_diffusion.samplers.ode import Euler, Heun, ProbabilityFlow
from lit_diffusion.samplers.on_process import OnProcess
from lit_diffusion.samplers.sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion

SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": Ancestral,
    "annealed_langevin": AnnealedLangevin,
    "churned_heun": ChurnedHeun,
    "ddim": DDIM,
    "euler": Euler,
    "euler_maruyama": EulerMaruyama,
    "heun": Heun,
    "langevin": Langevin,
    "ode": ProbabilityFlow,
    "predictor_corrector": PredictorCorrector,
    "reverse_diffusion": ReverseDiffusion,
}
"""Short names for the command line: ``sample --sampler ddim --sampler.steps 20``. :class:`OnProcess`, made of a
sampler and a process, is given by its class."""

__all__ = [
    "DDIM",
    "SAMPLERS",
    "Ancestral",
    "AnnealedLangevin",
    "ChurnedHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "Move",
    "OnProcess",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "Progress",
    "ReverseDiffusion",
    "Run",
    "Sampler",
    "Samples",
]
