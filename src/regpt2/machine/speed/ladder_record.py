"""The record of a ladder. In: the result of each rung; out: ladder.json after each, in the end a table, a picture."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from regpt2 import __version__
from regpt2.base.console import count, warn
from regpt2.base.device import can_compile, device_name, pick_device
from regpt2.base.files import read_small, write_atomic
from regpt2.base.version import commit, digest
from regpt2.machine.speed.rungs import RungResult, key_of
from regpt2.machine.speed.steps import StepTimes, StepWork
from regpt2.machine.speed.table import figures_of, for_markdown, summary
from regpt2.model.gpt import GPT
from regpt2.pages.charts.bars import Bar, bars_picture


class LadderRecord:
    """The rungs measured so far, and their files."""

    def __init__(self, folder: Path, work: StepWork, *, again: bool) -> None:
        self.folder, self.work = folder, work
        self.rows: list[RungResult] = []
        self.machine = {
            "device": device_name(pick_device(work.device)),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "code": digest("base", "model", "training", "machine/speed"),
        }
        entries = [] if again else read_entries(folder / "ladder.json")
        self.entries = {key_of(e["work"]): e for e in entries if e["times"] and e["machine"] == self.machine}
        self.known = {key: StepTimes(**entry["times"]) for key, entry in self.entries.items()}

    def add(self, row: RungResult) -> None:
        """Add a rung to ladder.json."""
        self.rows.append(row)
        entries = [
            {**asdict(row), "figures": one and asdict(one), "machine": self.machine}
            for row, one in zip(self.rows, figures_of(self.rows), strict=True)
        ]
        now = {key_of(entry["work"]) for entry in entries}
        record = {
            "command": " ".join(["regpt2", *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            **self.machine,
            "rungs": entries,
            "earlier": [entry for key, entry in self.entries.items() if key not in now],
        }
        write_atomic(self.folder / "ladder.json", json.dumps(record, indent=1) + "\n")

    def write_pages(self) -> None:
        """Write ladder.md and ladder.png, unless there is no rung yet."""
        if not self.rows:
            return
        about = describe(self.work)
        about_code = f"regpt2 {__version__}, commit {commit() or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}"
        lines = [*for_markdown(self.rows), "", *closing(self.rows), "", f"{about}; {about_code}."]
        write_atomic(self.folder / "ladder.md", "\n".join(lines) + "\n")
        bars = [
            Bar(row.title, one.step_ms if one else None, row.outcome, "train" if row.lecture_ms else "val")
            for row, one in zip(self.rows, figures_of(self.rows), strict=True)
        ]
        title = "Milliseconds a step, one change at a time"
        picture = bars_picture(bars, title, f"{about}; blue: rungs of the lecture, red: ours")
        write_atomic(self.folder / "ladder.png", picture)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The rungs in an earlier ladder.json; none if it cannot be read."""
    if not path.exists():
        return []
    try:
        record = json.loads(read_small(path))
        entries: list[dict[str, Any]] = [*record["rungs"], *record["earlier"]]
        for entry in entries:
            _ = key_of(entry["work"]), entry["machine"], entry["times"] and StepTimes(**entry["times"]).median_s
    except (OSError, ValueError, TypeError, KeyError) as problem:
        warn(f"{path} cannot be read ({problem}); every rung is measured again.")
        return []
    return entries


def describe(work: StepWork) -> str:
    """The machine and the sizes, in a line."""
    device, n_threads = pick_device(work.device), torch.get_num_threads()
    threads = f", {n_threads} thread{'s' * (n_threads > 1)}" if device.type == "cpu" else ""
    with torch.device("meta"):
        n_params = GPT(work.model).n_params()
    return (
        f"{device_name(device)}{threads}, torch {torch.__version__}; {count(n_params)} parameters, "
        f"B={work.micro_batch}, T={work.seq_len}"
    )


def closing(rows: Sequence[RungResult]) -> list[str]:
    """The table in words, and whether its last rung is the step of a real run."""
    lines, last = summary(rows), rows[-1]
    if last.rung == "train" and last.times is not None and not last.is_wrong:
        compiles = can_compile(pick_device(last.work.device))
        flag = "" if last.times.compiled == compiles else f" --compile {last.work.compile}"
        lines.append(f"The last rung is the step that `regpt2 train{flag}` makes.")
    return lines
