"""Processes that fork from one which has imported everything: a start takes milliseconds, and not ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["lit_diffusion.cli.lightning_cli", "matplotlib.figure", "sklearn.datasets"])


def begin(log: Path, environment: dict[str, str]) -> None:
    """What a forked process does first: a session, an output, an environment and a number of threads of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)


def _begun(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    begin(log, environment)
    target(*arguments)


def start(target: Callable[..., Any], *arguments: Any, log: Path, environment: dict[str, str] | None = None) -> Any:
    """A process that calls a function of a module; what it says is in ``log``."""
    own = {"LIT_DIFFUSION_CACHE": os.environ["LIT_DIFFUSION_CACHE"], "OMP_NUM_THREADS": "1", **(environment or {})}
    process = FORKED.Process(target=_begun, args=(target, arguments, log, own))
    process.start()
    return process


def command_line(*arguments: str) -> None:
    """``python -m lit_diffusion`` with arguments, in a process of its own."""
    sys.argv = ["lit_diffusion", *arguments]
    runpy.run_module("lit_diffusion", run_name="__main__", alter_sys=True)


def group(
    size: int, target: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 300.0, **environment: str
) -> None:
    """A call in each of several processes that find each other by what torchrun tells them; all end well."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **environment,
    }
    logs = [folder / f"log-of-{rank}.txt" for rank in range(size)]
    with ExitStack() as started:
        processes = []
        for rank, log in enumerate(logs):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(start(target, *arguments, log=log, environment=own))
            started.callback(processes[-1].kill)
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    assert codes == [0] * size, "\n".join(log.read_text(errors="replace") for log in logs)[-4000:]
