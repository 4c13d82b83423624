"""Sides of a comparison, each in a process of its own. In: their commands; out: answers, turn by turn.

Two OpenMP pools in one process would leave one core active, so a side never shares a process with its rival.
A side works once for each line on its standard input (the line contains a number of times) and answers with one line
of JSON.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SETTLE_S = 0.3  # between turns, because the threads of some runtimes spin for 0.2 s into the next side's time
TURN_S = 0.5  # shorter work is repeated within a turn


class SideFailed(Exception):
    """A side ended instead of answering; the message is the last line that it wrote."""


def serve(work: Callable[[], dict[str, Any]]) -> None:
    """A side's loop: do `work` as often as each line asks, answer with seconds, memory and its figures."""
    for line in sys.stdin:
        wall_at, cpu_at = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            figures = work()
        answer = {"wall_s": time.perf_counter() - wall_at, "cpu_s": time.process_time() - cpu_at}
        answer["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**answer, **figures}), flush=True)


class Side:
    """The parent's end of a side."""

    def __init__(self, command: list[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def turn(self, times: int) -> dict[str, Any]:
        """Ask for `times` repetitions of the work, and wait.

        Raises:
            SideFailed: it ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{times}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SideFailed(self._last_words()) from None
        for line in self.process.stdout:
            if line.startswith('{"wall_s"'):  # some peers print as they work
                return dict(json.loads(line))
        raise SideFailed(self._last_words())

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if line.strip()]
        return said[-1] if said else f"it ended with code {code}"

    def end(self) -> None:
        """Ends the turns."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


@contextmanager
def started(commands: dict[str, list[str]]) -> Iterator[dict[str, Side]]:
    """Starts a side for each command; all end with the block."""
    with ExitStack() as held:
        sides = {}
        for name, command in commands.items():
            sides[name] = Side(command)
            held.callback(sides[name].end)
        yield sides


def take_turns(
    commands: dict[str, list[str]], *, least: int, most: int, seconds: float, times: int | None = None
) -> tuple[list[dict[str, dict[str, Any]]], list[dict[str, dict[str, Any]]]]:
    """Alternate the sides; the rows of the warm-up and of the timed turns, by name, `wall_s` and `cpu_s` for one work.

    It makes at least `least` and at most `most` rows, and starts none after `seconds`.

    Raises:
        SideFailed: one of them, by its name.
    """
    with started(commands) as sides:
        warmup = [_row(sides, 1)]
        if times is None:
            first = next(iter(sides))
            while warmup[-1][first]["wall_s"] < TURN_S and len(warmup) < 3:  # compile and warm up before measuring
                warmup.append(_row(sides, 1))
            times = max(1, round(TURN_S / warmup[-1][first]["wall_s"]))
        rows: list[dict[str, dict[str, Any]]] = []
        began_at = time.perf_counter()
        while len(rows) < least or (len(rows) < most and time.perf_counter() - began_at < seconds):
            rows.append(_row(sides, times))
            print("  " + ", ".join(f"{name} {row['wall_s']:.4g} s" for name, row in rows[-1].items()), flush=True)
    return warmup, rows


def _row(sides: dict[str, Side], times: int) -> dict[str, dict[str, Any]]:
    row = {}
    for name, side in sides.items():
        try:
            row[name] = side.turn(times)
        except SideFailed as failed:
            raise SideFailed(f"{name}: {failed}") from None
        for key in ("wall_s", "cpu_s"):
            if row[name][key] is not None:
                row[name][key] /= times
        time.sleep(SETTLE_S)
    return row


def ratios(rows: list[dict[str, dict[str, Any]]], ours: str, other: str, key: str) -> list[float]:
    """How many times more the other side took than ours, for each pair of neighboring turns; empty if not measured."""
    return [row[other][key] / row[ours][key] for row in rows if row[other].get(key) and row[ours].get(key)]


def compare(script: str, names: list[str], arguments: list[str], *, pairs: int, times: int) -> dict[str, object]:
    """For sides that share one script, started with `--side NAME`: medians, and ratios to the first side."""
    commands = {name: [sys.executable, script, *arguments, "--side", name] for name in names}
    _, rows = take_turns(commands, least=pairs, most=pairs, seconds=0, times=times)
    ours, *others = names
    wall = {other: ratios(rows, ours, other, "wall_s") for other in others}
    return {
        "seconds": {name: statistics.median(row[name]["wall_s"] for row in rows) for name in names},
        "wall_ratio": {other: statistics.median(wall[other]) for other in others},
        "wall_ratio_spread": {other: [min(wall[other]), max(wall[other])] for other in others},
        "cpu_ratio": {other: statistics.median(ratios(rows, ours, other, "cpu_s")) for other in others},
        "peak_bytes": {name: rows[-1][name]["peak_bytes"] for name in names},
    }


def keep(result: dict[str, object], what: str, command: str, out: Path | None) -> None:
    """Print a result with its origin, and add it to a JSON file."""
    import torch

    about = {
        "what": what,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        former = json.loads(out.read_text()) if out.exists() else []
        out.write_text(json.dumps([*former, {**about, **result}], indent=1) + "\n")
