"""Named places to die in. In: a point and a step; out: a patched process that meets its signal exactly there.

Nothing in the package knows of this: the functions and system calls that a trial passes through are wrapped in it.
"""

import importlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zygote

from regpt2.base.record.metrics import MetricsLog
from regpt2.run import loop

__all__ = ["MIDDLE", "RESUME", "SAVE", "STEP", "Point", "arm", "arm_timer", "at_step", "zygote"]


@dataclass(frozen=True)
class Point:
    """Before or after the nth matching call of a function, from the update of a given step on."""

    name: str
    place: str
    """`module:attribute`, the attribute as its callers reach it."""
    when: str = "before"
    about: str = ""
    """A pattern that the paths among the arguments (of file descriptors too) must show."""
    nth: int = 1


def _around(name: str, place: str, about: str = "", nth: int = 1) -> tuple[Point, Point]:
    return Point(f"before {name}", place, "before", about, nth), Point(f"after {name}", place, "after", about, nth)


_SAVER = "regpt2.training.checkpoint"
# In the writing of one checkpoint, in the order of the calls.
SAVE = (
    *_around("the copy to memory", f"{_SAVER}:snapshot"),
    *_around("writing the model", f"{_SAVER}:save_file", r"/tmp-step-\d+.*/model"),
    *_around("fsync of the model", "os:fsync", r"/tmp-step-\d+.*/model"),
    *_around("writing the optimizer", f"{_SAVER}:save_file", r"/tmp-step-\d+.*/optimizer"),
    *_around("fsync of the optimizer", "os:fsync", r"/tmp-step-\d+.*/optimizer"),
    *_around("rename of config.json", "os:replace", r"/tmp-step-\d+.*/config\.json$"),
    *_around("rename of state.json", "os:replace", r"/tmp-step-\d+.*/state\.json$"),
    *_around("fsync of manifest.json", "os:fsync", r"/tmp-step-\d+.*/\.manifest"),
    *_around("rename of manifest.json", "os:replace", r"/tmp-step-\d+.*/manifest\.json$"),
    *_around("rename of the folder", "os:rename", r"/tmp-step-"),
    *_around("fsync of the parent", "os:fsync", r"/checkpoints$"),
    *_around("removal of an old manifest", "pathlib:Path.unlink", r"/step-\d+/manifest\.json"),
    *_around("removal of an old folder", "shutil:rmtree", r"/step-\d+$"),
    Point("in the removal of an old folder", "os:unlink", "after", r"safetensors|json", 2),
)
# In an update and in what is done between updates.
STEP = (
    *_around("backward of the first micro-step", "torch:Tensor.backward"),
    *_around("the optimizer's step", "regpt2.training.optimizer:AdamW.step"),
    *_around("a line of the record", "regpt2.base.record.metrics:MetricsLog.log"),
    Point("in a line of the record", "regpt2.base.record.metrics:MetricsLog.log", "middle"),
    *_around("an evaluation", "regpt2.evals.val_loss:evaluate"),
    Point("in an evaluation", "regpt2.evals.val_loss:TokenStream.read", "after", nth=3),
    *_around("a sample", "regpt2.run.intervals:generate"),
    *_around("the page", "regpt2.run.ending:write_report"),
)
# In going on with a run.
RESUME = (
    Point("after the lock is taken", "regpt2.run.loop:run_updates"),
    *_around("reading a checkpoint", f"{_SAVER}:read"),
    *_around("rename of config.toml", "os:replace", r"config\.toml$"),
    *_around("rename of the cut-back record", "os:replace", r"metrics\.jsonl$"),
    Point("before the line of the resume", "regpt2.base.record.metrics:MetricsLog.log"),
    Point("after the line of the resume", "regpt2.base.record.metrics:MetricsLog.log", "after"),
    Point("before the first update", "regpt2.run.loop:update"),
)
# In the system call that writes a file of many megabytes.
MIDDLE = tuple(
    Point(f"in the write of the {name}", f"{_SAVER}:save_file", about=rf"/tmp-step-\d+.*/{name}")
    for name in ("model", "optimizer")
)


def arm(point: Point, step: int, act: Callable[[], object] | None = None) -> None:
    """Wrap the point in this process; `act`, by default kill -9 of oneself, happens there once, from `step` on."""
    clock = at_step() if step else None
    seen = 0

    def due(args: tuple[Any, ...]) -> bool:
        nonlocal seen
        if (clock is not None and clock["step"] < step) or not re.search(point.about, _paths(args)):
            return False
        seen += 1
        return seen == point.nth

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            fires = due(args)
            if fires and point.when == "before":
                (act or die)()
            if fires and point.when == "middle":
                _half_a_line(*args, **kwargs)
                (act or die)()
            result = call(*args, **kwargs)
            if fires and point.when == "after":
                (act or die)()
            return result

        return wrapped

    patch(point.place, wrap)


def patch(place: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `module:attribute` by `wrap` of it."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, wrap(getattr(owner, name)))


def at_step() -> dict[str, int]:
    """A clock that shows the update under way, or the last one made."""
    clock = {"step": 0}

    def wrap(update: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(run: Any, state: Any, step: int, *rest: Any) -> Any:
            clock["step"] = step
            return update(run, state, step, *rest)

        return wrapped

    patch(f"{loop.__name__}:update", wrap)
    return clock


def die() -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm_timer(point: Point, step: int, after_s: float) -> None:
    """Die so long after the point is reached, wherever that is: the system ends the process, without asking it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    arm(point, step, lambda: signal.setitimer(signal.ITIMER_REAL, after_s))


def _paths(args: tuple[Any, ...]) -> str:
    """The paths among the arguments, one a line: strings and paths as they are, numbers as open files."""
    found = [str(arg) for arg in args if isinstance(arg, str | Path)]
    for arg in args:
        if isinstance(arg, int) and not isinstance(arg, bool):
            found.append(os.path.realpath(f"/proc/self/fd/{arg}"))
    return "\n".join(found)


def _half_a_line(log: MetricsLog, event: str, step: int, **values: Any) -> None:
    """What a kill in the middle of a write leaves in the record."""
    line = json.dumps({"event": event, "step": step, **values}, default=str).encode()
    assert log.path is not None
    with open(log.path, "ab", buffering=0) as file:
        file.write(line[: len(line) // 2])
