"""A failure of what is done beside the training, a picture or a metric: it is told and counted, and the run goes on.

Of several processes one may fail alone, while the others go on to their next exchange, where they would wait for it for
ever. So inside an :class:`Attempt` every exchange begins with word of how everybody is: who has failed says so there,
and all leave the attempt together.
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
"""Characters of a failure that are kept; of a traceback the last ones."""


@dataclass(frozen=True)
class Failure:
    """An exception in plain words, so that processes can tell each other.

    Attributes:
        kind: of the exception, its class.
        message: one line.
        place: file and line of this package that it came through last.
        traceback: its last lines.
        ends_run: whether a run must not go on after it.
        process: the rank that it happened on.
        depth: of the attempt that it ended; 1 for the outermost.
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
        """What is to be known of an exception that was caught on this process."""
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
    """Ends the work of a process, since another's failed.

    Args:
        failures: of the others.
    """

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("; ".join(map(str, failures)))
        self.failures = failures


class AloneError(UserError):
    """A failure in the middle of what all processes compute together: they wait, and nobody can tell them."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ends_run=True)


_depth = 0
"""Attempts that this process is in."""


class Attempt:
    """A block whose failure is kept instead of raised; on several processes, which all enter it, a failure of all.

    What must end a run passes through: an interrupt, and a :class:`~lit_diffusion.errors.UserError` that says so.

    Attributes:
        failures: of the block, of whichever processes; empty if all is well.
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
        if isinstance(error, AloneError) or not isinstance(error, Exception | None) or hasattr(error, "told_to_all"):
            return False
        if isinstance(error, FailedElsewhereError):
            found = error.failures
        else:
            found = _told(None if error is None else Failure.of(error, self._depth))
        if not found:
            return False
        ending = [failure for failure in found if failure.ends_run]
        if ending:
            own = isinstance(error, UserError) and error.ends_run
            final = error if own else UserError(ending[0].message, ends_run=True)
            assert final is not None
            final.told_to_all = True  # type: ignore[attr-defined]  # No attempt around this one tells it again.
            if own:
                return False
            raise final from error
        if min(failure.depth for failure in found) < self._depth:  # Another has left an attempt around this one.
            raise FailedElsewhereError(found) from error
        self.failures, self.error = found, error
        return True


def agree() -> None:
    """Before an exchange: leave the attempt if another process has failed in it; all processes come.

    Raises:
        FailedElsewhereError: if one has.
    """
    if _depth and (found := _told(None)):
        raise FailedElsewhereError(found)


def _told(mine: Failure | None) -> list[Failure]:
    """The failures of all processes, in their order."""
    return [failure for failure in said_by_all(mine) if failure is not None]


def many_processes() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this process speaks and writes for all; by its launcher's word where they are not connected yet."""
    if many_processes():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def said_by_all(mine: T) -> list[T]:
    """What each process says, in the processes' order, without word of failures before; all processes come."""
    if not many_processes():
        return [mine]
    shares: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares
