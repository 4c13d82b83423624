"""Commands in their own processes. In: command lines and places to run them; out: exit codes, as they end."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from regpt2.base.errors import UsageError
from regpt2.base.files import make_dir
from regpt2.base.ranks.watchdog import PARENT
from regpt2.base.shelves import plugin_options

Place = Mapping[str, str]  # its environment variables, added to ours


@dataclass(frozen=True)
class Command:
    """Arguments of `regpt2`, and the file for its output."""

    arguments: list[str]
    log: Path


def places(n: int, device: torch.device) -> list[Place]:
    """Places for `n` processes at once: a GPU for each, or its share of this machine's threads.

    Raises:
        UsageError: there are fewer GPUs.
    """
    if n == 1:
        return [{}]
    if device.type != "cuda":
        return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // n))}] * n
    given = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = given or [str(gpu) for gpu in range(torch.cuda.device_count())]
    if n > len(gpus):
        raise UsageError(
            f"--parallel {n} needs a GPU for each, and there are {len(gpus)}; give --parallel {len(gpus)}."
        )
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:n]]


def run_commands(
    commands: Sequence[Command], places: Sequence[Place], on_wait: Callable[[], object] = lambda: None
) -> Iterator[tuple[int, int]]:
    """Run all, at most one in each place at a time; yields (its index, its exit code) as each ends.

    When the caller stops early, the running ones are terminated and waited for.
    """
    waiting, idle = deque(enumerate(commands)), list(places)
    busy: dict[int, tuple[subprocess.Popen[bytes], Place]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                which, command = waiting.popleft()
                place = idle.pop(0)
                busy[which] = _start(command, place), place
            ended = [(which, code) for which, (process, _) in busy.items() if (code := process.poll()) is not None]
            for which, code in ended:
                idle.append(busy.pop(which)[1])
                yield which, code
            if not ended:
                on_wait()
                time.sleep(0.2)
    finally:
        for process, _ in busy.values():
            with suppress(OSError):
                process.terminate()
        for process, _ in busy.values():
            process.wait()


def _start(command: Command, place: Place) -> "subprocess.Popen[bytes]":
    make_dir(command.log.parent)
    following = {} if sys.platform == "win32" else {PARENT: str(os.getpid())}  # there a launcher is the parent
    with open(command.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "regpt2", *command.arguments, *plugin_options()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, **following},
        )
