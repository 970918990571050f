"""How many threads one process computes with, and how they wait for each other.

Sums are split by threads, so the bits of a training depend on their number: it is a key of the run, found once from the
machine (never from its load, which is another every minute), written into config.yaml and kept when the run goes on.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from lit_diffusion.checks.machine import cores
from lit_diffusion.errors import UserError

AT_START = torch.get_num_threads()
"""Torch's own number, before anybody changed it: the physical cores that it sees, or OMP_NUM_THREADS."""


def suggested(processes: int = 1) -> int:
    """This machine's number: OMP_NUM_THREADS where it is given, else this process's share of the cores it may use.

    Args:
        processes: that share the machine.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return max(1, min(AT_START, cores()) // processes)


def use(threads: int, key: str = "trainer.threads") -> None:
    """Compute with so many from now on.

    Raises:
        UserError: if that is no number of threads.
    """
    if threads < 1:
        raise UserError(f"{key} is {threads}; give a positive number, or null for this machine's ({suggested()})")
    torch.set_num_threads(threads)
    # Lightning's launchers set a number of their own where this is not said.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def local_processes(devices: Any, accelerator: Any) -> int:
    """How many processes of one run share this machine, before they are started.

    Args:
        devices: as the Trainer takes them.
        accelerator: the same.
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
