"""Interrupts: a signal sets a flag, and a run looks at it where it can stop without losing anything.

A handler that saves, or that talks to the other processes, does so in the middle of whatever the process was doing: a
file half written, a sum over the processes half done. So ours only remembers which signal came. Training looks at the
flag once a step, together with the other processes, so that all of them stop after the same step; sampling looks at it
between network evaluations.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from lit_diffusion.errors import UserError

EXIT_CODE = 75
"""Exit code of a run that saved its state after a signal and can be continued: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to stop: a scheduler's or a container's end, a scheduler's warning, Ctrl-C."""

_asked: str | None = None


class Interrupted(UserError):
    """Exception of a run that stops because it was asked to.

    Args:
        message: the reason, in one line.
        exit_code: the process's exit code.
        quiet: if true, do not print the message: another process does.
    """

    def __init__(self, message: str, exit_code: int = EXIT_CODE, quiet: bool = False) -> None:
        super().__init__(message, ends_run=True)
        self.exit_code = exit_code
        self.quiet = quiet


def _remember(number: int, frame: FrameType | None, *, owner: int) -> None:
    global _asked
    if os.getpid() != owner:  # A data worker, forked with this handler: the main process ends it.
        return
    if number == signal.SIGINT:
        if _asked is not None:
            raise KeyboardInterrupt
        # Not print: the handler may have interrupted one.
        os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again to stop without saving\n")
    _asked = signal.Signals(number).name


def listen() -> None:
    """Install handlers that set the flag; in the main thread only."""
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        _remember(number, frame, owner=owner)

    for each in SIGNALS:
        signal.signal(each, handler)


def forget() -> None:
    """Restore the default handlers and clear the flag."""
    global _asked
    _asked = None
    for each in SIGNALS:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)


def asked() -> str | None:
    """The name of the signal that came to this process, None for none."""
    return _asked


def leave_it_to_the_main_process(worker: int = 0) -> None:
    """Ignore the signals, in a data worker: one to the whole process group must not end it before the run has saved."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
