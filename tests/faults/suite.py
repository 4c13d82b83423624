"""What a fault is. In: a bench (a folder, a count, forks); out: an outcome: how many fired, were met, went wrong.

A group of faults is a module with a list FAULTS; `run.py` names the groups.
"""

import fcntl
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plants
import zygote

LANES = ("fast", "full")


class NotHere(Exception):
    """This machine cannot inject the fault; the message says why."""


@dataclass
class Outcome:
    """The count of one fault."""

    injected: int = 0
    detected: int = 0
    """Met as promised: recovered, refused, reported, whatever the fault's promise is."""
    mismatches: int = 0
    """A state that is not the reference's, bit for bit."""
    failures: list[str] = field(default_factory=list)
    remark: str = ""
    """A figure worth a word in the line of the fault."""

    def fired(self, ok: bool, what: str = "") -> None:
        """One fault was injected; was it met as promised?"""
        self.injected += 1
        self.detected += bool(ok)
        if not ok:
            self.failures.append(what)

    def same(self, got: Any, expected: Any, what: str) -> None:
        """Compare a final state with the reference's."""
        if got != expected:
            self.mismatches += 1
            self.failures.append(f"{what}: {_difference(got, expected)}")

    def is_red(self, planned: int) -> bool:
        """Not met, not equal, or fewer fired than planned: a harness that never fires is the usual lie."""
        return bool(self.failures or self.mismatches) or self.detected < self.injected or self.injected < planned


@dataclass
class Bench:
    """What a fault is given: an empty folder of its own, how many to inject, chance with a fixed seed, and forks."""

    folder: Path
    shared: Path
    """What all faults of one call use: the data, the undisturbed runs."""
    planned: int
    rng: random.Random
    lane: str = "fast"
    plant: str | None = None

    def fork(self, work: Callable[[], int], log: Path | None = None) -> zygote.Trial:
        """Start `work` in a process of its own, with the planted bug if there is one."""

        def planted() -> int:
            plants.apply(self.plant)
            return work()

        return zygote.fork(planted, log or self.new("log"))

    def ask(self, work: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """What `work` returns, computed in a process of its own. It must be JSON."""
        answer = self.new("answer")

        def write() -> int:
            answer.write_text(json.dumps(work()))
            return 0

        trial = self.fork(write)
        if (code := trial.wait(timeout_s)) != 0:
            raise RuntimeError(f"a trial ended with exit code {code}: {trial.said[-2000:]}")
        return json.loads(answer.read_text())

    def command(self, *arguments: object) -> list[str]:
        """The real command line, not a fork of this process: `regpt2 ARGUMENTS`, with the planted bug."""
        door = ["-m", "regpt2"] if self.plant is None else [plants.__file__, self.plant]
        return [sys.executable, *door, *map(str, arguments)]

    def start(self, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
        """Start the real command; its output is piped."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.command(*arguments), **(pipes | options))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While another fault, side by side with this one, may not touch what is shared."""
        with open(self.shared / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def new(self, name: str) -> Path:
        """A path that nobody has used, below this fault's folder."""
        number = 0
        while (path := self.folder / f"{name}-{number}").exists():
            number += 1
        if name == "log":
            path.touch()
        return path


@dataclass(frozen=True)
class Fault:
    """One row of the fault plan."""

    number: int
    name: str
    planned: tuple[int, int]
    """How many to inject in the fast and in the full lane; 0 = not in this lane."""
    inject: Callable[[Bench], Outcome] | None
    """None where there is nothing yet that could be broken; then `absent` says what is missing."""
    absent: str = ""


def _difference(got: Any, expected: Any) -> str:
    if isinstance(got, dict) and isinstance(expected, dict):
        keys = [key for key in {**expected, **got} if got.get(key) != expected.get(key)]
        return ", ".join(f"{key} {_short(got.get(key))} is not {_short(expected.get(key))}" for key in keys)
    return f"{_short(got)} is not {_short(expected)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
