"""The machine, as it is and as it might be."""

from __future__ import annotations

import os
import resource
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_diffusion.checks import machine

Usage = namedtuple("Usage", "total used free")


def only(found):
    (finding,) = found
    return finding


@pytest.fixture
def usage(monkeypatch):
    """Says how large every disk is."""

    def say(free):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(free, 0, free))

    return say


# ---- processors --------------------------------------------------------------------------------------------------


def test_threads_beyond_the_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert next(machine.processor()).severity == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = next(machine.processor())
    assert (found.severity, found.fix) == ("warning", "export OMP_NUM_THREADS=4")


@pytest.mark.parametrize(
    ("quota", "count"),
    [("200000 100000", 2), ("max 100000", 8), ("50000 100000", 1), ("9900000 100000", 8), ("torn", 8), (None, 8)],
)
def test_cores_of_a_container(monkeypatch, tmp_path, quota, count):
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert machine.cores() == count


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("flags\t\t: fpu avx512_bf16 sse", True),
        ("flags\t\t: fpu avx2 sse", False),
        ("Features\t: fp asimd bf16", True),
        ("", None),
        (None, None),
    ],
)
def test_bfloat16_of_the_cpu(monkeypatch, tmp_path, text, fast):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.fast_bf16_on_cpu() is fast
    _, second = machine.processor()
    assert second.severity == ("ok" if fast else "note")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with one GPU of so many bytes and a capability."""

    def make(free, total, capability=(9, 0), error=None):
        def memory(index):
            if error is not None:
                raise error
            return free, total

        properties = SimpleNamespace(name="H", total_memory=total, major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        return only(machine.accelerators())

    return make


def test_gpus(gpus):
    found = gpus(70e9, 80e9)
    assert found.severity == "ok"
    assert found.what == ("GPU 0: H, 80 GB, capability 9.0, 70 GB free; fast in bf16-mixed, 16-mixed, 32-true")
    assert "fast in 16-mixed, 32-true" in gpus(10e9, 12e9, (7, 5)).what
    assert "fast in 32-true" in gpus(10e9, 12e9, (6, 1)).what
    found = gpus(1e9, 80e9)
    assert (found.severity, "only 1 GB are free" in found.what) == ("warning", True)
    found = gpus(0, 80e9, error=RuntimeError("busy"))
    assert (found.severity, "cannot be used (RuntimeError: busy)" in found.what) == ("problem", True)


def test_a_driver_whose_gpus_torch_does_not_see(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert only(machine.accelerators()).severity == "note"
    (tmp_path / "version").write_text("580")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = only(machine.accelerators())
    assert (found.severity, "built for the CPU alone" in found.what) == ("warning", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = only(machine.accelerators())
    assert (found.severity, "CUDA 13.0) sees no GPU" in found.what) == ("warning", True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert only(machine.accelerators()).severity == "ok"


# ---- memory, disk, files -----------------------------------------------------------------------------------------


def test_shared_memory(usage, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    usage(8e9)
    assert only(machine.shared_memory(4)).severity == "ok"
    usage(64e6)
    assert only(machine.shared_memory(4)).severity == "warning"
    assert only(machine.shared_memory(0)).severity == "note"
    assert only(machine.shared_memory()).severity == "note"
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert list(machine.shared_memory(4)) == []


def test_disk(usage, tmp_path):
    below = tmp_path / "not" / "there"
    usage(5e9)
    assert only(machine.disk(below)).what == f"5 GB of disk are free at {tmp_path}"
    assert only(machine.disk(below, 10**9, "3 checkpoints")).severity == "ok"
    found = only(machine.disk(below, 6 * 10**9, "3 checkpoints"))
    assert (found.severity, "3 checkpoints take 6 GB" in found.what) == ("problem", True)
    usage(5e8)
    assert only(machine.disk(below)).severity == "warning"
    assert not below.exists()


def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    for variable in ("LIT_DIFFUSION_DATA", "LIT_DIFFUSION_WEIGHTS", "TORCHINDUCTOR_CACHE_DIR", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    assert only(machine.folders()).severity == "ok"
    (tmp_path / "file").write_text("")
    for variable in ("LIT_DIFFUSION_WEIGHTS", "TORCHINDUCTOR_CACHE_DIR", "WANDB_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
        found = only(machine.folders())
        assert (found.severity, found.fix) == ("warning", f"set {variable} to another")
        assert f"{tmp_path / 'file'} is a file" in found.what
        monkeypatch.delenv(variable)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: path != Path(tmp_path))
    assert "read-only" in only(machine.folders()).what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # nothing is made


@pytest.mark.parametrize(
    ("limits", "workers", "severity"),
    [
        ((1024, 4096), 4, "ok"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4, "ok"),
        ((256, resource.RLIM_INFINITY), 4, "warning"),
        ((256, 512), 0, "note"),
        ((256, 512), None, "note"),
    ],
)
def test_open_files(monkeypatch, limits, workers, severity):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: limits)
    found = only(machine.open_files(workers))
    assert found.severity == severity
    assert severity == "ok" or found.fix == f"ulimit -n {512 if limits[1] == 512 else 4096}"


def test_a_compiler(monkeypatch, tmp_path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler(on_gpu=False) == "no C++ compiler (g++, clang++, c++)"
    assert machine.compiler(on_gpu=True) == "no C compiler (cc, gcc, clang)"
    for name in ("g++", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert machine.compiler(on_gpu=False) is None
    monkeypatch.setenv("CC", "mine")
    assert machine.compiler(on_gpu=True) is None
    monkeypatch.setenv("CXX", "none")
    assert machine.compiler(on_gpu=False) == "no C++ compiler (none)"
