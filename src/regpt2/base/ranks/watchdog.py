"""Ends a run that hangs. In: a beat with each piece of work; out: the stacks of all ranks, exit code HUNG.

A thread of each rank renews a small file in a folder that all ranks share. A rank without a beat for `timeout_s` reads
the files of all: ranks whose threads do not tick are frozen (stopped, in C code that keeps the GIL, on a dead machine);
if there are none, those with the fewest beats are behind. The first rank to judge writes `verdict.json` and reports;
then all dump their stacks and exit, so that torchrun can restart them.

A rank whose torchrun was killed would keep training alone, with the folder locked: it is asked to stop. So is a run
that `regpt2 compare` started.

It cannot end C code that keeps the GIL in a run of one process (no other process sees it; `kill -USR2 PID` still writes
the stacks), nor a hang of the file system that holds the folder.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from regpt2.base.files import describe_os_error
from regpt2.base.ranks import heartbeats
from regpt2.base.ranks.heartbeats import Beat, Diagnosis

HUNG = 70  # the exit code of every rank of a run that hung; EX_SOFTWARE of sysexits.h
PARENT = "REGPT2_PARENT"  # environment variable: the process whose end also ends this run
JOIN_S = 1.2  # after a verdict: longer than a tick, so that every rank sees it and dumps its stacks
WAKE_S = 0.8  # after that: for the stacks of frozen ranks, also those on other machines


class Watchdog:
    """Watches this rank inside its context. `folder` is the same for all ranks; `timeout_s = 0` turns it off."""

    def __init__(self, folder: Path, rank: int, size: int, timeout_s: float) -> None:
        self.folder, self.rank, self.size, self.timeout_s = folder, rank, size, timeout_s
        self._tick_s = min(1.0, timeout_s / 10)
        self._last = (0, "starting")  # beats, and what is done: one tuple, so that the thread sees no half change
        self._ticks = 0
        self._warned = False
        self._stacks: IO[str] | None = None
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else int(os.environ.get(PARENT, 0)) or None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if not self.timeout_s:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_former_attempt()
            # Appended to: what a hang left can still be read after the restart.
            self._stacks = open(heartbeats.stacks_file(self.folder, self.rank), "a", encoding="utf-8")
        except OSError as error:
            self._warn(error)
        if sys.platform != "win32":  # a handler in C: it works while other C code keeps the GIL
            faulthandler.register(signal.SIGUSR2, file=self._stacks or 2, all_threads=True)
        self._renew(idle_s=0.0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.timeout_s:
            return
        self._leaving.set()
        self._thread.join()
        if kind is not None and self.size > 1:  # other ranks may still wait for this one: its file says why
            self.beat(f"{self._last[1]}, left by {kind.__name__}", counted=False)
            self._renew(idle_s=0.0)
        if sys.platform != "win32":
            faulthandler.unregister(signal.SIGUSR2)
        if self._stacks is not None:
            self._stacks.close()
        if kind is None or self.size == 1:
            with contextlib.suppress(OSError):
                heartbeats.beat_file(self.folder, self.rank).unlink(missing_ok=True)
                unlink_if_empty(heartbeats.stacks_file(self.folder, self.rank))
                self.folder.rmdir()  # succeeds for the last rank, unless there are stacks of a hang

    def beat(self, doing: str, *, counted: bool = True) -> None:
        """Report progress. Counts show which rank is behind, so work that not all ranks do must not be `counted`."""
        self._last = (self._last[0] + counted, doing)

    def _clear_former_attempt(self) -> None:
        heartbeats.verdict_file(self.folder).unlink(missing_ok=True)
        ranks = range(self.size)
        if self.rank == 0:  # what ranks of a larger world left; the others' files are replaced by themselves
            for path in set(self.folder.glob("rank-*.json")) - {heartbeats.beat_file(self.folder, r) for r in ranks}:
                path.unlink(missing_ok=True)
            for path in set(self.folder.glob("rank-*.txt")) - {heartbeats.stacks_file(self.folder, r) for r in ranks}:
                unlink_if_empty(path)

    def _watch(self) -> None:
        before: dict[int, Beat] = {}  # the files of all ranks at half time
        last, idle_s, ticked_at = self._last, 0.0, time.monotonic()
        while not self._leaving.wait(self._tick_s):
            now = time.monotonic()
            # While this process is stopped (Ctrl-Z, a sleeping laptop) it does not tick: that time must not count.
            idle_s += min(now - ticked_at, 2 * self._tick_s)
            ticked_at = now
            if self._last is not last:
                last, idle_s = self._last, 0.0
            self._renew(idle_s)
            if self._agent is not None and os.getppid() != self._agent:
                self._agent = None
                tell(f"warning: the process that started rank {self.rank} is gone; it stops too.\n")
                os.kill(os.getpid(), signal.SIGTERM)  # as torchrun itself would have asked
            if idle_s < self.timeout_s / 2:  # thousands of ranks do not read thousands of files while all is well
                before = {}
                continue
            before = before or heartbeats.read_beats(self.folder, self.size)
            verdict = heartbeats.read_verdict(self.folder)
            if verdict is not None:
                self._end(verdict, before, speaks=False)
            elif idle_s >= self.timeout_s:
                verdict = self._judge(before)
                first = self._publish(verdict)
                self._end(verdict if first else heartbeats.read_verdict(self.folder) or verdict, before, speaks=first)

    def _judge(self, before: dict[int, Beat]) -> Diagnosis:
        now = heartbeats.read_beats(self.folder, self.size)
        mine = now.get(self.rank)
        if mine is None or (mine.pid, mine.ticks) != (os.getpid(), self._ticks):
            # If this rank cannot write its file, those of others may be just as old: blame no rank.
            return Diagnosis(f"  rank {self.rank} at {self._last[1]!r}; {self.folder} cannot be written\n", [], {})
        return heartbeats.judge(before, now, self.rank, self.size)

    def _publish(self, verdict: Diagnosis) -> bool:
        """True if this rank reports: it was the first to judge, or cannot know."""
        try:
            return heartbeats.publish(self.folder, self.rank, verdict)
        except OSError as error:
            self._warn(error)
            return True

    def _end(self, verdict: Diagnosis, before: dict[int, Beat], *, speaks: bool) -> None:
        """Dump the stacks of this rank, then of frozen ranks near it; report; kill them and this process."""
        with contextlib.suppress(OSError):
            if self._stacks is not None:
                self._stacks.write(f"\n{heartbeats.timestamp()} rank {self.rank}: no progress at {self._last[1]!r}\n")
                self._stacks.flush()
            faulthandler.dump_traceback(self._stacks or 2, all_threads=True)
        time.sleep(JOIN_S)  # before any rank is woken: that may let the others continue from where they hang
        frozen = [before[int(rank)] for rank, who in verdict.ends.items() if who == self.rank and int(rank) in before]
        if sys.platform != "win32":
            for beat in frozen:
                send(beat, signal.SIGUSR2)
                send(beat, signal.SIGCONT)  # a stopped process handles its signals once it continues
        time.sleep(WAKE_S)
        if speaks:
            shown = (verdict.suspects or [self.rank])[0]
            stacks = heartbeats.stacks_file(self.folder, shown)
            calls = heartbeats.innermost_calls(stacks, before[shown].stacks_bytes if shown in before else 0)
            tell(
                f"regpt2: no progress for {self.timeout_s:g} s; this run ends with exit code {HUNG}\n{verdict.text}"
                + (f"  rank {shown}, innermost call first:\n{calls}" if calls else "")
                + (f"  stacks: {self.folder / 'rank-*.stacks.txt'}\n" if self._stacks is not None else "")
            )
        if sys.platform != "win32":
            for beat in frozen:  # else torchrun would wait half a minute for it
                send(beat, signal.SIGKILL)
        os._exit(HUNG)

    def _renew(self, idle_s: float) -> None:
        self._ticks += 1
        beats, doing = self._last
        try:
            n_bytes = os.fstat(self._stacks.fileno()).st_size if self._stacks is not None else 0
            progress = {"beats": beats, "ticks": self._ticks, "doing": doing, "stacks_bytes": n_bytes}
            heartbeats.write_beat(self.folder, self.rank, **progress, idle_s=round(idle_s, 3))
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            why = describe_os_error(error)
            tell(f"warning: the watchdog of rank {self.rank} cannot write: {why} Training continues.\n")
        self._warned = True


def send(beat: Beat, number: int) -> None:
    """Send a signal to the process that wrote this beat; to none if its pid was reused."""
    if heartbeats.parent_and_start(beat.pid) == (beat.parent, beat.started) and beat.started:
        with contextlib.suppress(OSError):
            os.kill(beat.pid, number)


def tell(text: str) -> None:
    """Write to standard error, waiting a second at most: a pipe that nobody reads may be why the run hangs."""

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    teller = threading.Thread(target=write, daemon=True)
    teller.start()
    teller.join(1.0)


def unlink_if_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        path.unlink()
