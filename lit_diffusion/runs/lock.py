"""One writer a run: ``RUN/lock`` names the process that writes into a run's directory, and no other may.

The file is made by what every shared file system does for one process only (link(2), or O_EXCL where there are no hard
links; no flock, which NFS may not pass on). While the process lives, a thread renews the file's time every
:data:`BEAT` seconds: no block of a full disk is needed for it, no random number is drawn, and it takes no part in
what is computed.

Whether a holder is dead is decided

- on one machine by its process: gone, a zombie, or another one that got its number, which its start time tells. Of a
  process in another container or before a reboot nothing can be said this way: pid namespace and boot id must agree;
- otherwise by its sign of life: a time that did not change while this process watched for :data:`SILENCE` seconds.
  The clocks of two machines are never compared.

A dead holder's lock is taken over by who first makes a file that is named after that very lock. A writer that was only
silent, suspended for instance, finds at its next event or checkpoint that it has lost the run, and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lit_diffusion import interrupts
from lit_diffusion.errors import UserError

LOCK = "lock"
"""The file's name in a run's directory."""

BEAT = 15.0
"""Seconds between two signs of life."""

SILENCE = 90.0
"""Seconds without a sign of life after which a holder that cannot be seen is dead."""

PROC = Path("/proc")


# ---- processes ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where process numbers mean the same: machine, boot and pid namespace; None where the system does not tell."""

    host: str
    boot: str | None
    namespace: str | None


def this_place() -> Place:
    """Of this process."""
    boot = namespace = None
    with suppress(OSError):
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink(PROC / "self/ns/pid")
    return Place(socket.gethostname(), boot, namespace)


def started(pid: int) -> str | None:
    """When a process of this place started, in whatever the system counts; empty where it exists and does not show it.

    None: there is none of this number, or only a zombie, which writes nothing any more.
    """
    hidden = False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # Somebody else's, which /proc may be told to hide.
        hidden = True
    if not (PROC / "self/stat").exists():  # macOS
        return _started_by_ps(pid)
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if hidden else None
    return None if fields[0] in "ZX" else fields[19]


def _started_by_ps(pid: int) -> str | None:
    try:
        command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
        state, *when = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        return ""
    except ValueError:  # Gone in between.
        return None
    return None if state.startswith("Z") else " ".join(when)


@cache
def _started_here(pid: int) -> str | None:
    """Of this process, asked once: it does not change."""
    return started(pid)


# ---- what a lock says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: random, so that no two locks are equal.
        place: where ``pid`` means something.
        pid: of the process.
        started: when it started, see :func:`started`.
        since: the time by its own clock, for a reader.
        command: that it runs.
    """

    token: str
    place: Place
    pid: int
    started: str | None
    since: str
    command: str

    def __str__(self) -> str:
        """In a sentence."""
        return f"process {self.pid} on {self.place.host} since {self.since} ({self.command})"

    def to_json(self) -> bytes:
        """For the file."""
        return f"{json.dumps({**asdict(self), 'place': self.place._asdict()}, indent=1)}\n".encode()

    @classmethod
    def from_json(cls, content: bytes) -> Holder | None:
        """Of a file's content; None where a crash or a full disk has left no whole one."""
        try:
            found = json.loads(content)
            holder = cls(**{**found, "place": Place(**found["place"])})
        except (ValueError, TypeError, KeyError):
            return None
        return holder if isinstance(holder.pid, int) and holder.pid > 0 else None

    def is_this_process(self) -> bool:
        """Whether the lock was taken here, perhaps by another object."""
        return self.pid == os.getpid() and self.place == this_place() and self.started == _started_here(self.pid)

    def lives(self) -> bool | None:
        """Whether its process runs; None where that cannot be seen from here."""
        if self.place != this_place():
            return None
        now = started(self.pid)
        if now is not None and "" in (now, self.started):
            return None
        return now is not None and now == self.started


def _this_holder() -> Holder:
    pid = os.getpid()
    command = " ".join(
        ["python -m lit_diffusion" if sys.argv[0].endswith("__main__.py") else sys.argv[0], *sys.argv[1:]]
    )
    if len(command) > 120:
        command = f"{command[:117]}..."
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Holder(secrets.token_hex(8), this_place(), pid, _started_here(pid), now, command)


# ---- files -------------------------------------------------------------------------------------------------------


class _Sign(NamedTuple):
    """A lock as it was seen: what it says, and when it was last renewed."""

    content: bytes
    time: int


def _look(path: Path) -> _Sign | None:
    """A lock; None where there is none."""
    try:
        # To open a file asks a network's server how it is now; its status alone may be minutes old.
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _Sign(os.read(descriptor, 1 << 16), os.fstat(descriptor).st_mtime_ns)
    finally:
        os.close(descriptor)


def _make(path: Path, content: bytes) -> bool:
    """Make a file that is whole from its first moment; whether it was made, and not there already."""
    temporary = path.with_name(f".{LOCK}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            found = _look(path)  # A network that lost the server's answer asks again, and is told that it is there.
            return found is not None and found.content == content
        except OSError:  # A file system without hard links.
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                return False
            with open(descriptor, "wb") as file:
                file.write(content)
        return True
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _heir(path: Path, content: bytes) -> Path:
    """The file that only one process can make to succeed a dead lock of that content."""
    return path.with_name(f".{LOCK}.{hashlib.sha256(content).hexdigest()[:16]}")


# ---- the lock ----------------------------------------------------------------------------------------------------


class RunLock:
    """The right to write into a run's directory, for one process.

    It ends by :meth:`release`, with this object, or with the interpreter. A killed process leaves it to be taken over.

    Args:
        run_dir: of the run; made if it is not there, and removed again if nothing was written into it.
        say: tells the person at the terminal that a lock is waited for or taken over.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.given = run_dir
        self.run_dir = Path(run_dir).absolute()
        self.path = self.run_dir / LOCK
        self._say = say
        self._content = b""
        self._pid = 0
        self._refusal: UserError | None = None
        self._held: _Held | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a process that is spawned: it takes over from its parent, see :meth:`take`."""
        return {**self.__dict__, "_held": None}

    @property
    def held(self) -> bool:
        """Whether this process took it and did not give it back."""
        return self._held is not None and self._pid == os.getpid()

    def take(self, wait: bool = False) -> None:
        """Take the lock, a dead holder's too; nothing happens where it is held already.

        A process that was forked or spawned by the holder to do its work succeeds it: it may outlive its parent.

        Args:
            wait: for a holder that cannot be seen from here, until it gives a sign of life or :data:`SILENCE` is over.

        Raises:
            UserError: if another process holds it, or the directory cannot be written; always the same after the first.
        """
        if self.held:
            return
        if self._refusal is not None:
            raise self._refusal
        missing = [folder for folder in (self.run_dir, *self.run_dir.parents) if not folder.exists()]
        content = _this_holder().to_json()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            while not self._taken(content, wait):
                pass
        except OSError as error:
            _remove_empty(missing)
            raise UserError(
                f"cannot make the run's directory {self.given}: {error}; choose another with --run_dir"
            ) from error
        except UserError as error:
            _remove_empty(missing)
            self._refusal = error
            raise
        self._content, self._pid = content, os.getpid()
        self._held = _Held(self.path, content, missing)
        weakref.finalize(self, self._held.release)

    def _taken(self, content: bytes, wait: bool) -> bool:
        """One attempt; whether it came to an end, since another process may be at it."""
        path, dead = self.path, list[tuple[Path, _Sign, str]]()
        while not _make(path, content):
            there = _look(path)
            if there is None:
                return False
            why = self._why_free(path, there, wait)
            if why is None:
                return False
            dead.append((path, there, why))
            path = _heir(path, there.content)
        if not dead:
            return True
        first, sign, why = dead[0]
        now = _look(first)
        if now is None or now.content != sign.content:  # It had an heir before.
            path.unlink(missing_ok=True)
            return False
        path.replace(first)
        for heir, _, _ in dead[1:]:
            heir.unlink(missing_ok=True)
        if why:
            self._say(why)
        return True

    def _why_free(self, path: Path, there: _Sign, wait: bool) -> str | None:
        """Why a lock that is there may be taken, empty where that is no news; None: it is not there any more.

        Raises:
            UserError: if its holder lives, or nobody can tell.
        """
        holder = Holder.from_json(there.content)
        who = "somebody" if holder is None else str(holder)
        if holder is not None and (holder.is_this_process() or there.content == self._content):
            return ""
        lives = None if holder is None else holder.lives()
        if lives is False:
            return f"took over {self.given} from {who}: that process is gone"
        held = f"{self.given} is being written by {who}; a run has one writer: "
        if lives:
            raise UserError(f"{held}wait until it has ended, or give another --run_dir")
        if not wait:
            raise UserError(
                f"{held}whether that one still lives cannot be seen from here (another machine, container or boot): "
                f"fit --run_dir {self.given} --resume auto watches it for {SILENCE:.0f} s and takes a dead one over"
            )
        self._say(f"{self.given} was being written by {who}: waiting up to {SILENCE:.0f} s for a sign of life")
        begun = time.monotonic()
        while time.monotonic() - begun < SILENCE:
            time.sleep(1.0)
            if (by := interrupts.asked()) is not None:
                raise interrupts.Interrupted(f"stopped by {by} while waiting for {self.given}: nothing was changed")
            now = _look(path)
            if now is None:
                return None
            if now != there:
                raise UserError(f"{held}it is alive; wait until it has ended, or give another --run_dir")
        return f"took over {self.given} from {who}: no sign of life for {SILENCE:.0f} s"

    def require_free(self) -> None:
        """Refuse where a run is being written, after a wait where that cannot be seen at once.

        Raises:
            UserError: naming the writer.
        """
        with suppress(OSError):
            if (there := _look(self.path)) is not None:
                self._why_free(self.path, there, wait=True)

    def lost(self) -> str | None:
        """Why this process may no longer write, None where it may: it was silent, and another has taken the run over.

        A lock that is not there may have been taken over and given back since: it is not made again.
        """
        if self._held is None or not self.held or self._held.is_there():
            return None
        now = writer_of(self.run_dir)
        return (
            f"this process has lost {self.given} ({f'taken over by {now}' if now else 'its lock is gone'}), and writes "
            f"nothing more into it: what is there can be continued with --resume auto"
        )

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._held is not None:
            self._held.release()
            self._held = None


def writer_of(run_dir: Path) -> str | None:
    """Who writes into a run's directory, as far as the file says; None for nobody, or a process that is gone."""
    with suppress(OSError):
        if (there := _look(Path(run_dir) / LOCK)) is not None:
            holder = Holder.from_json(there.content)
            return "somebody" if holder is None else str(holder) if holder.lives() is not False else None
    return None


class _Held:
    """A lock that is held, and the thread that says so.

    Args:
        path: of the file.
        content: of it.
        made: folders that were made for it, the innermost first.
    """

    def __init__(self, path: Path, content: bytes, made: list[Path]) -> None:
        self.path = path
        self.content = content
        self.made = made
        self._pid = os.getpid()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT) and self.is_there():
            with suppress(OSError):
                os.utime(self.path)

    def is_there(self) -> bool:
        """Whether the file is still this one; a disk in trouble says nothing of other writers."""
        try:
            there = _look(self.path)
        except OSError:
            return True
        return there is not None and there.content == self.content

    def release(self) -> None:
        """End the beat and remove the file, and what else was made for it if that is empty."""
        self._ended.set()
        if os.getpid() == self._pid and self.is_there():  # Of a forked child it is its parent's.
            with suppress(OSError):
                self.path.unlink()
                _remove_empty(self.made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made in vain, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
