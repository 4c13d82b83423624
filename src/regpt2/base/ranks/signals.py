"""Stopping. In: Ctrl-C and other signals; out: a flag that the loop looks at between updates; and a sure way out."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from regpt2.base.ranks.watchdog import tell

# SIGTERM: Kubernetes, torchrun, kill. SIGHUP: the terminal was closed, the connection is gone. SIGUSR1: Slurm's usual
# warning before the time limit. Windows has neither of the last two.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def leave_if_one_of_many(code: int) -> None:
    """End this process at once, if it is a rank among several and all is written.

    torch's process groups, when they are destroyed, wait for threads that may wait for the interpreter, which waits for
    them: about one run in a hundred on two ranks (gloo, torch 2.13) had finished and did not end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Stopped(Exception):
    """Long work between updates gave way to a signal. Not a failure."""


class StopSignals:
    """While it is entered, the first of STOP_SIGNALS sets `received`; a second SIGINT interrupts at once.

    SIGHUP stays ignored in a process that was started so, as `nohup` does.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, number
        if first:  # not by sys.stderr, which may be in the middle of a line
            again = " again" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            tell(f"warning: {name}: leaving after this update; Ctrl-C{again} leaves at once.\n")
