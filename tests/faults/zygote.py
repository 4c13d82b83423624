"""Forks of a process that has imported everything once. In: a function; out: a trial that can be killed and waited for.

The parent never computes with torch and has no threads, so a fork of it is as good as a fresh process, in milliseconds.
"""

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CRASHED = 1  # as Python itself says that an exception ended it; the traceback is in the log


class Hung(Exception):
    """A trial did not end in its time."""


class Trial:
    """A process under test, leader of its own group."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.started_at = time.monotonic()
        self.exit_code: int | None = None

    @property
    def said(self) -> str:
        """What it wrote to standard output and error so far."""
        return self.log.read_text(errors="backslashreplace")

    def running(self) -> bool:
        """Is it still there? Collects it if not."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.exit_code = code if code >= 0 else 128 - code  # as a shell says it
        return self.exit_code is None

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> int:
        """kill -9, now. Returns the exit code: 137, or another if it had ended by itself before."""
        self.send(signal.SIGKILL)
        return self.wait(10)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Until it ends; its exit code, 128 + n after signal n.

        Raises:
            Hung: it has not ended in time. It is killed.
        """
        deadline = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline:
                raise self.hung(f"a trial did not end in {timeout_s:.0f} s")
            time.sleep(0.002)
        assert self.exit_code is not None
        return self.exit_code

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Wait for something to be seen from outside; False if the trial ended first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                raise self.hung(f"a trial did not come to the point in {timeout_s:.0f} s")
        return True

    def hung(self, what: str) -> Hung:
        """End it, and say where it stood: on SIGABRT it writes its stacks."""
        os.kill(self.pid, signal.SIGABRT)
        time.sleep(1.0)
        self.end_group()
        return Hung(f"{what}: {self.said[-3000:]}")

    def orphans(self) -> bool:
        """Has it ended and left children behind?"""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return not self.running()

    def end_group(self) -> None:
        """Kill it and all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.exit_code is None:
            os.waitpid(self.pid, 0)
            self.exit_code = 128 + signal.SIGKILL


def fork(work: Callable[[], int], log: Path) -> Trial:
    """Run `work` in a child, its output in `log`; it returns the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Trial(pid, log)
    code = CRASHED
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        faulthandler.enable(output)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:  # a child must never return into the parent's code
        traceback.print_exc()
    finally:
        with suppress(Exception):  # whatever a trial has made of them
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# What every trial needs. Not all of it is imported by the command's own door.
NEEDED = (
    *("matplotlib.pyplot", "torch._dynamo", "regpt2.commands.train", "regpt2.run.loop", "regpt2.evals.val_loss"),
    *("regpt2.training.optim.adamw", "regpt2.training.optim.muon"),
)


def warm_up() -> None:
    """Import once what every trial needs. Computes nothing."""
    for name in NEEDED:
        importlib.import_module(name)
