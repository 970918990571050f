"""Precision and recall of 10,000 samples against 10,000 data in 2,048 dimensions, beside torch-fidelity.

    python benchmarks/precision_recall.py

Each runs in a process of its own, in turn, several times; prints the median times, their ratio, and the largest memory
above the features themselves. Both must find the same shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

COUNT, DIMENSION = 10_000, 2_048


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and data: Gaussians of low effective dimension, as features are, that overlap in part."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(24, DIMENSION, generator=generator) / 24**0.5
    clouds = []
    for scale in (0.9, 1.0):
        low = scale * torch.randn(COUNT, 24, generator=generator)
        clouds.append(low @ basis + 0.02 * torch.randn(COUNT, DIMENSION, generator=generator))
    return clouds[0], clouds[1]


def ours(samples: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """By blocks of rows; density and coverage come with it."""
    from lit_diffusion.metrics.manifolds import compare_manifolds
    from lit_diffusion.metrics.neighbours import Neighbourhood

    found = compare_manifolds(samples, Neighbourhood(real, torch.device("cpu")))
    return float(found["precision"].mean()), float(found["recall"].mean())


def fidelity(samples: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """torch-fidelity's default: whole matrices of distances."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    return calculate_precision_recall_full(samples, real)


def fidelity_in_parts(samples: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """torch-fidelity with ``save_cpu_ram``."""
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(samples, real)


CONTENDERS = {"ours": ours, "torch-fidelity": fidelity, "torch-fidelity, save_cpu_ram": fidelity_in_parts}


def peak_megabytes() -> float:
    """The most that this process has held in memory (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(name: str) -> None:
    """In this process: seconds, megabytes above the features, precision and recall, as JSON."""
    both = features()
    CONTENDERS[name](both[0][:100], both[1][:100])  # imports and libraries are no part of it
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_megabytes()
    began = time.perf_counter()
    precision, recall = CONTENDERS[name](*both)
    seconds = time.perf_counter() - began
    shares = {"precision": round(precision, 6), "recall": round(recall, 6)}
    print(json.dumps({"seconds": seconds, "mb": peak_megabytes() - before, **shares}))


def main() -> None:
    """All contenders, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.repeats):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--measure", name]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shares = {(run["precision"], run["recall"]) for found in runs.values() for run in found}
    print(f"precision and recall: {sorted(shares)}")
    base = statistics.median(run["seconds"] for run in runs["torch-fidelity"])
    for name, found in runs.items():
        seconds, mb = statistics.median(r["seconds"] for r in found), max(r["mb"] for r in found)
        ratio = f"{seconds / base:5.2f} of torch-fidelity's"
        print(f"{name:<30} {seconds:6.1f} s  {ratio}  {mb:6.0f} MB above the features")


if __name__ == "__main__":
    main()
