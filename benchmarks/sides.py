"""Two sides of a comparison, each in a process of its own. In: a script and its arguments; out: answers, turn by turn.

Two OpenMP pools in one process would leave one core active, so nothing that is timed shares a process with its rival.
A side is the script itself, started with `--side NAME`: it does the work once for each line on its standard input (the
line says how many times) and answers with one line of JSON.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch


def serve(work: Callable[[], dict[str, float]]) -> None:
    """A side's life: do `work` as often as each line asks, answer with seconds, memory and its figures."""
    for line in sys.stdin:
        wall_at, cpu_at = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            figures = work()
        answer = {"wall_s": time.perf_counter() - wall_at, "cpu_s": time.process_time() - cpu_at, **figures}
        answer["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(answer), flush=True)


class Side:
    """The parent's end of a side."""

    def __init__(self, script: str, name: str, arguments: list[str]) -> None:
        command = [sys.executable, script, *arguments, "--side", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, times: int) -> dict[str, float]:
        """Ask for the work to be done so many times, and wait."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        """No more turns."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(script: str, names: list[str], arguments: list[str], *, pairs: int, times: int) -> dict[str, object]:
    """Alternate the sides after one warm-up turn each; medians, and ratios of neighboring turns to the first side."""
    sides = {name: Side(script, name, arguments) for name in names}
    for side in sides.values():
        side.turn(times)
    rows = []
    for _ in range(pairs):
        rows.append({name: side.turn(times) for name, side in sides.items()})
        print("  " + ", ".join(f"{name} {row['wall_s'] / times:.3f} s" for name, row in rows[-1].items()), flush=True)
    for side in sides.values():
        side.end()
    ours, *others = names

    def ratios(other: str, key: str) -> list[float]:
        return [row[other][key] / row[ours][key] for row in rows]

    return {
        "seconds": {name: statistics.median(row[name]["wall_s"] for row in rows) / times for name in names},
        "wall_ratio": {other: statistics.median(ratios(other, "wall_s")) for other in others},
        "wall_ratio_spread": {other: [min(ratios(other, "wall_s")), max(ratios(other, "wall_s"))] for other in others},
        "cpu_ratio": {other: statistics.median(ratios(other, "cpu_s")) for other in others},
        "peak_bytes": {name: rows[-1][name]["peak_bytes"] for name in names},
    }


def keep(result: dict[str, object], what: str, command: str, out: Path | None) -> None:
    """Print a result with where it came from, and add it to a JSON file."""
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
