"""Runs that are killed, asked to stop or left without room: continued, they end as if nothing had happened.

The command line is the real one and so are the signals. A process imports everything once and forks every run, so that
a run costs what it computes; some are started with ``python -m lit_diffusion``, as a user starts them.
"""

from __future__ import annotations

import io
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.forked import FORKED, begin
from helpers.tiny import events

from lit_diffusion.__main__ import main
from lit_diffusion.checkpoints import read_checkpoint
from lit_diffusion.denoisers import NetworkDenoiser
from lit_diffusion.methods import Method
from lit_diffusion.training.datamodule import Batch

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
PATIENCE = 120.0
"""Seconds after which a process that should have ended is a failure; no test waits for them otherwise."""

COMMON = f"""
--model.backbone.channels 8 --model.backbone.mult [1] --model.backbone.attention [] --model.warmup_images 600
--data.global_batch_size {BATCH} --trainer.accelerator cpu --ema.half_lives_images [400] --wandb.mode disabled
--samples.every_n_images null --samples.every_n_steps 15 --samples.count 6 --samples.film_columns 3
--eval.every_n_images null --eval.every_n_steps 12 --eval.samples 30 --eval.batch_size 16
--noise_levels.every_n_steps 20 --noise_levels.num_levels 2 --noise_levels.images 16
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


def note_what_is_seen(path: Path) -> None:
    """Write down, when this process ends, the time and the noisy image that the network got for each training image."""
    seen: dict[int, tuple[float, torch.Tensor]] = {}
    index: list[int] = []
    forward, step = NetworkDenoiser.forward, Method.training_step

    def noted(self: Any, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Any:
        if self.training and torch.is_grad_enabled():
            for row in range(len(x)):
                seen[index.pop(0)] = (float(t[row]), x[row].detach().clone())
        return forward(self, x, t, cond)

    def begun(self: Any, batch: Batch, batch_idx: int) -> None:
        index[:] = batch.index.tolist()
        step(self, batch, batch_idx)

    NetworkDenoiser.forward, Method.training_step = noted, begun
    multiprocessing.util.Finalize(None, lambda: torch.save(seen, path), exitpriority=1)


def here(place: str, count: int, *signals: int) -> None:
    """Let this process send itself signals, SIGKILL by default, when it is at a place for the so manieth time.

    Places: ``save``, half of last.ckpt is written; ``rename``, all is, under its temporary name; ``walk``, half of
    the samples of an evaluation are made; ``figures``, its event is written and the list of the best is not;
    ``film``, samples to be drawn are half made; ``picture``, its file is written and its event is not; ``lost``, a
    continued run has set events aside and not yet cut its list; ``step``, the weights are new and the clock is not;
    ``validation``, a batch of held-out images comes.
    """
    left = count

    def now() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            for each in signals or (signal.SIGKILL,):
                os.kill(os.getpid(), each)

    def around(owner: Any, name: str, wanted: Any = lambda *_: True, after: bool = False) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **keys: Any) -> Any:
            if wanted(*arguments) and not after:
                now()
            found = real(*arguments, **keys)
            if wanted(*arguments) and after:
                now()
            return found

        setattr(owner, name, wrapped)

    from lit_diffusion.callbacks import evaluator, samples
    from lit_diffusion.evaluation import measure
    from lit_diffusion.runs import clock
    from lit_diffusion.runs import logger as run

    save, batches = torch.save, measure.generate_in_batches

    def by_halves(state: Any, file: Any, *arguments: Any, **keys: Any) -> None:
        whole = io.BytesIO()
        save(state, whole, *arguments, **keys)
        content = whole.getvalue()
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        if "last.ckpt" in str(file.name):
            now()
        file.write(content[half:])

    def halfway(*arguments: Any, **keys: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(*arguments, **keys)):
            yield batch
            if number == 0:
                now()

    if place == "seen":
        note_what_is_seen(Path(str(count)))
    elif place == "save":
        torch.save = by_halves
    elif place == "rename":
        around(Path, "replace", lambda path, *_: path.name == ".last.ckpt.tmp")
    elif place == "walk":
        measure.generate_in_batches = halfway
    elif place == "figures":
        around(evaluator.Evaluator, "_keep_the_best")
    elif place == "film":
        around(samples._Film, "__call__")
    elif place == "picture":
        around(run, "save_png", after=True)
    elif place == "lost":
        around(run, "atomic_write", lambda path: path.name == "metrics.jsonl")
    elif place == "step":
        around(clock.Clock, "tick")
    elif place == "validation":
        around(Method, "validation_step")
    else:
        raise AssertionError(place)


def work(arguments: list[str], log: Path, environment: dict[str, str], place: tuple[Any, ...] | None) -> None:
    """A forked process: the command line, from the first thing that it does."""
    begin(log, environment)
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
        place: tuple[Any, ...] | None = None,
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
        except ProcessLookupError:  # Before it has a group of its own, or after all.
            with suppress(ProcessLookupError):
                if not self.ended():
                    os.kill(self.pid, signal.SIGKILL)
        self.wait()


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
    """All of a run's checkpoint but its name, Lightning's own counters, who loads the data and who watches."""
    checkpoint = read_checkpoint(run_dir / "checkpoints" / name)
    assert checkpoint["lit_diffusion"].pop("run_id") == (run_dir / "run_id").read_text().strip()
    del checkpoint["loops"], checkpoint["epoch"]
    del checkpoint["lit_diffusion"]["config"]["data"]["num_workers"]
    del checkpoint["lit_diffusion"]["config"]["wandb"]
    return checkpoint


def pictures_of(run_dir: Path) -> dict[str, bytes]:
    """The bytes of the pictures, and of the samples that were kept."""
    folder = run_dir / "samples"
    found = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return found | {path.name: np.load(path)["arr_0"].tobytes() for path in folder.glob("*.npz")}


def assert_the_same(straight: Path, broken: Path, stopped: bool = False, processes: int = 1) -> None:
    """That two finished runs are one, bit for bit.

    Args:
        straight: never stopped.
        broken: stopped and continued.
        stopped: whether it was stopped by a signal that can be caught: what was due then is made later, so that events
            of one and the same step may be in another order.
        processes: how many made them: averages over several are of sums that a checkpoint has put together, so that
            the last digit of a loss in metrics.jsonl may be another.
    """
    assert differences(checkpoint_of(straight), checkpoint_of(broken)) == []
    expected, found = results(straight), results(broken)
    if stopped:
        for each in (expected, found):
            each.sort(key=lambda event: (event["step"], event["event"], event.get("name", "")))
    if processes > 1:
        assert [event.keys() for event in expected] == [event.keys() for event in found]
        for mine, theirs in zip(expected, found, strict=True):
            for key in [key for key in mine if key.startswith("loss") or key == "gradient_norm"]:
                if isinstance(mine[key], float):
                    assert theirs.pop(key) == pytest.approx(mine.pop(key), rel=1e-6)
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

    place: tuple[Any, ...] | None = None
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


def whole_lines(path: Path) -> set[str]:
    return set(path.read_text().split("\n")[:-1]) if path.exists() else set()


def broken_run(method: str, folder: Path, steps: int, kills: list[Kill], *more: str) -> Path:
    """A run that is killed, each time continued, and ends."""
    run_dir = folder / "run"
    arguments = command(method, run_dir, steps, *more)
    ids, written = set(), set()
    for kill in kills:
        killed(arguments, run_dir, kill)
        ids.add((run_dir / "run_id").read_text())
        written |= whole_lines(run_dir / "metrics.jsonl")
    completed(arguments, folder)
    assert written <= whole_lines(run_dir / "metrics.jsonl") | whole_lines(run_dir / "metrics.lost.jsonl")
    ids.add((run_dir / "run_id").read_text())
    assert len(ids) == 1
    starts = events(run_dir, "start")
    assert {start["run_id"] for start in starts} == {ids.pop().strip()}
    assert len(events(run_dir, "end")) == 1
    return run_dir


def two_more_steps(method: str, run_dir: Path, steps: int) -> dict[str, Any]:
    """Continue beyond the end, without pictures and figures; the losses and the weights of the next two batches."""
    bare = ("--samples.count", "0", "--noise_levels.num_levels", "0", "--eval.metrics", "[]")
    completed(command(method, run_dir, steps + 2, *bare, "--telemetry.every_n_steps", "1"), run_dir.parent)
    train = [comparable(event) for event in events(run_dir, "train") if event["step"] > steps]
    assert len(train) == 2
    return {"train": train, "checkpoint": checkpoint_of(run_dir)}


SHORT = 17
"""Steps of the runs of the quick tests: two checkpoints at their cadence, an evaluation, a picture."""

QUICK = {
    "ncsn": [Kill(place=("save", 2))],
    "ddpm": [Kill(place=("walk", 1))],
    "score_sde_vp": [Kill(step=9, delay=0.01)],
}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A short run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    completed(command("ncsn", run_dir, SHORT), run_dir.parent)
    return run_dir


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "ncsn" else pytest.mark.slow) for name in METHODS]
)
def test_a_killed_run_continues_to_the_same_bits(tmp_path, short, method):
    straight = short if method == "ncsn" else tmp_path / "straight" / "run"
    if method != "ncsn":
        completed(command(method, straight, SHORT), straight.parent)
    broken = broken_run(method, tmp_path / "broken", SHORT, QUICK[method])
    assert_the_same(straight, broken)


@pytest.mark.parametrize(
    ("kill", "more"),
    [
        (Kill(place=("validation", 2)), ["--checkpoint.every_n_steps", str(SHORT)]),
        pytest.param(Kill(place=("picture", 5)), ["--checkpoint.every_n_steps", str(SHORT)], marks=pytest.mark.slow),
        pytest.param(
            Kill(place=("validation", 2)),
            ["--checkpoint.every_n_steps", "6", "--trainer.val_check_interval", "6"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Kill(place=("validation", 9)),
            ["--checkpoint.every_n_steps", "5", "--trainer.val_check_interval", "6"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["validation at the end", "picture at the end", "validation", "validation after an evaluation"],
)
def test_what_follows_a_checkpoint_without_a_step_between_is_made_once(tmp_path, kill, more):
    straight = tmp_path / "straight" / "run"
    completed(command("ncsn", straight, SHORT, *more), straight.parent)
    broken = broken_run("ncsn", tmp_path / "broken", SHORT, [kill], *more)
    assert_the_same(straight, broken)
    completed(command("ncsn", broken, SHORT, *more), tmp_path)  # The finished run once more.
    assert_the_same(straight, broken, stopped=True)


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
        [Kill(place=("step", 11)), Kill(place=("lost", 1)), anywhere[1]],  # Resumed three times.
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


# ---- signals that can be caught ----------------------------------------------------------------------------------

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
STOPPED = 75
SOON = 30.0
"""Seconds within which a scheduler gets its machine back."""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks processes up in /proc")


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid = int(path.name)
            state = (path / "stat").read_text().rpartition(")")[2].split()
            if int(state[3]) == session and state[0] != "Z":
                found.append(pid)
    return sorted(found)


def listens(pid: int) -> bool:
    """Whether a process has its own way with SIGTERM by now."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def second_process(first: Process) -> int | None:
    """Of those that Lightning's launcher started, the one that trains."""
    for pid in members(first.pid):
        with suppress(OSError):
            if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    return None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_processes(arguments: list[str], folder: Path, places: tuple[Any, Any] = (None, None)) -> list[Process]:
    """As torchrun starts them."""
    shared = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [
        Process([*arguments, *TWO], folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, places[rank])
        for rank in range(2)
    ]


@dataclass(frozen=True)
class Stop:
    """Which process gets a signal, and when: at a place, as soon as it listens (step -1), or after a step."""

    rank: int
    place: tuple[str, int] | None = None
    step: int = -1
    delay: float = 0.0
    number: int = signal.SIGTERM


def saved_images(run_dir: Path) -> int:
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["lit_diffusion"]["images_seen"]


def stopped_in_two(arguments: list[str], run_dir: Path, stop: Stop) -> None:
    """Two processes that something else started: both say 75."""
    places: list[Any] = [None, None]
    if stop.place is not None:
        places[stop.rank] = (*stop.place, stop.number)
    with ExitStack() as started:
        both = [started.enter_context(each) for each in two_processes(arguments, run_dir.parent, tuple(places))]
        target = both[stop.rank]
        if stop.place is None:
            assert until(lambda: listens(target.pid) and reached(run_dir, stop.step)(), target), target.said()
            time.sleep(stop.delay)
            os.kill(target.pid, stop.number)
            sent = time.monotonic()
        codes = [each.wait() for each in both]
        assert stop.place is not None or time.monotonic() - sent < SOON
        assert codes == [STOPPED, STOPPED], "".join(each.said()[-2000:] for each in both)
        assert "stopped by" in both[0].last_line()
        assert "--resume auto continues" in both[0].last_line()
        assert not [pid for each in both for pid in members(each.pid)]
    assert saved_images(run_dir) > 0


def stopped_in_launcher(arguments: list[str], run_dir: Path, stop: Stop) -> None:
    """Two processes of which Lightning starts the second: the first, which a scheduler sees, says 75."""
    with Process([*arguments, *TWO], run_dir.parent, forked=False) as first:

        def ready() -> bool:
            pid = first.pid if stop.rank == 0 else second_process(first)
            return pid is not None and listens(pid) and reached(run_dir, stop.step)()

        assert until(ready, first, poll=0.01), first.said()
        time.sleep(stop.delay)
        if stop.number == signal.SIGINT:  # The terminal sends it to all that stand in the foreground.
            os.killpg(first.pid, stop.number)
        else:
            os.kill(first.pid if stop.rank == 0 else second_process(first) or 0, stop.number)
        sent = time.monotonic()
        assert first.wait() == STOPPED, first.said()[-3000:]
        assert time.monotonic() - sent < SOON
        assert until_gone(first.pid), members(first.pid)
        assert first.said().count("--resume auto continues") == 1
        assert "Traceback" not in first.said()
    assert saved_images(run_dir) > 0


def until_gone(session: int) -> bool:
    """Whether all processes of a session end; the first does not wait for the others."""
    deadline = time.monotonic() + SOON
    while members(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def ends_in_two(arguments: list[str], run_dir: Path) -> None:
    with ExitStack() as started:
        both = [started.enter_context(each) for each in two_processes(arguments, run_dir.parent)]
        assert [each.wait() for each in both] == [0, 0], "".join(each.said()[-2000:] for each in both)


@pytest.fixture(scope="module")
def straight_in_two(tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    made: dict[tuple[str, int], Path] = {}

    def of(method: str, steps: int) -> Path:
        if (method, steps) not in made:
            run_dir = tmp_path_factory.mktemp("two") / "run"
            ends_in_two(command(method, run_dir, steps), run_dir)
            made[method, steps] = run_dir
        return made[method, steps]

    return of


@needs_proc
@pytest.mark.slow
def test_a_stop_of_either_of_two_processes_stops_both_and_loses_nothing(tmp_path, straight_in_two):
    run_dir = tmp_path / "run"
    arguments = command("ncsn", run_dir, SHORT)
    stopped_in_two(arguments, run_dir, Stop(rank=1, place=("walk", 1)))
    stopped_in_two(arguments, run_dir, Stop(rank=0, step=12))
    ends_in_two(arguments, run_dir)
    assert_the_same(straight_in_two("ncsn", SHORT), run_dir, stopped=True, processes=2)


def stops_of(chain: int) -> list[Stop]:
    """Four stops of one run, in the order in which it comes to them."""
    draw = random.Random(chain)
    places = [("save", 1), ("walk", 1), ("film", draw.randrange(1, 12)), ("rename", 1), ("picture", 1), ("step", 3)]
    moments = sorted(draw.randrange(2, LONG - 5) for _ in range(3))
    found = [Stop(draw.randrange(2), step=moment, delay=0.3 * draw.random()) for moment in moments]
    if chain % 2 == 0:
        return [Stop(draw.randrange(2), delay=draw.random()), *found]
    # The first alone writes.
    both = ("walk", "film", "step")
    return [Stop(draw.randrange(2) if place[0] in both else 0, place=place) for place in draw.sample(places, 4)]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("chain", range(5))
def test_two_processes_stopped_at_any_moment_end_as_if_they_never_were(tmp_path, straight_in_two, chain):
    """Twenty stops in all; in every other run the processes are started by Lightning."""
    run_dir = tmp_path / "run"
    arguments = command("ncsn", run_dir, LONG)
    for stop in stops_of(chain):
        (stopped_in_launcher if chain % 2 == 0 else stopped_in_two)(arguments, run_dir, stop)
    if chain % 2 == 0:
        assert "done:" in completed([*arguments, *TWO], tmp_path, forked=False)
    else:
        ends_in_two(arguments, run_dir)
    assert len(events(run_dir, "start")) == 5
    assert_the_same(straight_in_two("ncsn", LONG), run_dir, stopped=True, processes=2)


def test_signals_to_one_process_stop_it_and_the_rest_is_made_when_it_continues(tmp_path, short):
    """SIGUSR1 in a picture, Ctrl-C in the evaluation at the end."""
    run_dir = tmp_path / "run"
    arguments = command("ncsn", run_dir, SHORT)
    for place, said in ((("film", 8, signal.SIGUSR1), "SIGUSR1"), (("walk", 1, signal.SIGINT), "SIGINT")):
        with Process(arguments, tmp_path, place=place) as process:
            assert process.wait() == STOPPED, process.said()[-3000:]
            assert process.last_line().startswith(f"lit_diffusion: stopped by {said} after ")
            assert f"stopped by {said} while sampling; it is made when the run is continued" in process.said()
            assert "Traceback" not in process.said()
        assert events(run_dir)[-1]["status"] == "interrupted"
    assert [event["step"] for event in events(run_dir, "end")] == [15, SHORT]
    completed(arguments, tmp_path)
    assert_the_same(short, run_dir, stopped=True)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_the_main_process_s_and_no_worker_s(tmp_path, short):
    run_dir = tmp_path / "run"
    arguments = command("ncsn", run_dir, SHORT, "--data.num_workers", "2")
    with Process(arguments, tmp_path) as process:
        assert until(reached(run_dir, 3), process), process.said()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait() == STOPPED, process.said()[-3000:]
        assert process.last_line().startswith("lit_diffusion: stopped by SIGTERM after ")
        assert "Traceback" not in process.said()
    (stop,) = events(run_dir, "end")
    assert 3 <= stop["step"] <= 12
    completed(arguments, tmp_path)
    assert_the_same(short, run_dir, stopped=True)


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    run_dir = tmp_path / "run"
    with Process(command("ncsn", run_dir, SHORT), tmp_path, place=("walk", 1, signal.SIGINT, signal.SIGINT)) as process:
        assert process.wait() not in (0, STOPPED)
        assert "Ctrl-C again to stop without saving" in process.said()
        assert "stopped by" not in process.said()
    assert [event["step"] for event in events(run_dir, "train")] == [3, 6, 9, 12]
    assert saved_images(run_dir) == 12 * BATCH  # Before the evaluation that it was in.


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_to_two_processes(tmp_path, straight_in_two, number):
    run_dir = tmp_path / "run"
    arguments = command("ncsn", run_dir, SHORT)
    stopped_in_launcher(arguments, run_dir, Stop(rank=1, step=6, number=number))
    assert "done:" in completed([*arguments, *TWO], tmp_path, forked=False)
    assert_the_same(straight_in_two("ncsn", SHORT), run_dir, stopped=True, processes=2)


# ---- bad states --------------------------------------------------------------------------------------------------


def copied(short: Path, folder: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(short, folder / "run")
    return folder / "run"


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def refused(arguments: list[str], folder: Path) -> str:
    """The one line with which a command line ends, with exit code 2."""
    with Process(arguments, folder) as process:
        assert process.wait() == 2, process.said()[-3000:]
        said = process.said()
    assert "Traceback" not in said
    assert said.count("lit_diffusion: error: ") == 1
    line = said.strip().splitlines()[-1]
    assert line.startswith("lit_diffusion: error: ")
    return line


def test_what_cannot_be_continued_is_refused_in_one_line_and_untouched(tmp_path, short):
    run_dir = copied(short, tmp_path)
    checkpoints = run_dir / "checkpoints"
    resume = command("ncsn", run_dir, SHORT + 3)
    plain = resume[: resume.index("--resume")]
    newer = torch.load(checkpoints / "last.ckpt", weights_only=True)
    newer["lit_diffusion"]["format_version"] = 99

    def only(*names: str) -> None:
        for name in names:
            truncate(checkpoints / name)

    cases: list[tuple[list[str], Any, tuple[str, ...]]] = [
        ([*resume, "--model.backbone.channels", "16"], None, ("does not fit this model", "[8", "[16")),
        (command("ddpm", run_dir, SHORT), None, ("is of NCSN, and the configuration is of DDPM", "--run_dir")),
        (plain, None, ("already holds a run", "--resume auto")),
        ([*resume, "--ckpt_path", str(checkpoints / "last.ckpt")], None, ("--resume auto or --ckpt_path, not both",)),
        (["test", *resume[1:]], None, ("--resume continues a training; test takes --ckpt_path",)),
        ([*plain[: plain.index("--run_dir")], "--resume", "auto"], None, ("--resume auto needs --run_dir",)),
        (resume, lambda: torch.save(newer, checkpoints / "last.ckpt"), ("format_version 99", "last.ckpt")),
        (resume, lambda: only("last.ckpt", "previous.ckpt"), ("cannot read checkpoint", "truncated")),
    ]
    for arguments, spoil, expected in cases:
        if spoil is not None:
            spoil()
        before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
        line = refused(arguments, tmp_path)
        for words in expected:
            assert words in line
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before, line


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, short):
    run_dir = tmp_path / "run"
    run_dir.mkdir()  # That it is there and empty is no reason not to start.
    arguments = command("ncsn", run_dir, SHORT)
    killed(arguments, run_dir, Kill(place=("picture", 2)))
    truncate(run_dir / "checkpoints" / "last.ckpt")
    said = completed(arguments, tmp_path)
    assert "last.ckpt: truncated" in said
    assert f"continuing from {run_dir / 'checkpoints' / 'previous.ckpt'}, the one before" in said
    assert_the_same(short, run_dir)


def test_a_finished_run_is_left_as_it_is(tmp_path, short):
    run_dir = copied(short, tmp_path)
    completed(command("ncsn", run_dir, SHORT), tmp_path)
    assert_the_same(short, run_dir, stopped=True)


def test_a_run_that_began_with_other_weights_continues_with_its_own(tmp_path, short):
    more = ["--init_from", str(short / "checkpoints" / "last.ckpt"), "--model.optimizer.init_args.lr", "0.001"]
    straight = tmp_path / "straight" / "run"
    completed(command("ncsn", straight, SHORT, *more), straight.parent)
    broken = broken_run("ncsn", tmp_path / "broken", SHORT, [Kill(place=("step", 10))], *more)
    assert_the_same(straight, broken)


def test_a_kill_before_the_first_event_is_whole_is_no_obstacle(tmp_path, short):
    run_dir = copied(short, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "samples")
    for torn in ("", '{"event": "sta'):
        (run_dir / "metrics.jsonl").write_text(torn)
        completed(command("ncsn", run_dir, 1, "--samples.count", "0", "--eval.metrics", "[]"), tmp_path)
        shutil.rmtree(run_dir / "checkpoints")
    assert events(run_dir)[0]["event"] == "start"


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_continues(tmp_path, short):
    """On a file system of a few megabytes."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = [bwrap, "--unshare-user", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
    trial = subprocess.run([*sandbox, "true"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no user namespaces here: {trial.stderr.strip()}")
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (short / "checkpoints" / "last.ckpt").stat().st_size
    # Room for the first checkpoint and half of the second.
    total, filler = 20 * size, 20 * size - 3 * size // 2 - 100_000
    fit = " ".join(["python", "-m", "lit_diffusion", *command("ncsn", disk / "run", SHORT)]).replace("[", "\\[")
    fit = fit.replace("python", sys.executable, 1)
    script = f"""
        cd {tmp_path}
        head -c {filler} /dev/zero >disk/filler
        {fit} 2>first.txt; echo $? >first
        cp -r disk/run before
        rm disk/filler
        {fit} 2>second.txt; echo $? >second
        cp -r disk/run after
    """
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    mounts = ["--bind", str(tmp_path), str(tmp_path), "--size", str(total), "--tmpfs", str(disk)]
    subprocess.run(
        [*sandbox, *mounts, "bash", "-c", script], env={**os.environ, **own}, capture_output=True, timeout=PATIENCE
    )
    line = (tmp_path / "first.txt").read_text().strip().splitlines()[-1]
    assert (tmp_path / "first").read_text() == "2\n", line
    assert line.startswith("lit_diffusion: error: cannot write ")
    assert "the one before is untouched: free some space and continue from it" in line
    assert saved_images(tmp_path / "before") == 7 * BATCH
    assert {path.name for path in (tmp_path / "before" / "checkpoints").iterdir()} == {"last.ckpt"}
    assert (tmp_path / "second").read_text() == "0\n", (tmp_path / "second.txt").read_text()[-3000:]
    assert_the_same(short, tmp_path / "after")


# ---- Weights & Biases --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dashboard_gets_every_part_of_a_run_under_one_id(tmp_path, short):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    arguments = command("ncsn", run_dir, SHORT, "--wandb.mode", "auto")
    for number, place in (
        (STOPPED, ("step", 3, signal.SIGTERM)),
        (-signal.SIGKILL, ("walk", 1)),
        (-signal.SIGKILL, ("film", 10)),
    ):
        with Process(arguments, tmp_path, environment, place) as process:
            assert process.wait() == number, process.said()[-3000:]
    said = completed(arguments, tmp_path, environment=environment)
    assert "Weights & Biases is off" not in said
    assert_the_same(short, run_dir, stopped=True)
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 4
    run_id = (run_dir / "run_id").read_text().strip()
    for part in parts:
        assert part.name.endswith(f"-{run_id}")
        assert (part / f"run-{run_id}.wandb").stat().st_size > 0


# ---- any number of processes -------------------------------------------------------------------------------------

EQUAL_STEPS, EQUAL_BATCH = 20, 64


def recipe(method: str, run_dir: Path, *more: str) -> list[str]:
    """The shipped recipe with its own network; only the ends are brought forward."""
    return [
        *("fit", "--config", str(ROOT / "experiments" / f"{method}.yaml"), *METHODS[method].split()),
        *("--data.global_batch_size", str(EQUAL_BATCH), "--trainer.max_images", str(EQUAL_STEPS * EQUAL_BATCH)),
        *("--trainer.accelerator", "cpu", "--wandb.mode", "disabled", "--telemetry.every_n_images", str(EQUAL_BATCH)),
        *("--samples.count", "8", "--eval.samples", "40", "--noise_levels.num_levels", "0", "--run_dir", str(run_dir)),
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_process_two_and_one_that_accumulates_train_the_same_recipe(tmp_path, method):
    one, two, micro = (tmp_path / name / "run" for name in ("one", "two", "micro"))
    seen: dict[Path, dict[int, tuple[float, torch.Tensor]]] = {}

    def noted(folder: Path, rank: int = 0) -> tuple[str, str]:
        return "seen", str(folder / f"seen-{rank}.pt")

    for run_dir, more in ((one, []), (micro, ["--data.micro_batch_size", "32"])):
        completed(recipe(method, run_dir, *more), run_dir.parent, place=noted(run_dir.parent))
    with ExitStack() as started:
        places = (noted(two.parent, 0), noted(two.parent, 1))
        both = [started.enter_context(each) for each in two_processes(recipe(method, two), two.parent, places)]
        assert [each.wait() for each in both] == [0, 0], both[0].said()[-3000:]
    for run_dir in (one, two, micro):
        parts = [torch.load(path, weights_only=True) for path in sorted(run_dir.parent.glob("seen-*.pt"))]
        assert sum(map(len, parts)) == EQUAL_STEPS * EQUAL_BATCH  # No image on two processes.
        seen[run_dir] = {number: given for part in parts for number, given in part.items()}
    for run_dir in (two, micro):
        assert differences(dict(sorted(seen[one].items())), dict(sorted(seen[run_dir].items()))) == []
        first, second = checkpoint_of(one), checkpoint_of(run_dir)
        for name, value in first["state_dict"].items():
            assert torch.allclose(value, second["state_dict"][name], rtol=0.0, atol=1e-5), name
        losses = [[event["loss"] for event in events(each, "train")] for each in (one, run_dir)]
        assert len(losses[0]) == EQUAL_STEPS
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        files = [each / events(each, "evaluation")[-1]["samples_file"] for each in (one, run_dir)]
        assert np.array_equal(*(np.load(file)["arr_0"] for file in files))
