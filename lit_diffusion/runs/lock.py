"""One writer a run: ``RUN/lock`` names the process that writes into a run's directory, and no other may.

The file is made by an operation that every shared file system grants to one process only (link(2), or O_EXCL where
there are no hard links; no flock, which NFS may not pass on). While the process lives, a thread renews the file's time
every :data:`BEAT` seconds, which needs no block of a full disk, draws no random number and computes nothing.

A holder counts as dead

- on one machine by its process: gone, a zombie, or another process with its number and another start time. This says
  nothing of a process in another container or before a reboot: pid namespace and boot id must agree;
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
"""Name of the lock file in a run's directory."""

BEAT = 15.0
"""Seconds between two renewals of the file's time, the signs of life."""

SILENCE = 90.0
"""Seconds without a sign of life after which a holder whose process cannot be seen counts as dead."""

PROC = Path("/proc")


# ---- processes ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Scope of process numbers: machine, boot and pid namespace; None where the system does not show it."""

    host: str
    boot: str | None
    namespace: str | None


def this_place() -> Place:
    """The scope of this process's number."""
    boot = namespace = None
    with suppress(OSError):
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink(PROC / "self/ns/pid")
    return Place(socket.gethostname(), boot, namespace)


def started(pid: int) -> str | None:
    """Start time of a process of this place, in the system's own unit; empty where it exists and does not show it.

    None: there is no process of this number, or only a zombie, which writes nothing any more.
    """
    hidden = False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # Another user's, which /proc may hide.
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
    """Start time of this process, cached: it does not change."""
    return started(pid)


# ---- the content of a lock ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        token: random, so that no two locks are equal.
        place: scope of ``pid``.
        pid: the process's number.
        started: its start time, see :func:`started`.
        since: time of the lock by the process's own clock, for a reader.
        command: the command that it runs.
    """

    token: str
    place: Place
    pid: int
    started: str | None
    since: str
    command: str

    def __str__(self) -> str:
        """The holder as a part of a sentence."""
        return f"process {self.pid} on {self.place.host} since {self.since} ({self.command})"

    def to_json(self) -> bytes:
        """Content of the lock file."""
        return f"{json.dumps({**asdict(self), 'place': self.place._asdict()}, indent=1)}\n".encode()

    @classmethod
    def from_json(cls, content: bytes) -> Holder | None:
        """Parse a lock file's content; None where a crash or a full disk has left no whole one."""
        try:
            found = json.loads(content)
            holder = cls(**{**found, "place": Place(**found["place"])})
        except (ValueError, TypeError, KeyError):
            return None
        return holder if isinstance(holder.pid, int) and holder.pid > 0 else None

    def is_this_process(self) -> bool:
        """True where the lock was taken by this process, perhaps by another object."""
        return self.pid == os.getpid() and self.place == this_place() and self.started == _started_here(self.pid)

    def lives(self) -> bool | None:
        """True where its process runs, false where it does not, None where that cannot be seen from here."""
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
    """A lock file as seen: its content, and the time of its last renewal in ns."""

    content: bytes
    time: int


def _look(path: Path) -> _Sign | None:
    """Read a lock file; None where there is none."""
    try:
        # Opening a file makes a network file system ask its server; the status alone may be minutes old.
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _Sign(os.read(descriptor, 1 << 16), os.fstat(descriptor).st_mtime_ns)
    finally:
        os.close(descriptor)


def _make(path: Path, content: bytes) -> bool:
    """Make a file that is whole from its first moment; false where it was there already."""
    temporary = path.with_name(f".{LOCK}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            found = _look(path)  # A network that lost the server's answer asks again, and finds it.
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
    """Path of the file that only one process can make, to succeed a dead lock of that content."""
    return path.with_name(f".{LOCK}.{hashlib.sha256(content).hexdigest()[:16]}")


# ---- the lock ----------------------------------------------------------------------------------------------------


class RunLock:
    """The right to write into a run's directory, for one process.

    It ends by :meth:`release`, with this object, or with the interpreter. A killed process leaves it to be taken over.

    Args:
        run_dir: the run's directory; made if it is not there, and removed again if nothing was written into it.
        say: prints that a lock is waited for or taken over.
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
        """State for a process that is spawned, which takes over from its parent, see :meth:`take`."""
        return {**self.__dict__, "_held": None}

    @property
    def held(self) -> bool:
        """True where this process took the lock and did not release it."""
        return self._held is not None and self._pid == os.getpid()

    def take(self, wait: bool = False) -> None:
        """Take the lock, a dead holder's too; do nothing where it is held already.

        A process that was forked or spawned by the holder to do its work succeeds it: it may outlive its parent.

        Args:
            wait: if true, wait for a holder that cannot be seen from here, until it gives a sign of life or
                :data:`SILENCE` seconds are over.

        Raises:
            UserError: if another process holds it, or the directory cannot be written; repeated by later calls.
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
        """Make one attempt; false where it must be repeated, since another process changed the lock meanwhile."""
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
        if now is None or now.content != sign.content:  # Another process succeeded it first.
            path.unlink(missing_ok=True)
            return False
        path.replace(first)
        for heir, _, _ in dead[1:]:
            heir.unlink(missing_ok=True)
        if why:
            self._say(why)
        return True

    def _why_free(self, path: Path, there: _Sign, wait: bool) -> str | None:
        """Reason why an existing lock may be taken, empty where there is nothing to report; None: it is gone.

        Raises:
            UserError: if its holder lives, or may live.
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
        """Refuse a run that is being written, after a wait where that cannot be seen at once.

        Raises:
            UserError: naming the writer.
        """
        with suppress(OSError):
            if (there := _look(self.path)) is not None:
                self._why_free(self.path, there, wait=True)

    def lost(self) -> str | None:
        """Reason why this process may no longer write (another has taken the run over); None where it may.

        A lock that is gone may have been taken over and released since: it is not made again.
        """
        if self._held is None or not self.held or self._held.is_there():
            return None
        now = writer_of(self.run_dir)
        return (
            f"this process has lost {self.given} ({f'taken over by {now}' if now else 'its lock is gone'}), and writes "
            f"nothing more into it: what is there can be continued with --resume auto"
        )

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._held is not None:
            self._held.release()
            self._held = None


def writer_of(run_dir: Path) -> str | None:
    """The process that writes into a run's directory, by its lock file; None if there is none, or it is gone."""
    with suppress(OSError):
        if (there := _look(Path(run_dir) / LOCK)) is not None:
            holder = Holder.from_json(there.content)
            return "somebody" if holder is None else str(holder) if holder.lives() is not False else None
    return None


class _Held:
    """A lock that is held, and the thread that renews its time.

    Args:
        path: the lock file.
        content: its content.
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
        """True where the file is still this one; a failing disk says nothing of other writers."""
        try:
            there = _look(self.path)
        except OSError:
            return True
        return there is not None and there.content == self.content

    def release(self) -> None:
        """Stop the thread and remove the file, and the folders made for it if they are empty."""
        self._ended.set()
        if os.getpid() == self._pid and self.is_there():  # In a forked child it is the parent's.
            with suppress(OSError):
                self.path.unlink()
                _remove_empty(self.made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made in vain, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
