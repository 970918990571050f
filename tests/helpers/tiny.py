"""Tiny methods, data and trainings in Python, without the command line: what several test files build on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.backbones import MLP
from lit_diffusion.backbones.base import Backbone
from lit_diffusion.callbacks import Checkpoint, ProgressBar
from lit_diffusion.conditions import Condition
from lit_diffusion.data import Digits, GaussianMixturePoints
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.methods import DDPM, DSM, NCSN, FlowMatching, ScoreSDE
from lit_diffusion.methods.base import Encoded, Method
from lit_diffusion.objectives import DenoisingScoreMatching, Loss
from lit_diffusion.processes import VE, Process
from lit_diffusion.randomness import SampleNoise
from lit_diffusion.runs.logger import RunLogger
from lit_diffusion.samplers import (
    DDIM,
    DEIS,
    IPNDM,
    Ancestral,
    AnnealedLangevin,
    ChurnedHeun,
    DPMSolver1,
    DPMSolver2,
    DPMSolver3,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Sampler,
    SDEDPMSolverPP2M,
    UniPC,
)
from lit_diffusion.training.datamodule import Batch, DataModule
from lit_diffusion.training.module import TrainedModule
from lit_diffusion.training.trainer import Trainer

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

digits = cache(Digits)

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "NCSN",
        "init_args": {
            "num_levels": 3,
            "sigma_min": 0.1,
            "c_noise": "log_sigma",
            "backbone": {
                "class_path": "UNet",
                "init_args": {"channels": 8, "mult": [1], "blocks": 1, "attention": [], "middle_attention": False},
            },
        },
    },
    "data": {"source": {"class_path": "Digits"}, "global_batch_size": 32, "held_out_fraction": 0.02},
    "trainer": {"max_images": 64, "accelerator": "cpu", "devices": 1},
    "samples": {"count": 0},
    "noise_levels": {"num_levels": 0},
    "wandb": {"mode": "disabled"},
}
"""For the command line; without pictures, of which that of the levels takes longer than the training."""

TINY = {
    "model": {
        "class_path": "NCSN",
        "init_args": {
            "sigma_max": 2.0,
            "sigma_min": 0.1,
            "num_levels": 3,
            "parametrization": "score",
            "c_noise": "log_sigma",
            "backbone": {
                "class_path": "UNet",
                "init_args": {"channels": 8, "mult": [1], "blocks": 1, "attention": [], "middle_attention": False},
            },
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "sampler": {
                "class_path": "AnnealedLangevin",
                "init_args": {"steps_per_level": 2, "eta": 0.001, "denoise": True},
            },
        },
    },
    "data": {"source": {"class_path": "Digits"}, "global_batch_size": 32, "held_out_fraction": 0.02},
    "trainer": {"max_images": 128, "accelerator": "cpu", "devices": 1},
    "ema": {"half_lives_images": [500, 2000]},
    "samples": {"count": 4, "film_columns": 2},
    "noise_levels": {"num_levels": 0},
    "wandb": {"mode": "disabled"},
}
"""A run of seconds through the command line; without the picture of the levels, that takes longer than the rest."""
LEVELS = {"noise_levels": {"num_levels": 2, "images": 8}}
"""That picture."""

WALKS: dict[str, Sampler] = {
    "ancestral": Ancestral(steps=3),
    "ancestral, beta_tilde": Ancestral(steps=3, variance="beta_tilde", spacing="quadratic"),
    "churned_heun": ChurnedHeun(steps=2, large_steps="allow"),
    "ddim": DDIM(steps=3),
    "ddim, noisy": DDIM(steps=3, eta=1.0),
    "deis": DEIS(steps=2),
    "dpm_solver_1": DPMSolver1(steps=2),
    "dpm_solver_2": DPMSolver2(steps=2, large_steps="allow"),
    "dpm_solver_3": DPMSolver3(steps=2, large_steps="allow"),
    "dpmpp_2m": DPMSolverPP2M(steps=2),
    "dpmpp_2s": DPMSolverPP2S(steps=2),
    "dpmpp_3m": DPMSolverPP3M(steps=2),
    "dpmpp_sde_2m": SDEDPMSolverPP2M(steps=2),
    "euler": Euler(steps=2, large_steps="allow"),
    "heun": Heun(steps=2, large_steps="allow"),
    "euler_maruyama": EulerMaruyama(steps=2, large_steps="allow"),
    "reverse_diffusion": ReverseDiffusion(steps=2, large_steps="allow"),
    "ipndm": IPNDM(steps=2),
    "unipc": UniPC(steps=2),
    "predictor_corrector": PredictorCorrector(ReverseDiffusion(steps=2, large_steps="allow")),
    "ode": ProbabilityFlow(1e-2, 1e-2),
    "annealed_langevin": AnnealedLangevin(2, eta=1e-3, num_levels=3),
}
"""All samplers of a model with several levels and a network that says no energy, in few steps."""


class Convolutions(Backbone):
    """Two convolutions, conditioned on c_noise by a scale of the features; it records its inputs."""

    def __init__(
        self,
        channels: int = 4,
        dropout: float = 0.0,
        num_classes: int | None = None,
        out_channels: int = 1,
        data_shape: tuple[int, int, int] = (1, 8, 8),
    ) -> None:
        super().__init__()
        self.data_shape = data_shape
        self.num_classes = num_classes
        self.out_channels = out_channels
        self.first = nn.Conv2d(data_shape[0], channels, 3, padding=1)
        self.second = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, channels)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seven", torch.tensor([7919]))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        self.seen.append(tuple(x.shape))
        h = self.first(x) + c_noise.view(-1, 1, 1, 1)
        if self.classes is not None:
            h = h + self.classes(cond.label)[:, :, None, None]
        return self.second(self.dropout(nn.functional.silu(h)))


def ncsn(network: dict[str, Any] | None = None, seed: int = 0, **keys: Any) -> NCSN:
    """A network on the digits; the same weights for the same seed."""
    torch.manual_seed(seed)
    keys = {
        "sigma_max": 2.0,
        "sigma_min": 0.1,
        "num_levels": 3,
        "parametrization": "score",
        "c_noise": "log_sigma",
        "sampler": AnnealedLangevin(steps_per_level=2, eta=1e-3, denoise=True),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        **keys,
    }
    return NCSN(Convolutions(**(network or {})), **keys)


def ddpm(network: dict[str, Any] | None = None, seed: int = 0, make: type[DDPM] = DDPM, **keys: Any) -> DDPM:
    """A diffusion of eight levels on the digits; twice the output channels where the variance is learned."""
    torch.manual_seed(seed)
    network = {"out_channels": 2 if keys.get("variance") == "learned" else 1, **(network or {})}
    keys = {
        "num_timesteps": 8,
        "beta_1": 0.01,
        "beta_T": 0.6,
        "c_noise": "time",
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        **keys,
    }
    return make(Convolutions(**network), **keys)


def score_sde(process: Process, network: dict[str, Any] | None = None, seed: int = 0, **keys: Any) -> ScoreSDE:
    """A network on the digits for all times of a process, sampled in four steps."""
    torch.manual_seed(seed)
    keys = {
        "c_noise": "time",
        "sampler": PredictorCorrector(ReverseDiffusion(steps=4, large_steps="allow")),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        **keys,
    }
    return ScoreSDE(Convolutions(**(network or {})), process, **keys)


def flow_matching(network: dict[str, Any] | None = None, seed: int = 0, **keys: Any) -> FlowMatching:
    """A network on the digits, sampled in four steps."""
    torch.manual_seed(seed)
    keys = {
        "c_noise": "time",
        "sampler": Heun(steps=4),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        **keys,
    }
    return FlowMatching(Convolutions(**(network or {})), **keys)


def pairs_noted(method: Method) -> Method:
    """A method that keeps the number and the paired noise of each datum, as its losses are given them, in ``pairs``."""
    loss, method.pairs = method.loss, {}

    def noted(batch: Batch, seed: int) -> Loss:
        if method.training:
            method.pairs |= dict(zip(batch.index.tolist(), batch.eps, strict=True))
        return loss(batch, seed)

    method.loss = noted
    return method


def toy_dsm(**keys: Any) -> DSM:
    """A network on points in the plane."""
    torch.manual_seed(0)
    keys = {"sigma": 0.5, "sampler": Langevin(steps=3, eta=0.1), **keys}
    return DSM(MLP((2,), width=16, depth=1, time_embedding="none"), **keys)


class TwoNetworks(Method):
    """A denoiser of latents and the autoencoder that makes them, with an optimizer each and one forward pass for both.

    The autoencoder's loss has the denoiser's inside, as a latent score-based model's has; it keeps a number of each
    datum, which :meth:`after_step` writes into a buffer in the batch's order.
    """

    weight = 0.01
    """Of the denoiser's loss inside the autoencoder's."""

    def __init__(self, **training: Any) -> None:
        denoiser = NetworkDenoiser(Convolutions(), VE(0.1, 2.0, 3), "score", "log_sigma")
        sampler = AnnealedLangevin(steps_per_level=2, eta=1e-3, denoise=True)
        super().__init__(denoiser, DenoisingScoreMatching(time_law="levels"), sampler, **training)
        self.autoencoder = nn.ModuleDict({"encoder": nn.Conv2d(1, 1, 3, padding=1), "decoder": nn.Conv2d(1, 1, 1)})
        self.register_buffer("remembered", torch.zeros(32))

    def trained(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser, "autoencoder": self.autoencoder}

    def encode(self, x: Tensor, noise: SampleNoise) -> Encoded:
        z = self.autoencoder["encoder"](x) + 0.1 * noise.normal()
        return Encoded(z, 0.5 * z.flatten(1).square().mean(1))

    def decode(self, z: Tensor, noise: SampleNoise, cond: Condition | None) -> Tensor:
        return self.autoencoder["decoder"](z) + 0.01 * noise.normal()

    def losses(self, batch: Batch, seed: int) -> dict[str, Loss]:
        latents = self.encoded(batch, seed)
        denoising = self.loss(latents, seed)
        back = self.autoencoder["decoder"](latents.x)
        error = (back - batch.x).flatten(1).square().sum(1)
        size = latents.x.flatten(1).square().mean(1)
        total = error + size + self.weight * denoising.per_sample
        terms = {"reconstruction": error, "size": size}
        return {"denoiser": denoising, "autoencoder": Loss(total, terms=terms, kept={"size": size})}

    def loss(self, batch: Batch, seed: int) -> Loss:
        return self.objective(self.denoiser, batch.x, seed, batch.index, batch.cond)

    def after_step(self, kept: Mapping[str, Tensor]) -> None:
        self.remembered.copy_(kept["size"])


def two_networks(seed: int = 0, **keys: Any) -> TwoNetworks:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    keys = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-3), **keys}
    return TwoNetworks(**keys)


def digits_data(batch: int = 32, seed: int = 0, **keys: Any) -> DataModule:
    """The digits, 36 of them held out."""
    data = DataModule(digits(), batch, held_out_fraction=0.02, **keys)
    data.seed = seed
    return data


def points_data(batch: int = 32, size: int = 2000, **keys: Any) -> DataModule:
    """The two modes in the plane."""
    return DataModule(GaussianMixturePoints(size=size), batch, **keys)


def run_logger(folder: Path, method: TrainedModule, **keys: Any) -> RunLogger:
    """A run's logger on a method's clock, in ``folder/run``."""
    logger = RunLogger("tiny", run_dir=folder / "run", **keys)
    logger.clock = method.clock
    return logger


def trainer(folder: Path, images: int | None = 96, callbacks: Any = (), logger: Any = False, **keys: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        keys["enable_checkpointing"] = False
    return Trainer(
        max_images=images,
        accelerator="cpu",
        devices=keys.pop("devices", 1),
        callbacks=list(callbacks),
        logger=logger,
        default_root_dir=folder,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=keys.pop("limit_val_batches", 0),
        **keys,
    )


def fit(method: TrainedModule, data: DataModule, folder: Path, images: int | None = 96, **keys: Any) -> Trainer:
    """Train; returns the Trainer."""
    ckpt_path = keys.pop("ckpt_path", None)
    made = trainer(folder, images, **keys)
    made.fit(method, datamodule=data, ckpt_path=ckpt_path)
    return made


def weights(method: TrainedModule) -> dict[str, Tensor]:
    """A copy of a module's parameters."""
    return {name: p.detach().clone() for name, p in method.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are bit for bit the same."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["event"] == kind]
