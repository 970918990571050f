"""One writer a run: who may write, what a refusal says, and the takeover of the dead."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers.tiny import CONFIG, events

import lit_diffusion
from lit_diffusion import interrupts
from lit_diffusion.__main__ import dispatch
from lit_diffusion.checks.recipe import run_directory
from lit_diffusion.cli.lightning_cli import CLI, main
from lit_diffusion.errors import UserError
from lit_diffusion.runs import lock as run_lock
from lit_diffusion.runs.lock import LOCK, Holder, Place, RunLock
from lit_diffusion.runs.logger import RunLogger

HOLD = """
import sys
from pathlib import Path
from lit_diffusion.errors import UserError
from lit_diffusion.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]), lambda line: print(line, flush=True))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.take()
    print("taken", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


class Other:
    """Another process, which takes a run's lock on command."""

    def __init__(self, run_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run_dir)],
            env={**os.environ, "PYTHONPATH": str(Path(lit_diffusion.__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.says() == "ready"

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def said():
    return []


@pytest.fixture
def lock(tmp_path, said):
    """Of a directory that is not there yet."""
    made = RunLock(tmp_path / "run", said.append)
    yield made
    made.release()


@pytest.fixture
def clock(monkeypatch):
    """Time passes only while somebody sleeps; what happens in each second is put into ``clock.then``."""

    class Clock:
        now = 0.0
        then = staticmethod(lambda second: None)

        def sleep(self, seconds):
            self.now += seconds
            self.then(self.now)

    made = Clock()
    monkeypatch.setattr(run_lock.time, "sleep", made.sleep)
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: made.now)
    return made


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_by(run_dir: Path, **changes) -> Holder:
    """A lock of another process, as it is in the file."""
    own = run_lock._this_holder()
    holder = replace(own, **{"pid": 2**22 + 1, "command": "fit", **changes})
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK).write_bytes(holder.to_json())
    return holder


def of_another(path: Path) -> Holder:
    """Turn the lock of this process into one of another that lives."""
    holder = Holder.from_json(path.read_bytes())
    holder = replace(holder, pid=os.getppid(), started=run_lock.started(os.getppid()))
    path.write_bytes(holder.to_json())
    return holder


def elsewhere(**changes) -> Place:
    return run_lock.this_place()._replace(**changes)


# ---- two processes -----------------------------------------------------------------------------------------------


def test_a_second_fit_says_who_holds_the_run_and_a_killed_one_is_succeeded(tmp_path, monkeypatch, capsys):
    """The same command line twice, as a scheduler or a second terminal gives it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    again = ["fit", "--config", "tiny.yaml", "--run_dir", "run", "--resume", "auto"]
    with Other(tmp_path / "run") as other:
        other.go_on()
        assert other.says() == "taken"
        holder = Holder.from_json((tmp_path / "run" / LOCK).read_bytes())
        for arguments in (again, again[:-2], ["test", *again[1:-2]]):
            line = refusal(lambda arguments=arguments: dispatch(arguments))
            assert f"run is being written by process {other.process.pid} on {holder.place.host} since" in line
            assert holder.since in line
        assert os.listdir("run") == [LOCK]
        assert Holder.from_json((tmp_path / "run" / LOCK).read_bytes()) == holder
        other.process.kill()
        other.process.wait()
        capsys.readouterr()
        dispatch(again)
        assert f"took over run from process {other.process.pid} on" in capsys.readouterr().out
    assert [event["event"] for event in events(tmp_path / "run", "start")] == ["start"]
    assert LOCK not in os.listdir("run")
    assert not [name for name in os.listdir("run") if name.startswith(".")]


@pytest.mark.parametrize("dead", [False, True])
def test_of_several_at_the_same_moment_one_wins(tmp_path, dead):
    if dead:
        left_by(tmp_path)
    others = [Other(tmp_path) for _ in range(3)]
    for other in others:
        other.go_on()
    answers = {other: other.says() for other in others}
    for other, answer in answers.items():
        if answer.startswith("took over"):
            assert dead
            answers[other] = other.says()
    (winner,) = (other for other, answer in answers.items() if answer == "taken")
    refused = [answer for answer in answers.values() if answer != "taken"]
    assert len(refused) == 2
    assert all(f"is being written by process {winner.process.pid} on" in answer for answer in refused)
    for other in others:
        other.go_on()  # They end in good order.
        other.process.communicate()
    assert os.listdir(tmp_path) == []


def test_a_zombie_is_dead(lock, said):
    """Which a killed process stays in a container whose first process does not reap."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    left_by(lock.run_dir, pid=child.pid, started=run_lock.started(child.pid))
    assert "is being written by" in refusal(RunLock(lock.run_dir, said.append).take)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # Dead, and not yet waited for.
    os.kill(child.pid, 0)  # There is still a process of this number.
    lock.take()
    assert "that process is gone" in said[0]
    child.communicate()


def test_a_forked_child_that_goes_on_with_the_work_succeeds_its_parent(lock, said):
    """As the launchers that fork do: the parent may be killed while the child still writes."""
    lock.take()
    forking = multiprocessing.get_context("fork")
    mine, its = forking.Pipe()

    def child():
        held = lock.held
        lock.take()
        its.send((held, lock.lost(), os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

    process = forking.Process(target=child)
    process.start()
    held, lost, pid = mine.recv()
    process.join()
    assert not held
    assert lost is None
    assert Holder.from_json(lock.path.read_bytes()).pid == pid
    assert said == []
    lock.release()  # The child's is not the parent's to give back.
    assert lock.path.exists()


# ---- who is dead: on this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 2**22 + 1},  # Above the largest number that Linux gives.
        {"pid": os.getppid(), "started": "1"},  # The number was given to another process.
        {"pid": os.getpid(), "started": "1"},  # As in a container that was started again: to this very one.
    ],
)
def test_a_process_that_is_gone_is_succeeded_at_once(lock, said, clock, change):
    left_by(lock.run_dir, **change)
    lock.take()
    assert lock.held
    assert clock.now == 0.0
    assert "that process is gone" in said[0]
    assert os.listdir(lock.run_dir) == [LOCK]


def test_another_users_process_that_the_system_hides_is_not_taken_for_dead(lock, clock, monkeypatch):
    def forbidden(pid, number):
        raise PermissionError

    left_by(lock.run_dir)
    monkeypatch.setattr(run_lock.os, "kill", forbidden)
    assert "cannot be seen from here" in refusal(lock.take)


def test_a_system_without_proc_asks_ps(monkeypatch, tmp_path):
    monkeypatch.setattr(run_lock, "PROC", tmp_path)
    assert run_lock.this_place()[1:] == (None, None)
    answers = {1: "S Tue Nov 24 10:00:00 2026\n", 2: "Z+ Tue Nov 24 10:00:00 2026\n", 3: ""}

    def ps(command, **_):
        return subprocess.CompletedProcess(command, 0, answers[int(command[-1])])

    monkeypatch.setattr(run_lock.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(run_lock.subprocess, "run", ps)
    assert [run_lock.started(pid) for pid in (1, 2, 3)] == ["Tue Nov 24 10:00:00 2026", None, None]


# ---- who is dead: elsewhere --------------------------------------------------------------------------------------

ELSEWHERE = [{"host": "another"}, {"boot": "before the last start"}, {"namespace": "pid:[4026532000]"}, {"boot": None}]
"""Another machine, this one before it was started again, another container on it."""


@pytest.mark.parametrize("change", ELSEWHERE)
def test_elsewhere_a_number_says_nothing_and_a_silence_of_90_seconds_all(lock, said, clock, change):
    left_by(lock.run_dir, place=elsewhere(**change))
    lock.take(wait=True)
    assert clock.now == pytest.approx(90.0)
    assert "waiting up to 90 s for a sign of life" in said[0]
    assert "no sign of life for 90 s" in said[1]


def test_without_resume_auto_there_is_no_wait_and_the_line_says_what_would(lock, clock):
    holder = left_by(lock.run_dir, place=elsewhere(host="another"))
    line = refusal(lock.take)
    assert f"process {holder.pid} on another since {holder.since}" in line
    assert "--resume auto watches it for 90 s" in line
    assert clock.now == 0.0


def test_a_sign_of_life_is_the_files_time_by_whatever_clock(lock, clock):
    """The other machine's clock is years behind: its beat is a change all the same."""
    left_by(lock.run_dir, place=elsewhere(host="another"))
    os.utime(lock.path, (1e9, 1e9))
    clock.then = lambda second: os.utime(lock.path, (1e9 + second // 15, 1e9 + second // 15))
    assert "is alive" in refusal(lambda: lock.take(wait=True))
    assert clock.now == 15.0


def test_a_future_time_of_a_dead_holder_is_no_life(lock, clock):
    left_by(lock.run_dir, place=elsewhere(host="another"))
    os.utime(lock.path, (4e9, 4e9))
    lock.take(wait=True)
    assert lock.held


def test_a_holder_that_ends_in_good_order_is_not_waited_for(lock, clock, said):
    left_by(lock.run_dir, place=elsewhere(host="another"))
    clock.then = lambda second: lock.path.unlink(missing_ok=True)
    lock.take(wait=True)
    assert clock.now == 1.0
    assert len(said) == 1


def test_a_signal_ends_the_waiting(lock, clock, monkeypatch):
    left_by(lock.run_dir, place=elsewhere(host="another"))
    monkeypatch.setattr(interrupts, "asked", lambda: "SIGTERM")
    with pytest.raises(interrupts.Interrupted, match="nothing was changed") as caught:
        lock.take(wait=True)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("content", [b"", b'{"pid": 1', b"[]", b"null", b'{"pid": -1, "place": {}}'])
def test_a_torn_lock_is_somebodys_until_it_is_silent(lock, clock, said, content):
    lock.run_dir.mkdir()
    lock.path.write_bytes(content)
    assert "is being written by somebody" in refusal(RunLock(lock.run_dir, said.append).take)
    lock.take(wait=True)
    assert lock.held
    assert clock.now == pytest.approx(90.0)


# ---- two heirs ---------------------------------------------------------------------------------------------------


def test_who_comes_when_a_dead_lock_has_an_heir_sees_the_heir(lock, said, monkeypatch):
    """Both saw the dead one; the other was quicker, and has renamed its file already."""
    left_by(lock.run_dir)
    rival, real = RunLock(lock.run_dir, said.append), RunLock._why_free

    def judged(self, path, there, wait):
        why = real(self, path, there, wait)
        if self is lock and not rival.held:
            rival.take()
            of_another(lock.path)  # This process's own lock would be no obstacle.
        return why

    monkeypatch.setattr(RunLock, "_why_free", judged)
    assert f"process {os.getppid()} on" in refusal(lock.take)
    assert os.listdir(lock.run_dir) == [LOCK]


def test_an_heir_that_died_at_it_is_succeeded_too(lock, said):
    dead = left_by(lock.run_dir)
    heir = replace(dead, token="1").to_json()
    run_lock._heir(lock.path, dead.to_json()).write_bytes(heir)
    lock.take()
    assert lock.held
    assert lock.lost() is None
    assert os.listdir(lock.run_dir) == [LOCK]


def test_a_file_system_without_hard_links(lock, said, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_lock.os, "link", no_links)
    lock.take()
    assert Holder.from_json(lock.path.read_bytes()).pid == os.getpid()
    assert not run_lock._make(lock.path, b"another")
    assert os.listdir(lock.run_dir) == [LOCK]


def test_an_answer_that_the_network_lost_is_no_refusal(lock, monkeypatch):
    """NFS asks again, and hears that the name is there: it is its own."""
    real = os.link

    def twice(one, two):
        real(one, two)
        real(one, two)

    monkeypatch.setattr(run_lock.os, "link", twice)
    lock.take()
    assert lock.held


# ---- while it is held --------------------------------------------------------------------------------------------


def test_the_holder_gives_signs_of_life_also_on_a_full_disk_and_draws_nothing(lock, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    state = random.getstate()
    lock.take()
    before = lock.path.read_bytes()
    os.utime(lock.path, (0, 0))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    deadline = time.monotonic() + 20.0
    while os.stat(lock.path).st_mtime == 0.0:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    monkeypatch.undo()
    assert lock.path.read_bytes() == before
    assert random.getstate() == state
    lock.release()


def test_a_writer_that_was_silent_and_succeeded_writes_nothing_more(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.record("a", {})
    other = of_another(tmp_path / LOCK)
    events_before = (tmp_path / "metrics.jsonl").read_bytes()
    black = np.zeros((8, 8, 1), np.uint8)
    for write in (lambda: logger.record("b", {}), lambda: logger.picture("p", black, "")):
        assert f"taken over by process {other.pid}" in refusal(write)
    assert (tmp_path / "metrics.jsonl").read_bytes() == events_before
    assert os.listdir(tmp_path / "samples") == []
    logger.lock.release()
    assert (tmp_path / LOCK).read_bytes() == other.to_json()
    (tmp_path / LOCK).unlink()  # That one has ended since: what it wrote must not be written over.


def test_a_lock_that_is_gone_is_not_made_again(lock):
    lock.take()
    lock.path.unlink()
    assert "its lock is gone" in lock.lost()
    assert not lock.path.exists()


def test_a_disk_in_trouble_says_nothing_of_other_writers(lock, monkeypatch):
    def stale(*_):
        raise OSError(116, "Stale file handle")

    lock.take()
    monkeypatch.setattr(run_lock, "_look", stale)
    assert lock.lost() is None


# ---- the end -----------------------------------------------------------------------------------------------------


def test_it_ends_with_its_object_and_leaves_no_thread(tmp_path):
    lock = RunLock(tmp_path, print)
    lock.take()
    assert (tmp_path / LOCK).exists()
    mine = [thread for thread in threading.enumerate() if thread.name == "run lock"]
    del lock
    gc.collect()
    assert not (tmp_path / LOCK).exists()
    assert mine


def test_folders_that_were_made_in_vain_are_removed(tmp_path, said):
    lock = RunLock(tmp_path / "a" / "b", said.append)
    lock.take()
    lock.release()
    assert os.listdir(tmp_path) == []
    lock.take()
    (tmp_path / "a" / "b" / "run_id").write_text("")
    lock.release()
    assert os.listdir(tmp_path / "a" / "b") == ["run_id"]


@pytest.mark.parametrize("wrong", [["--model.sigma_max", "much"], ["--resume", "auto", "--ckpt_path", "x"]])
def test_a_fit_that_is_refused_leaves_nothing(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    refusal(lambda: dispatch(["fit", "--config", "tiny.yaml", "--run_dir", "runs/a", *wrong]))
    assert os.listdir(tmp_path) == ["tiny.yaml"]


def test_a_run_that_has_ended_gives_it_back_and_takes_it_again_to_write(tmp_path):
    logger = RunLogger("tiny", run_dir=tmp_path)
    logger.record("a", {})
    assert (tmp_path / LOCK).exists()
    logger.finalize("success")
    assert not (tmp_path / LOCK).exists()
    logger.record("test", {})
    assert (tmp_path / LOCK).exists()
    logger.lock.release()


# ---- several processes of one run; those that only read ----------------------------------------------------------


def test_of_processes_started_together_all_hear_of_a_refusal(tmp_path, monkeypatch):
    """The first does not leave the others waiting: it goes on to where they are connected, and touches nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    left_by(tmp_path / "run", pid=os.getppid(), started=run_lock.started(os.getppid()))
    (tmp_path / "run" / "run_id").write_text("an-id\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "start", "format_version": 1, "images": 5}\n')
    told = []
    monkeypatch.setattr(RunLogger, "open", lambda self: told.append(refusal(self.lock.take)))
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Stopped(CLI):
        def run_command(self, subcommand):
            self.run_logger.open()

    main(["fit", "--config", "tiny.yaml", "--run_dir", "run", "--resume", "auto"], Stopped)
    assert "is being written by process" in told[0]
    assert sorted(os.listdir("run")) == [LOCK, "metrics.jsonl", "run_id"]


def test_only_the_first_process_takes_it(tmp_path, monkeypatch):
    cli = CLI.__new__(CLI)
    for launchers in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(launchers, "1")
        cli._hold(str(tmp_path))
        assert os.listdir(tmp_path) == []
        monkeypatch.setenv(launchers, "0")
    cli._hold(str(tmp_path))
    assert os.listdir(tmp_path) == [LOCK]
    cli.lock.release()


def test_who_reads_may_read_beside_a_training_and_a_replay_waits_for_its_end(tmp_path, clock):
    logger = RunLogger("tiny", "experiment: tiny\n", run_dir=tmp_path / "run")
    logger.record("train", {"loss": 1.0})
    other = of_another(tmp_path / "run" / LOCK)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # Half of a line: it is being written.
    dispatch(["report", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert (tmp_path / "run" / LOCK).read_bytes() == other.to_json()
    line = refusal(lambda: dispatch(["wandb-sync", str(tmp_path / "run"), "--mode", "offline"]))
    assert f"is being written by process {os.getppid()}" in line
    (tmp_path / "run" / LOCK).unlink()


def test_doctor_finds_a_writer_and_takes_nothing(tmp_path):
    made = SimpleNamespace(run_dir=tmp_path, logger=SimpleNamespace(continues=False, wanted=tmp_path))
    left_by(tmp_path)
    assert [finding.severity for finding in run_directory(made)] == ["ok"]
    holder = of_another(tmp_path / LOCK)
    (finding,) = run_directory(made)
    assert finding.severity == "problem"
    assert f"is being written by {holder}" in finding.what
    assert os.listdir(tmp_path) == [LOCK]


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260131-142501")
    loggers = [RunLogger("tiny", root=tmp_path) for _ in range(8)]
    assert len({logger.run_dir for logger in loggers}) == 8
