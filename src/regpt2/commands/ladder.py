"""The lecture's speed ladder on this machine. In: sizes; out: each rung's step time, as a table, JSON and a picture.

regpt2 ladder
regpt2 ladder --rungs fp32 bf16 ours --steps 3
regpt2 ladder --model.n-layer 4 --model.n-head 4 --model.n-embd 256 --seq-len 256 --micro-batch 8

Each rung changes one thing and runs in a process of its own. Stopped and started again, it goes on.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from regpt2 import __version__
from regpt2.base.console import ProgressLine, count, duration, say, warn
from regpt2.base.device import can_compile, device_name, pick_device
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock, read_small, write_atomic
from regpt2.base.options import parse
from regpt2.base.version import commit, digest
from regpt2.machine.speed.rungs import Row, Rung, climb, default_rungs, find_rungs, key_of
from regpt2.machine.speed.steps import StepTimes, StepWork, measure
from regpt2.machine.speed.table import figures_of, for_markdown, for_screen, summary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.pages.charts.bars import Bar, bars_picture

# Sizes and numbers of steps by type of device: on a GPU the lecture's; on two cores of a CPU some ten minutes.
GPU = StepWork(micro_batch=16, seq_len=1024, warmup_steps=5, steps=20)
CPU = StepWork(micro_batch=1, seq_len=1024, warmup_steps=1, steps=5)


@dataclass(frozen=True)
class LadderOptions:
    """Repeat the lecture's ladder of step times on this machine, then climb on by what this project adds."""

    out: Path = Path("runs/ladder")
    """A folder for ladder.json, ladder.md and ladder.png. Rungs that it already holds are not measured again."""
    rungs: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="RUNGS")] = None
    """Only these rungs, such as: fp32 bf16 ours; default: all that apply to the device, without compile on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    micro_batch: int | None = None
    """Sequences per step; by default 16 on a GPU, as in the lecture, and 1 on a CPU."""
    seq_len: int | None = None
    """Tokens per sequence; by default 1024, or the model's block_size if that is less."""
    steps: int | None = None
    """Timed steps per rung, after warm-up; default: 20 on a GPU, 5 on a CPU."""
    again: bool = False
    """Measure every rung again."""
    model: GPTConfig = field(default_factory=GPTConfig)


def main(arguments: list[str]) -> int:
    """The verb `regpt2 ladder`: 1 if nothing could be measured, or a rung computes what it should not."""
    options = parse(LadderOptions, arguments, "regpt2 ladder")
    work, rungs = plan(options)
    say(f"{describe(work)}; {len(rungs)} rungs, {work.warmup_steps} + {work.steps} steps each")
    with folder_lock(options.out):
        record = Record(options.out, work, again=options.again)
        try:
            for row in climb(work, rungs, known=record.known, time=_timer(rungs)):
                record.add(row)
                say(f"{row.title}: {_told(row)}")
        except KeyboardInterrupt:
            say("Stopped; what was measured is kept; run the same command again to resume.")
            raise
        finally:
            record.write_pages()
    for line in (f"\n{describe(work)}", *for_screen(record.rows), "", *closing(record.rows)):
        say(line)
    say(f"\n{options.out / 'ladder.json'} is written, and beside it ladder.md and ladder.png.")
    return 1 if any(row.is_wrong for row in record.rows) or all(row.times is None for row in record.rows) else 0


def plan(options: LadderOptions) -> tuple[StepWork, list[Rung]]:
    """The step and the rungs that were asked for.

    Raises:
        UsageError: an option is out of its range, or there is no such device or rung.
    """
    device, model = pick_device(options.device), options.model
    usual = CPU if device.type == "cpu" else GPU
    given = {name: getattr(options, name) for name in ("micro_batch", "seq_len", "steps")}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    seq_len = min(usual.seq_len, model.block_size) if options.seq_len is None else options.seq_len
    if seq_len > model.block_size:
        raise UsageError(f"--seq-len {seq_len} must be at most model.block_size = {model.block_size}.")
    if model.dropout:
        raise UsageError(f"model.dropout = {model.dropout} must be 0: the ladder compares the losses of its rungs.")
    if model.vocab_multiple != GPTConfig.vocab_multiple:
        raise UsageError("model.vocab_multiple is a rung of the ladder; leave it out.")
    given = {name: value for name, value in given.items() if value is not None} | {"seq_len": seq_len}
    work = replace(usual, model=model, device=str(device), **given)
    return work, find_rungs(options.rungs or default_rungs(device))


class Record:
    """The rungs measured so far, and their files."""

    def __init__(self, folder: Path, work: StepWork, *, again: bool) -> None:
        self.folder, self.work = folder, work
        self.rows: list[Row] = []
        self.machine = {
            "device": device_name(pick_device(work.device)),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "code": digest("base", "model", "training", "speed"),
        }
        entries = [] if again else read_entries(folder / "ladder.json")
        self.entries = {key_of(e["work"]): e for e in entries if e["times"] and e["machine"] == self.machine}
        self.known = {key: StepTimes(**entry["times"]) for key, entry in self.entries.items()}

    def add(self, row: Row) -> None:
        """Keep one more rung, at once."""
        self.rows.append(row)
        entries = [
            {**asdict(row), "figures": one and asdict(one), "machine": self.machine}
            for row, one in zip(self.rows, figures_of(self.rows), strict=True)
        ]
        now = {key_of(entry["work"]) for entry in entries}
        told = {
            "command": " ".join(["regpt2", *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            **self.machine,
            "rungs": entries,
            "earlier": [entry for key, entry in self.entries.items() if key not in now],
        }
        write_atomic(self.folder / "ladder.json", json.dumps(told, indent=1) + "\n")

    def write_pages(self) -> None:
        """Write ladder.md and ladder.png, if there is anything to show."""
        if not self.rows:
            return
        about = describe(self.work)
        about_code = f"regpt2 {__version__}, commit {commit() or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}"
        lines = [*for_markdown(self.rows), "", *closing(self.rows), "", f"{about}; {about_code}."]
        write_atomic(self.folder / "ladder.md", "\n".join(lines) + "\n")
        bars = [
            Bar(row.title, one.step_ms if one else None, _told(row), "train" if row.lecture_ms else "val")
            for row, one in zip(self.rows, figures_of(self.rows), strict=True)
        ]
        title = "Milliseconds a step, one change at a time"
        picture = bars_picture(bars, title, f"{about}; blue: rungs of the lecture, red: ours")
        write_atomic(self.folder / "ladder.png", picture)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The rungs that an earlier ladder.json tells of; none if it cannot be read."""
    if not path.exists():
        return []
    try:
        told = json.loads(read_small(path))
        entries: list[dict[str, Any]] = [*told["rungs"], *told["earlier"]]
        for entry in entries:
            _ = key_of(entry["work"]), entry["machine"], entry["times"] and StepTimes(**entry["times"]).median_s
    except (OSError, ValueError, TypeError, KeyError) as problem:
        warn(f"{path} cannot be read ({problem}); every rung is measured anew.")
        return []
    return entries


def describe(work: StepWork) -> str:
    """The machine and the sizes, in a line."""
    device = pick_device(work.device)
    n_threads = torch.get_num_threads()
    threads = f", {n_threads} thread{'s' * (n_threads > 1)}" if device.type == "cpu" else ""
    with torch.device("meta"):
        n_params = GPT(work.model).n_params()
    return (
        f"{device_name(device)}{threads}, torch {torch.__version__}; {count(n_params)} parameters, "
        f"B={work.micro_batch}, T={work.seq_len}"
    )


def closing(rows: Sequence[Row]) -> list[str]:
    """The table in words, and whether its last rung is the step of a real run."""
    lines, last = summary(rows), rows[-1]
    if last.rung == "ours" and last.times is not None and not last.is_wrong:
        compiles = can_compile(pick_device(last.work.device))
        flag = "" if last.times.compiled == compiles else f" --compile {last.work.compile}"
        lines.append(f"The last rung is the step that `regpt2 train{flag}` makes.")
    return lines


def _told(row: Row) -> str:
    if row.times is None or row.is_wrong:
        return row.why_not
    return f"{1e3 * row.times.median_s:,.1f} ms/step, {row.times.tokens_per_s:,.0f} tokens/s"


def _timer(rungs: Sequence[Rung]) -> Callable[[Rung, StepWork], StepTimes]:
    """What measures a rung, and shows how far it is."""
    last_s = 0.0

    def timed(rung: Rung, work: StepWork) -> StepTimes:
        nonlocal last_s
        place, started_at = rungs.index(rung), time.monotonic()
        left = f", at most {duration(last_s * (len(rungs) - place))} left in all" if last_s else ""
        what = f"rung {place + 1} of {len(rungs)}, {rung.title}{left}"
        with ProgressLine(what, work.warmup_steps + work.steps, "steps") as line:
            times = measure(work, on_step=lambda _: line.advance(1))
        last_s = time.monotonic() - started_at
        return times

    return timed
