"""The number of threads: found from the machine, kept by the run, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import CONFIG

import lit_diffusion
from lit_diffusion.__main__ import dispatch
from lit_diffusion.checks import machine
from lit_diffusion.checks.recipe import Prepared
from lit_diffusion.cli.lightning_cli import main
from lit_diffusion.errors import UserError
from lit_diffusion.training import threads


@pytest.fixture
def eight(monkeypatch):
    """A machine with eight cores, busy or not, without a number set; torch's own is put back."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "AT_START", 8)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], "max_images": 32}}))
    return ["fit", "--config", "tiny.yaml", "--run_dir", "run"]


def number_in(path) -> int:
    return yaml.safe_load(path.read_text())["trainer"]["threads"]


# ---- the number --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("load", [0.0, 100.0])
def test_it_is_the_cores_whatever_the_load(monkeypatch, load):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    assert threads.suggested() == 8
    assert [threads.suggested(processes) for processes in (2, 3, 16)] == [4, 2, 1]
    monkeypatch.setattr(threads, "cores", lambda: 3)  # A quota of three.
    assert threads.suggested() == 3


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("given", "number"), [("5", 5), ("6,2", 6), ("", 8), ("many", 8), ("0", 8)])
def test_omp_num_threads_is_the_users_word_also_for_several_processes(monkeypatch, given, number):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads.suggested() == number
    if number < 8:
        assert threads.suggested(4) == number


@pytest.mark.parametrize(
    ("devices", "accelerator", "variables", "count"),
    [
        (1, "cpu", {}, 1),
        (4, "cpu", {}, 4),
        ("4", "gpu", {}, 4),
        ([0, 2], "gpu", {}, 2),
        ("0,1,3", "gpu", {}, 3),
        ("auto", "cpu", {}, 1),
        ("auto", "auto", {}, 3),
        (-1, "gpu", {}, 3),
        ("auto", "cpu", {"LOCAL_WORLD_SIZE": "2"}, 2),
        (8, "gpu", {"SLURM_NTASKS_PER_NODE": "4(x2)"}, 4),
    ],
)
def test_processes_of_one_machine_share_its_cores(monkeypatch, devices, accelerator, variables, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert threads.local_processes(devices, accelerator) == count


@pytest.mark.usefixtures("eight")
def test_a_run_writes_its_number_down_and_keeps_it_on_another_machine(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    dispatch(tiny)
    assert number_in(tmp_path / "run" / "config.yaml") == 2
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")  # Said to the processes that a launcher would start.
    monkeypatch.setattr(threads, "cores", lambda: 3)
    capsys.readouterr()
    cli = main([*tiny, "--resume", "auto"], Prepared)  # All but the steps.
    assert "trainer.threads 2 is the run's own; this machine would choose 3" in capsys.readouterr().out
    assert torch.get_num_threads() == cli.model.run_config["trainer"]["threads"] == 2
    cli = main([*tiny[:-1], "again", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.threads", "1"], Prepared)
    assert "trainer.threads: 2 there, 1 now" in capsys.readouterr().out
    assert torch.get_num_threads() == cli.model.run_config["trainer"]["threads"] == 1


def test_no_number_of_threads_is_one_line_and_leaves_nothing(tiny, tmp_path):
    for key, arguments in (
        ("trainer.threads", [*tiny, "--trainer.threads", "0"]),
        ("--threads", ["evaluate", "--samples", "x", "--reference", "y", "--threads", "-1"]),
        ("--threads", ["sample", "--ckpt_path", "x", "--num_samples", "1", "--out", "a.npz", "--threads", "0"]),
    ):
        with pytest.raises(UserError, match=rf"^{key} is (0|-1); give a positive number"):
            dispatch(arguments)
    assert os.listdir(tmp_path) == ["tiny.yaml"]


# ---- the machine -------------------------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of one's own; ``groups(path, text)`` writes one of their files."""
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_the_quota_of_a_job_within_a_group(groups):
    groups("own", "0::/system.slice/job_7/step_0\n")
    groups("cpu.max", "max 100000\n")
    groups("system.slice/job_7/cpu.max", "300000 100000\n")
    groups("system.slice/job_7/step_0/cpu.max", "max 100000\n")
    assert machine.cores() == 3


def test_the_quota_of_cgroups_of_version_1(groups):
    groups("own", "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    groups("cpu/cpu.cfs_quota_us", "-1\n")
    groups("cpu/cpu.cfs_period_us", "100000\n")
    assert machine.cores() == 8
    groups("cpu/docker/abc/cpu.cfs_quota_us", "250000\n")
    groups("cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert machine.cores() == 2


@pytest.mark.parametrize(("busy", "severity"), [(0.2, "ok"), (3.4, "note")])
def test_doctor_says_what_else_runs(monkeypatch, groups, busy, severity):
    monkeypatch.setattr(os, "getloadavg", lambda: (busy, 0.0, 0.0))
    groups("cpu.max", "200000 100000")
    found, _ = machine.load()
    assert found.severity == severity
    assert f"{busy} programs run or wait for a core, of 2 (a quota of 2 cores)" in found.what


@pytest.mark.parametrize(
    ("variables", "severity", "said"),
    [
        ({}, "ok", "libraries' own"),
        ({"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}, "ok", "OMP_WAIT_POLICY=PASSIVE, KMP_BLOCKTIME=0"),
        ({"OMP_WAIT_POLICY": "active"}, "warning", "unset OMP_WAIT_POLICY"),
        ({"GOMP_SPINCOUNT": "INFINITE"}, "warning", "unset GOMP_SPINCOUNT"),
    ],
)
def test_doctor_says_how_threads_wait(monkeypatch, variables, severity, said):
    for name in machine.WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, found = machine.load()
    assert found.severity == severity
    assert said in str(found)


# ---- waiting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "policy", "blocktime"),
    [({}, "PASSIVE", "0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None), ({"GOMP_SPINCOUNT": "9"}, None, None)],
)
def test_threads_wait_passively_unless_the_user_says_how(monkeypatch, given, policy, blocktime):
    environment = {name: value for name, value in os.environ.items() if name not in machine.WAITING}
    monkeypatch.setattr(os, "environ", {**environment, **given})
    dispatch(["doctor", "--help"])
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME")) == (policy, blocktime)


def test_it_is_said_before_torch_is_loaded():
    """In a process of its own, which ends when torch is asked for."""
    code = (
        "import os, sys\n"
        "class Asked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Asked())\n"
        "from lit_diffusion.__main__ import dispatch\n"
        "dispatch(['fit', '--help'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in machine.WAITING}
    environment["PYTHONPATH"] = str(Path(lit_diffusion.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PASSIVE"
