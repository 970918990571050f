"""Checks of the machine: cores, GPUs, shared memory, disk, folders, limits."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_diffusion.checks import Finding, first_line, in_bytes, note, ok, problem, warning
from lit_diffusion.files import cache_folder

SHARED_MEMORY = Path("/dev/shm")
CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
OWN_GROUPS = Path("/proc/self/cgroup")
DRIVER = Path("/proc/driver/nvidia/version")
LITTLE_SHARED = 10**9
LITTLE_DISK = 10**9
FEW_FILES = 1024


# ---- processors --------------------------------------------------------------------------------------------------


def cores() -> int:
    """Number of cores that this process may use; fewer than the machine's in a container or a job with a quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min([found, *map(round, quotas())]))


def quotas() -> Iterator[float]:
    """Yield the core quotas of this process's control groups and their parents, of cgroups version 2 and 1."""
    own = {""}  # In a container the visible root is its own group.
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            path = Path(line.split(":", 2)[-1].lstrip("/"))
            own |= {str(each) for each in (path, *path.parents)}
    for group in own:
        with suppress(OSError, ValueError):
            quota, period = (CPU_QUOTA.parent / group / CPU_QUOTA.name).read_text().split()
            yield int(quota) / int(period)  # "max" is no number: no quota.
        with suppress(OSError, ValueError):
            folder = CPU_QUOTA.parent / "cpu" / group
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)


def cpu_flags() -> set[str]:
    """Feature flags of the CPU; empty where the system does not show them."""
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return set(values.split())
    return set()


def fast_bf16_on_cpu() -> bool | None:
    """True where the CPU multiplies bfloat16 in hardware, false where it emulates it, slowly; None: not known."""
    flags = cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else None


def processor() -> Iterator[Finding]:
    """Check the CPU's cores against the threads that a run would use, and its bfloat16."""
    from lit_diffusion.training.threads import suggested

    threads, mine = suggested(), cores()
    given = os.environ.get("OMP_NUM_THREADS")
    said = f"{mine} CPU cores, threads of torch: {threads} (OMP_NUM_THREADS {given or 'not set'})"
    if threads > mine:
        yield warning(f"{said}: they wait for each other", f"export OMP_NUM_THREADS={mine}")
    else:
        yield ok(said)
    fast = fast_bf16_on_cpu()
    if fast:
        yield ok("the CPU has bfloat16 (AVX512-BF16, AMX or ARM's)")
    elif fast is None:
        yield note("whether the CPU has bfloat16 cannot be seen here")
    else:
        yield note("the CPU has no bfloat16 of its own", "on it precision 32-true is faster than bf16-mixed")


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of how threads wait for each other."""


def load() -> Iterator[Finding]:
    """Check the cores' load by other programs, a quota, and how threads wait for each other."""
    mine, busy = cores(), os.getloadavg()[0]
    limit = min(quotas(), default=None)
    said = f"{busy:.1f} programs run or wait for a core, of {mine}"
    if limit is not None:
        said += f" (a quota of {limit:g} cores)"
    waiting = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ) or "libraries' own"
    active = os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "active"
    if busy > 0.5 * mine:
        yield note(said, "a step takes its share longer; the number of threads is never chosen by this")
    else:
        yield ok(said)
    if active or os.environ.get("GOMP_SPINCOUNT", "").strip().lower().startswith("inf"):
        yield warning(
            f"threads wait for each other by spinning ({waiting}): beside another program a step takes far longer",
            f"unset {' '.join(name for name in WAITING if name in os.environ)}, and they wait passively",
        )
    else:
        yield ok(f"how threads wait for each other: {waiting}")


def accelerators() -> Iterator[Finding]:
    """Check the GPUs, and for a driver whose GPUs torch does not see."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield gpu(torch, index)
        return
    if torch.backends.mps.is_available():
        yield ok("Apple GPU (MPS); precision 32-true is what was tried on it")
        return
    driver = DRIVER.exists() or shutil.which("nvidia-smi") is not None
    if driver and torch.version.cuda is None:
        yield warning(
            f"there is an NVIDIA driver, but torch {torch.__version__} is built for the CPU alone",
            "install a CUDA build, see pytorch.org",
        )
    elif driver:
        yield warning(
            f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old for this CUDA",
        )
    else:
        yield note("no GPU and no driver of one: training is on the CPU")


def gpu(torch: Any, index: int) -> Finding:
    """Check one GPU: name, memory, and the precisions that it is fast in."""
    properties = torch.cuda.get_device_properties(index)
    version = (properties.major, properties.minor)
    fast = [name for name, least in (("bf16-mixed", (8, 0)), ("16-mixed", (7, 0))) if version >= least]
    said = f"GPU {index}: {properties.name}, {in_bytes(properties.total_memory)}, capability {version[0]}.{version[1]}"
    try:
        free, total = torch.cuda.mem_get_info(index)
    except Exception as error:  # A GPU held by another program alone, or fallen off the bus.
        return problem(
            f"{said} cannot be used ({first_line(error)})", "see nvidia-smi; leave it out by CUDA_VISIBLE_DEVICES"
        )
    if free < 0.5 * total:
        return warning(f"{said}: only {in_bytes(free)} are free", "another program uses it, see nvidia-smi")
    return ok(f"{said}, {in_bytes(free)} free; fast in {', '.join([*fast, '32-true'])}")


# ---- memory, disk, files -----------------------------------------------------------------------------------------


def shared_memory(workers: int | None = None) -> Iterator[Finding]:
    """Check the room in /dev/shm, through which data workers pass their batches.

    Args:
        workers: the recipe's number of data workers; None where there is no recipe.
    """
    if not SHARED_MEMORY.is_dir():
        return  # macOS has none.
    size = shutil.disk_usage(SHARED_MEMORY).total
    said = f"{SHARED_MEMORY} has {in_bytes(size)}"
    fix = "give a container --shm-size=8g, or set data.num_workers 0"
    if size >= LITTLE_SHARED:
        yield ok(said)
    elif workers:
        yield warning(f"{said}, and {workers} data workers pass batches through it: a bus error may end them", fix)
    else:
        yield note(f"{said}: too little for data workers", fix)


def standing(path: Path) -> Path:
    """The deepest part of a path that exists."""
    path = Path(os.path.abspath(path.expanduser()))
    return next(each for each in (path, *path.parents) if each.exists())


def writable(path: Path) -> str | None:
    """Reason why a folder, which may not exist yet, could not be written to; None where it could. Writes nothing."""
    found = standing(path)
    if not found.is_dir():
        return f"{found} is a file"
    return None if os.access(found, os.W_OK | os.X_OK) else f"{found} is read-only for you"


def disk(folder: Path, need: int | None = None, what: str = "") -> Iterator[Finding]:
    """Check the free space at a run's place.

    Args:
        folder: the run's directory.
        need: bytes needed; None where that is not known.
        what: what needs them, for the message.
    """
    free = shutil.disk_usage(standing(folder)).free
    said = f"{in_bytes(free)} of disk are free at {standing(folder)}"
    if need is not None and free < need:
        yield problem(
            f"{said}, and {what} take {in_bytes(need)}", "free some space, or choose another place by --run_dir"
        )
    elif free < LITTLE_DISK:
        yield warning(said, "free some space, or choose another place by --run_dir")
    else:
        yield ok(f"{said}; {what} take about {in_bytes(need)}" if need is not None else said)


def folders() -> Iterator[Finding]:
    """Check that the cache folders of this project and its libraries can be written."""
    named = [
        ("cache", cache_folder("references"), "LIT_DIFFUSION_CACHE"),
        ("data", cache_folder("data", "LIT_DIFFUSION_DATA"), "LIT_DIFFUSION_DATA"),
        ("weights", cache_folder("weights", "LIT_DIFFUSION_WEIGHTS"), "LIT_DIFFUSION_WEIGHTS"),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR"),
    ]
    for what, variable in (
        ("matplotlib's", "MPLCONFIGDIR"),
        ("the compiler's cache", "TORCHINDUCTOR_CACHE_DIR"),
        ("Weights & Biases'", "WANDB_DIR"),
    ):
        if given := os.environ.get(variable):
            named.append((what, Path(given), variable))
    bad = False
    for what, folder, variable in named:
        if reason := writable(folder):
            bad = True
            yield warning(
                f"the {what.removeprefix('the ')} folder {folder} cannot be written ({reason})",
                f"set {variable} to another",
            )
    if not bad:
        yield ok(f"cache folders can be written ({cache_folder('references').parent})")


def open_files(workers: int | None = None) -> Iterator[Finding]:
    """Check the limit on open files; each data worker takes some, and each tensor that it passes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        yield ok(f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files")
        return
    most = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    make = warning if workers else note
    yield make(f"a process may open {soft} files, few for data workers", f"ulimit -n {most}")


def memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compiler(on_gpu: bool) -> str | None:
    """Text on the missing compiler for compiling a backbone, None where there is one."""
    names = ("cc", "gcc", "clang") if on_gpu else ("g++", "clang++", "c++")
    variable = "CC" if on_gpu else "CXX"
    given = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([given] if given else names)):
        return f"no {'C' if on_gpu else 'C++'} compiler ({given or ', '.join(names)})"
    return None
