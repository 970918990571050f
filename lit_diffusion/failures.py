"""Failures of a picture or a metric beside the training: they are reported and counted, and the run goes on.

Of several processes one may fail alone, while the others go on to their next exchange, where they would wait for it for
ever. So inside an :class:`Attempt` every exchange begins with a check: a process that has failed reports it there, and
all leave the attempt together.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from lit_diffusion.errors import UserError

T = TypeVar("T")

LONGEST_MESSAGE, LONGEST_TRACEBACK = 500, 4000
"""Numbers of characters kept of a failure's message and of the end of its traceback."""


@dataclass(frozen=True)
class Failure:
    """An exception as plain text, which processes can exchange.

    Attributes:
        kind: name of the exception's class.
        message: its message in one line.
        place: last file and line of this package in its traceback.
        traceback: the end of its traceback.
        ends_run: true where a run must not go on after it.
        process: the rank that it happened on.
        depth: depth of the attempt that it ended; 1 for the outermost.
    """

    kind: str
    message: str
    place: str
    traceback: str
    ends_run: bool = False
    process: int = 0
    depth: int = 0

    @classmethod
    def of(cls, error: BaseException, depth: int = 0) -> Failure:
        """Describe an exception that was caught on this process."""
        root = Path(__file__).parent
        frames = traceback.extract_tb(error.__traceback__)
        mine = [frame for frame in frames if root in Path(frame.filename).parents] or frames
        place = f"{Path(mine[-1].filename).name}:{mine[-1].lineno}" if mine else "unknown place"
        return cls(
            kind=type(error).__name__,
            message=" ".join(str(error).split())[:LONGEST_MESSAGE],
            place=place,
            traceback="".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:],
            ends_run=isinstance(error, UserError) and error.ends_run,
            process=dist.get_rank() if many_processes() else 0,
            depth=depth,
        )

    def __str__(self) -> str:
        where = f"{self.place}, process {self.process}" if self.process else self.place
        return f"{self.kind}: {self.message} ({where})" if self.message else f"{self.kind} ({where})"


class FailedElsewhereError(Exception):
    """Exception that ends an attempt on this process because another process failed in it.

    Args:
        failures: the other processes' failures.
    """

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("; ".join(map(str, failures)))
        self.failures = failures


class AloneError(UserError):
    """Failure of one process in a joint computation, where the others wait and cannot be informed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ends_run=True)


_depth = 0
"""Number of nested attempts that this process is in."""


class Attempt:
    """Context that keeps a failure instead of raising it; collective, and a failure of one process is one of all.

    Exceptions that must end a run pass through: an interrupt, and a :class:`~lit_diffusion.errors.UserError` with
    ``ends_run``.

    Attributes:
        failures: failures of the block on any process; empty if there were none.
        error: this process's own exception.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.error: Exception | None = None

    def __enter__(self) -> Attempt:
        global _depth
        _depth += 1
        self._depth = _depth
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        global _depth
        _depth = self._depth - 1
        if isinstance(error, AloneError) or not isinstance(error, Exception | None) or hasattr(error, "known_to_all"):
            return False
        if isinstance(error, FailedElsewhereError):
            found = error.failures
        else:
            found = _all_failures(None if error is None else Failure.of(error, self._depth))
        if not found:
            return False
        ending = [failure for failure in found if failure.ends_run]
        if ending:
            own = isinstance(error, UserError) and error.ends_run
            final = error if own else UserError(ending[0].message, ends_run=True)
            assert final is not None
            final.known_to_all = True  # type: ignore[attr-defined]  # No attempt around this one reports it again.
            if own:
                return False
            raise final from error
        if min(failure.depth for failure in found) < self._depth:  # Another process has left an outer attempt.
            raise FailedElsewhereError(found) from error
        self.failures, self.error = found, error
        return True


def agree() -> None:
    """Leave the attempt if another process has failed in it; a collective call, made before every exchange.

    Raises:
        FailedElsewhereError: if another process has failed.
    """
    if _depth and (found := _all_failures(None)):
        raise FailedElsewhereError(found)


def _all_failures(mine: Failure | None) -> list[Failure]:
    """The failures of all processes, in their order."""
    return [failure for failure in gather_unchecked(mine) if failure is not None]


def many_processes() -> bool:
    """True where there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """True where this process prints and writes for all; by its launcher's variables before they are connected."""
    if many_processes():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def gather_unchecked(mine: T) -> list[T]:
    """Gather an object of each process, in the processes' order, without a check for failures; a collective call."""
    if not many_processes():
        return [mine]
    shares: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares
