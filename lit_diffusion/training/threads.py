"""The number of CPU threads that a process computes with.

Sums are split by threads, so the bits of a training depend on their number: it is a key of the run, found once from the
machine (never from its load, which changes every minute), written into config.yaml and kept when the run goes on.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from lit_diffusion.checks.machine import cores
from lit_diffusion.errors import UserError

AT_START = torch.get_num_threads()
"""Torch's default number of threads: the physical cores that it sees, or OMP_NUM_THREADS."""


def suggested(processes: int = 1) -> int:
    """Default number of threads: OMP_NUM_THREADS where it is set, else this process's share of the cores it may use.

    Args:
        processes: number of processes that share the machine.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, min(AT_START, cores()) // processes)


def use(threads: int, key: str = "trainer.threads") -> None:
    """Set the number of threads from now on.

    Raises:
        UserError: if it is not positive.
    """
    if threads < 1:
        raise UserError(f"{key} is {threads}; give a positive number, or null for this machine's ({suggested()})")
    torch.set_num_threads(threads)
    # Lightning's launchers set a number of their own where this is not set.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def local_processes(devices: Any, accelerator: Any) -> int:
    """Number of a run's processes that will share this machine, known before they are started.

    Args:
        devices: the Trainer's argument.
        accelerator: the Trainer's argument.
    """
    for variable in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):  # torchrun's and SLURM's
        given = os.environ.get(variable, "").partition("(")[0]
        if given.isdecimal() and int(given) > 0:
            return int(given)
    if isinstance(devices, list | tuple):
        return max(1, len(devices))
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if str(devices).isdecimal():
        return max(1, int(devices))
    return 1 if accelerator in ("cpu", "mps") else max(1, torch.cuda.device_count())
