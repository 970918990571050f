"""Runs that are killed, asked to stop or left without room: continued, they end as if nothing had happened.

The command line is the real one and so are the signals. A process imports everything once and forks every run, so that
a run costs what it computes; some are started with ``python -m lit_diffusion``, as a user starts them.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import events

from lit_diffusion.__main__ import main
from lit_diffusion.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
PATIENCE = 120.0
"""Seconds after which a process that should have ended is a failure; no test waits for them otherwise."""

COMMON = f"""
--model.backbone.channels 8 --model.backbone.mult [1] --model.backbone.attention [] --model.warmup_images 600
--data.global_batch_size {BATCH} --trainer.accelerator cpu --ema.half_lives_images [400] --wandb.mode disabled
--samples.every_n_images null --samples.every_n_steps 15 --samples.count 6 --samples.film_columns 3
--eval.every_n_images null --eval.every_n_steps 12 --eval.samples 30 --eval.batch_size 16
--noise_levels.every_n_steps 20 --noise_levels.levels 2 --noise_levels.images 16
--telemetry.every_n_images null --telemetry.every_n_steps 3
--checkpoint.every_n_images null --checkpoint.every_n_steps 7
""".split()
METHODS = {
    "ncsn": "--model.sampler.steps_per_level 1",
    "ddpm": "--model.sampler.steps 6 --eval.sampler.steps 4",
    "score_sde_vp": "--model.sampler.predictor.steps 4 --eval.sampler.steps 4",
}
"""The shipped recipes, with everything that they have, but small: what is changed of them."""


def command(method: str, run_dir: Path, steps: int, *more: str) -> list[str]:
    """Of a run that is started and continued."""
    recipe = ["fit", "--config", str(ROOT / "experiments" / f"{method}.yaml"), *COMMON, *METHODS[method].split()]
    return [*recipe, "--trainer.max_images", str(steps * BATCH), "--run_dir", str(run_dir), "--resume", "auto", *more]


# ---- processes ---------------------------------------------------------------------------------------------------

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["lit_diffusion.cli", "matplotlib.figure", "sklearn.datasets"])


def here(place: str, count: int) -> None:
    """In a process that is to end there: let it kill itself, with a real SIGKILL, when it is there a number of times.

    Places: ``save``, half of last.ckpt is written; ``rename``, it is written under its temporary name; ``walk``, half of
    the samples of an evaluation are made; ``figures``, its event is written and the list of the best is not; ``picture``,
    its file is written and its event is not; ``lost``, a continued run has set events aside and not yet cut its list;
    ``step``, the weights are new and the clock is not.
    """
    left = count

    def die_if_it_is_time() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, wanted=lambda *_: True) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments, **keys):
            if wanted(*arguments):
                die_if_it_is_time()
            return real(*arguments, **keys)

        setattr(owner, name, wrapped)

    def after(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments, **keys):
            found = real(*arguments, **keys)
            die_if_it_is_time()
            return found

        setattr(owner, name, wrapped)

    from lit_diffusion import clock, run
    from lit_diffusion.callbacks import evaluator

    if place == "save":
        save = torch.save

        def half(state, file, *arguments, **keys):
            whole = io.BytesIO()
            save(state, whole, *arguments, **keys)
            if "last.ckpt" in str(file.name):
                file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                file.flush()
                die_if_it_is_time()
                file.seek(0)
                file.truncate()
            file.write(whole.getvalue())

        torch.save = half
    elif place == "walk":
        batches = evaluator.generate_in_batches

        def halfway(*arguments, **keys):
            for number, batch in enumerate(batches(*arguments, **keys)):
                if number == 1:
                    die_if_it_is_time()
                yield batch

        evaluator.generate_in_batches = halfway
    elif place == "rename":
        before(Path, "replace", lambda path, *_: path.name == ".last.ckpt.tmp")
    elif place == "figures":
        before(evaluator.Evaluator, "_keep_the_best")
    elif place == "picture":
        after(run, "save_png")
    elif place == "lost":
        before(run, "atomic_write", lambda path: path.name == "metrics.jsonl")
    elif place == "step":
        before(clock.Clock, "tick")
    else:
        raise AssertionError(place)


def work(arguments: list[str], log: Path, environment: dict[str, str], place: tuple[str, int] | None) -> None:
    """A forked process: the command line, from the first thing that it does."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if place is not None:
        here(*place)
    sys.argv = ["lit_diffusion", *arguments]
    sys.exit(main())


class Process:
    """A running command line in a group of its own; ``with`` it, so that nothing is left of it."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str] | None = None,
        place: tuple[str, int] | None = None,
        forked: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
        self.log.touch()
        own = {**(environment or {}), "LIT_DIFFUSION_CACHE": os.environ["LIT_DIFFUSION_CACHE"], "OMP_NUM_THREADS": "1"}
        if forked:
            self._process = FORKED.Process(target=work, args=(arguments, self.log, own, place))
            self._process.start()
        else:
            assert place is None
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lit_diffusion", *arguments],
                    env={**os.environ, **own, "PYTHONPATH": path},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        self.pid = self._process.pid

    def ended(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is not None
        return self._process.exitcode is not None

    def wait(self) -> int:
        """The exit code, minus the signal's number where one ended it."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(PATIENCE)
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"it does not end: {self.said()}"
        return self._process.exitcode

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return self.said().strip().splitlines()[-1]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            os_kill_quietly(self.pid)
        self.wait()


def os_kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def until(condition, process: Process, poll: float = 0.002) -> bool:
    """Wait for something that a process does; False if it ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.ended():
            return False
        assert time.monotonic() < deadline, process.said()
        time.sleep(poll)
    return True


def reached(run_dir: Path, step: int):
    """Whether a run has written an event of a step at least; a line may be half written."""

    def condition() -> bool:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] >= step

    return condition


def completed(arguments: list[str], folder: Path, **keys: Any) -> str:
    """Run to the end; returns what it said."""
    with Process(arguments, folder, **keys) as process:
        assert process.wait() == 0, process.said()[-3000:]
        return process.said()


# ---- what two runs have in common --------------------------------------------------------------------------------

TIMING = ("time", "seconds", "images_per_second", "seconds_per_step", "tflops", "memory_gb")


def comparable(event: dict[str, Any]) -> dict[str, Any]:
    """An event without what depends on the clock on the wall."""
    return {key: value for key, value in event.items() if key not in TIMING and not key.startswith("seconds/")}


def results(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that was found, in the order in which it was written."""
    return [comparable(event) for event in events(run_dir) if event["event"] not in ("start", "end")]


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two trees of dictionaries, lists, tensors and plain values differ in any bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()
        return [] if same else [where]
    if type(one) is not type(two):
        return [f"{where}: {type(one).__name__} and {type(two).__name__}"]
    if isinstance(one, dict):
        found = [f"{where}.{key}: only in one" for key in one.keys() ^ two.keys()]
        return found + [
            each for key in one.keys() & two.keys() for each in differences(one[key], two[key], f"{where}.{key}")
        ]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [f"{where}: {len(one)} and {len(two)} entries"]
        return [
            each for k, pair in enumerate(zip(one, two, strict=True)) for each in differences(*pair, f"{where}.{k}")
        ]
    return [] if one == two else [f"{where}: {one} and {two}"]


def checkpoint_of(run_dir: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """All of a run's checkpoint but Lightning's own counters of batches, and who loads the data."""
    checkpoint = read_checkpoint(run_dir / "checkpoints" / name)
    del checkpoint["loops"]
    del checkpoint["lit_diffusion"]["config"]["data"]["num_workers"]
    return checkpoint


def pictures_of(run_dir: Path) -> dict[str, bytes]:
    """The bytes of the pictures, and of the samples that were kept."""
    folder = run_dir / "samples"
    found = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return found | {path.name: np.load(path)["arr_0"].tobytes() for path in folder.glob("*.npz")}


def assert_the_same(straight: Path, broken: Path, ordered: bool = True) -> None:
    """That two finished runs are one, bit for bit.

    Args:
        straight: never stopped.
        broken: stopped and continued.
        ordered: whether what was written after one and the same step was written in the same order, too: not where a
            stop left a picture out, which is then made after the others.
    """
    assert differences(checkpoint_of(straight), checkpoint_of(broken)) == []
    expected, found = results(straight), results(broken)
    if not ordered:
        for each in (expected, found):
            each.sort(key=lambda event: (event["step"], event["event"], event.get("name", "")))
    assert differences(expected, found) == []
    assert differences(pictures_of(straight), pictures_of(broken)) == []
    best = [(run_dir / "checkpoints" / "best.json").read_text() for run_dir in (straight, broken)]
    assert best[0] == best[1]
    names = [{path.name for path in (run_dir / "checkpoints").iterdir()} for run_dir in (straight, broken)]
    assert names[0] == names[1]
    for entry in json.loads(best[0]):
        assert differences(*(checkpoint_of(run_dir, entry["file"]) for run_dir in (straight, broken))) == []
    trained = [event["step"] for event in events(broken, "train")]
    assert trained == sorted(set(trained))


# ---- SIGKILL -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a process ends: at a place of its own, or so many seconds after it has written of a step."""

    place: tuple[str, int] | None = None
    step: int = 0
    delay: float = 0.0


def killed(arguments: list[str], run_dir: Path, kill: Kill) -> None:
    """Run until it is killed; what is there afterwards is whole."""
    with Process(arguments, run_dir.parent, place=kill.place) as process:
        if kill.place is None:
            assert until(reached(run_dir, kill.step), process), process.said()
            time.sleep(kill.delay)
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.said()[-3000:]
    last = run_dir / "checkpoints" / "last.ckpt"
    if last.exists():
        read_checkpoint(last)
    assert events_say_end(run_dir) == 0


def events_say_end(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"event": "end"') if path.exists() else 0


def broken_run(method: str, folder: Path, steps: int, kills: list[Kill], *more: str) -> Path:
    """A run that is killed, each time continued, and ends."""
    run_dir = folder / "run"
    arguments = command(method, run_dir, steps, *more)
    ids = set()
    for kill in kills:
        killed(arguments, run_dir, kill)
        ids.add((run_dir / "run_id").read_text())
    completed(arguments, folder)
    ids.add((run_dir / "run_id").read_text())
    assert len(ids) == 1
    starts = events(run_dir, "start")
    assert {start["run_id"] for start in starts} == {ids.pop().strip()}
    assert len(events(run_dir, "end")) == 1
    return run_dir


def two_more_steps(method: str, run_dir: Path, steps: int) -> dict[str, Any]:
    """Continue beyond the end, without pictures and figures; the losses and the weights of the next two batches."""
    bare = "--samples.count 0 --noise_levels.levels 0 --eval.metrics [] --telemetry.every_n_steps 1".split()
    completed(command(method, run_dir, steps + 2, *bare), run_dir.parent)
    train = [comparable(event) for event in events(run_dir, "train") if event["step"] > steps]
    assert len(train) == 2
    return {"train": train, "checkpoint": checkpoint_of(run_dir)}


SHORT = 17
"""Steps of the runs of the quick tests: two checkpoints at their cadence, an evaluation, a picture."""

QUICK = {
    "ncsn": ([Kill(place=("save", 2))], []),
    "ddpm": ([Kill(place=("walk", 1))], []),
    "score_sde_vp": ([Kill(step=9, delay=0.01)], ["--data.num_workers", "2"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_continues_to_the_same_bits(tmp_path, method):
    kills, more = QUICK[method]
    straight = tmp_path / "straight" / "run"
    completed(command(method, straight, SHORT), straight.parent)
    broken = broken_run(method, tmp_path / "broken", SHORT, kills, *more)
    assert_the_same(straight, broken)


LONG = 40
REPEATS = 10


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of each method one run that nothing disturbs, and its next two steps."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(method: str) -> tuple[Path, dict[str, Any]]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            run_dir = folder / "run"
            completed(command(method, run_dir, LONG), folder)
            shutil.copytree(run_dir, folder / "further")
            made[method] = run_dir, two_more_steps(method, folder / "further", LONG)
        return made[method]

    return of


def kills_of(method: str, repeat: int) -> list[Kill]:
    """Each repeat ends where something is half done, the last ones wherever it may be."""
    draw = random.Random(f"{method} {repeat}")
    anywhere = [Kill(step=draw.randrange(8, LONG - 1), delay=0.1 * draw.random()) for _ in range(2)]
    anywhere.sort(key=lambda kill: kill.step)
    special = [
        [Kill(place=("save", draw.randrange(2, 6)))],
        [Kill(place=("walk", draw.randrange(1, 4)))],
        [Kill(place=("figures", draw.randrange(1, 5)))],
        [Kill(place=("picture", draw.randrange(1, 6)))],
        [Kill(place=("rename", draw.randrange(1, 6))), Kill(place=("step", draw.randrange(2, 9)))],
        [anywhere[0], Kill(place=("lost", 1)), anywhere[1]],  # Resumed three times.
        [Kill(step=draw.randrange(0, 4), delay=0.02 * draw.random())],  # Before the first checkpoint.
        anywhere,
    ]
    return special[repeat] if repeat < len(special) else anywhere[:1]


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_anywhere_continues_to_the_same_bits(tmp_path, straight, method, repeat):
    more = ["--data.num_workers", "2"] if repeat in (8, 9) else []
    broken = broken_run(method, tmp_path, LONG, kills_of(method, repeat), *more)
    never_stopped, further = straight(method)
    assert_the_same(never_stopped, broken)
    assert differences(further, two_more_steps(method, broken, LONG)) == []
