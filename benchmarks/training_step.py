"""What the framework costs: a training step of ours beside the same step in a bare PyTorch loop, in one process.

    python benchmarks/training_step.py            # on the CPU: the digits run, and the 35.7 million U-Net of CIFAR-10
    python benchmarks/training_step.py --device cuda --diffusers

The bare loop has the same backbone, data, batch, optimizer, clipping, warm-up and averages, and nothing else: no keyed
noise, no checks, no telemetry, no progress bar. Blocks of steps of the two take turns inside one training, so that
whatever else the machine does falls on both; printed are the medians over the blocks, and their ratio.

With a GPU, ``--diffusers`` also times diffusers' U-Net of the same shape in the same bare loop, eager and compiled.
All then run in bfloat16 with channels last, ours compiled too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lit_diffusion.cli.lightning_cli import CLI, main
from lit_diffusion.training.trainer import callbacks_of


class Prepared(CLI):
    """All that ``fit`` makes, not yet started."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


NO_PICTURES = ["--samples.count", "0", "--noise_levels.levels", "0", "--eval.metrics", "[]"]


@dataclass(frozen=True)
class Case:
    """A training to time.

    Attributes:
        arguments: of ``fit``.
        warm: steps before the first block.
        steps: of a block.
        blocks: of each of the two.
    """

    arguments: list[str]
    warm: int
    steps: int
    blocks: int


def digits() -> Case:
    """The README's run as it is shipped, without pictures and figures, which are no steps."""
    return Case(["--config", "experiments/ncsn.yaml", *NO_PICTURES], warm=60, steps=20, blocks=15)


def cifar10(folder: Path, batch: int, blocks: int) -> Case:
    """DDPM with the U-Net of 35.7 million parameters on images of CIFAR-10's shape."""
    images = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    arguments = ["--config", "experiments/ddpm.yaml", *NO_PICTURES]
    paper = {"channels": 128, "mult": [1, 2, 2, 2], "blocks": 2, "attention": [16]}
    arguments += ["--model.backbone", json.dumps({"class_path": "UNet", "init_args": paper})]
    arguments += ["--data.source", json.dumps({"class_path": "Npz", "init_args": {"path": str(folder / "images.npz")}})]
    arguments += ["--data.global_batch_size", str(batch)]
    return Case(arguments, warm=3, steps=3, blocks=blocks)


class Values(Dataset[np.ndarray]):
    """A source's values, one by one."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source.value(index)


class BareLoop:
    """The step of a researcher's script.

    Args:
        method: whose backbone, process, optimizer and averages it copies.
        data: its data.
        half_lives: of the averages, in images.
        network: takes the place of the method's backbone.
        dtype: of autocast, None for float32.
    """

    def __init__(self, method: Any, data: Any, half_lives: list[int], network: nn.Module, dtype: Any) -> None:
        self.device = method.device
        self.network = network
        self.optimizer = method.make_optimizer(network.parameters())
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.clip = method.gradient_clip
        self.warmup = method.warmup[0] or 0
        self.batch = data.global_batch_size
        self.low, self.high = data.data_spec.value_range
        self.num_grey_levels = data.data_spec.num_grey_levels
        self.channels_last = next(method.denoiser.backbone.parameters()).ndim == 4 and method.trainer.channels_last
        self.half_lives = half_lives
        self.averages = [[p.detach().clone() for p in network.parameters()] for _ in half_lives]
        self.seen = 0
        self.dtype = dtype
        denoiser = method.denoiser
        grid = denoiser.process.level(denoiser.process.grid())
        self.alpha, self.sigma = (v.float().to(self.device) for v in (grid.alpha, grid.sigma))
        self.is_ncsn = denoiser.c_noise == "log_sigma"
        self.sigma_data = denoiser.sigma_data
        loader = DataLoader(Values(data.source), batch_size=self.batch, shuffle=True, drop_last=True, pin_memory=False)
        self.batches = self._endless(loader)

    @staticmethod
    def _endless(loader: DataLoader[Any]) -> Iterator[Tensor]:
        while True:
            yield from loader

    def loss(self, x: Tensor) -> Tensor:
        """NCSN's with sigma times the score and a unit-variance input, or DDPM's simple one."""
        level = torch.randint(len(self.sigma), (len(x),), device=self.device)
        alpha, sigma = self.alpha[level].view(-1, 1, 1, 1), self.sigma[level].view(-1, 1, 1, 1)
        eps = torch.randn_like(x)
        noisy = alpha * x + sigma * eps
        told = torch.log(self.sigma[level]) if self.is_ncsn else level.float()
        if self.is_ncsn:
            noisy = noisy * torch.rsqrt(self.sigma_data**2 + sigma**2)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            out = self.network(noisy, told)
        out = out.float()
        if self.is_ncsn:
            return 0.5 * (out + eps).square().flatten(1).sum(1).mean()
        return F.mse_loss(out, eps)

    def step(self) -> None:
        """Data, loss, backward, clip, optimize, average."""
        x = (
            next(self.batches)
            .to(self.device)
            .float()
            .div_(self.num_grey_levels - 1)
            .mul_(self.high - self.low)
            .add_(self.low)
        )
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x).backward()
        parameters = list(self.network.parameters())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.seen += self.batch
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (min(1.0, self.seen / self.warmup) if self.warmup else 1.0)
        self.optimizer.step()
        for half_life, average in zip(self.half_lives, self.averages, strict=True):
            decay = 0.5 ** (self.batch / min(half_life, 0.1 * self.seen))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)


def synchronised(device: torch.device) -> float:
    """The time when all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TakingTurns(pl.Callback):
    """After every block of the training's own steps, a block of each other loop's."""

    def __init__(self, case: Case, others: Callable[[pl.Trainer, Any], dict[str, BareLoop]]) -> None:
        self.case = case
        self.make_others = others
        self.others: dict[str, BareLoop] = {}
        self.seconds: dict[str, list[float]] = {"ours": []}
        self._began = 0.0
        self._done = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Count; at a block's end let the others have theirs."""
        self._done += 1
        if self._done == self.case.warm:
            self.others = self.make_others(trainer, pl_module)
            for loop in self.others.values():
                for _ in range(self.case.warm):
                    loop.step()
            self._begin(pl_module.device)
        elif self._done > self.case.warm and (self._done - self.case.warm) % self.case.steps == 0:
            self.seconds["ours"].append((synchronised(pl_module.device) - self._began) / self.case.steps)
            for name, loop in self.others.items():
                began = synchronised(pl_module.device)
                for _ in range(self.case.steps):
                    loop.step()
                taken = (synchronised(pl_module.device) - began) / self.case.steps
                self.seconds.setdefault(name, []).append(taken)
            if len(self.seconds["ours"]) >= self.case.blocks:
                trainer.should_stop = True
            self._begin(pl_module.device)

    def _begin(self, device: torch.device) -> None:
        self._began = synchronised(device)


class DiffusersUNet(nn.Module):
    """diffusers' U-Net of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
        up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
        self.network = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Of the index of the level."""
        return self.network(x, c_noise).sample


def timed(case: Case, device: str, more: list[str], diffusers: bool, compiled: bool) -> dict[str, list[float]]:
    """Seconds of a step, block by block, of ours and of the others."""

    def others(trainer: pl.Trainer, method: Any) -> dict[str, BareLoop]:
        half_lives = list(trainer.callbacks[0].half_lives) if hasattr(trainer.callbacks[0], "half_lives") else []
        for callback in callbacks_of(trainer):
            half_lives = getattr(callback, "half_lives", half_lives)
        dtype = method.denoiser.backbone.autocast_dtype
        data = trainer.datamodule

        def loop(network: nn.Module, compile: bool) -> BareLoop:
            network = network.to(method.device)
            if trainer.channels_last:
                network = network.to(memory_format=torch.channels_last)
            if compile:
                network.compile(dynamic=False)
            return BareLoop(method, data, half_lives, network, dtype)

        mine = copy.deepcopy(method.denoiser.backbone)
        mine._compiled_call_impl = None
        found = {"bare loop": loop(mine, compiled)}
        if diffusers:
            found["diffusers"] = loop(DiffusersUNet(), False)
            found["diffusers, compiled"] = loop(DiffusersUNet(), True)
        return found

    turns = TakingTurns(case, others)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["fit", *case.arguments, "--run_dir", f"{folder}/run", "--wandb.mode", "disabled"]
        arguments += [
            "--trainer.accelerator",
            "gpu" if device == "cuda" else "cpu",
            "--checkpoint.every_n_images",
            "null",
        ]
        arguments += ["--trainer.max_images", "1_000_000_000", "--trainer.limit_val_batches", "0", *more]
        cli = main(arguments, Prepared)
        callbacks_of(cli.trainer).append(turns)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return turns.seconds


def report(name: str, seconds: dict[str, list[float]]) -> None:
    """Medians and ratios, as a table."""
    ours = statistics.median(seconds["ours"])
    print(f"\n{name}\n\n| | step, median of {len(seconds['ours'])} blocks | ours takes |\n|---|---|---|")
    for other, values in seconds.items():
        median = statistics.median(values)
        print(f"| {other} | {1000 * median:.2f} ms | {'' if other == 'ours' else f'{ours / median:.3f} of it'} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("digits", "cifar10"), default=None)
    parser.add_argument("--batch", type=int, default=None, help="Of the large U-Net; default: 8, on a GPU 128.")
    parser.add_argument("--diffusers", action="store_true", help="Beside diffusers' U-Net.")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)
    if options.only in (None, "digits"):
        report("NCSN on the digits, 0.7 million parameters", timed(digits(), options.device, [], False, False))
    if options.only in (None, "cifar10"):
        with tempfile.TemporaryDirectory() as folder:
            batch = options.batch or (128 if on_gpu else 8)
            case = cifar10(Path(folder), batch, blocks=15 if on_gpu else 10)
            more = ["--trainer.precision", "bf16-mixed", "--trainer.compile", "true"] if on_gpu else []
            found = timed(case, options.device, more, options.diffusers, on_gpu)
            report(f"DDPM, 35.7 million parameters, batch {batch}{', bf16, compiled' if on_gpu else ''}", found)
