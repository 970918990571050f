"""Samplers, and the table of their short names."""

from lit_diffusion.samplers.ancestral import Ancestral
from lit_diffusion.samplers.base import Move, Predictor, Progress, Run, Sampler, Samples
from lit_diffusion.samplers.churn import ChurnedHeun
from lit_diffusion.samplers.ddim import DDIM
from lit_diffusion.samplers.deis import DEIS, IPNDM
from lit_diffusion.samplers.dpm_solver import (
    DPMSolver1,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    SDEDPMSolverPP2M,
)
from lit_diffusion.samplers.langevin import AnnealedLangevin, Langevin
from lit_diffusion.samplers.ode import Euler, Heun, ProbabilityFlow
from lit_diffusion.samplers.on_process import OnProcess
from lit_diffusion.samplers.sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion
from lit_diffusion.samplers.unipc import UniPC

SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": Ancestral,
    "annealed_langevin": AnnealedLangevin,
    "churned_heun": ChurnedHeun,
    "ddim": DDIM,
    "deis": DEIS,
    "dpm_solver_1": DPMSolver1,
    "dpm_solver_2": DPMSolver2,
    "dpm_solver_3": DPMSolver3,
    "dpmpp_2m": DPMSolverPP2M,
    "dpmpp_2s": DPMSolverPP2S,
    "dpmpp_3m": DPMSolverPP3M,
    "dpmpp_sde_2m": SDEDPMSolverPP2M,
    "euler": Euler,
    "euler_maruyama": EulerMaruyama,
    "heun": Heun,
    "ipndm": IPNDM,
    "langevin": Langevin,
    "ode": ProbabilityFlow,
    "predictor_corrector": PredictorCorrector,
    "reverse_diffusion": ReverseDiffusion,
    "unipc": UniPC,
}
"""Short names for the command line: ``sample --sampler ddim --sampler.steps 20``. :class:`OnProcess`, made of a
sampler and a process, is given by its class."""

__all__ = [
    "DDIM",
    "DEIS",
    "IPNDM",
    "SAMPLERS",
    "Ancestral",
    "AnnealedLangevin",
    "ChurnedHeun",
    "DPMSolver1",
    "DPMSolver2",
    "DPMSolver3",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPP3M",
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
    "SDEDPMSolverPP2M",
    "Sampler",
    "Samples",
    "UniPC",
]
