"""Stopping. In: Ctrl-C and other signals; out: a flag that the loop reads between updates; a safe exit of a rank."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from regpt2.base.ranks.watchdog import tell

# SIGTERM: Kubernetes, torchrun, kill. SIGHUP: the terminal was closed or the connection lost. SIGUSR1: Slurm's usual
# warning before the time limit. Windows has neither of the last two.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def leave_if_one_of_many(code: int) -> None:
    """End this process at once, if it is one of several ranks; all files must have been written.

    Destroying torch's process groups can deadlock: they wait for threads that wait for the interpreter, which waits for
    them. About one finished run in a hundred on two ranks (gloo, torch 2.13) never exited.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Stopped(Exception):
    """A signal interrupted long work between updates. Not a failure."""


class StopSignals:
    """Inside this context the first of STOP_SIGNALS sets `received`; a second SIGINT interrupts at once.

    SIGHUP stays ignored if the process was started that way, as by `nohup`.
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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, number
        if first:  # not through sys.stderr: the signal may have interrupted a write to it
            again = " again" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            tell(f"warning: {name}: stopping after this update; Ctrl-C{again} stops at once.\n")
