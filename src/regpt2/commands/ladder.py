"""The lecture's speed ladder on this machine. In: sizes; out: each rung's step time, as a table, JSON and a picture.

regpt2 ladder
regpt2 ladder --rungs fp32 bf16 train --steps 3
regpt2 ladder --model.n-layer 4 --model.n-head 4 --model.n-embd 256 --seq-len 256 --micro-batch 8

Each rung changes one thing and runs in a process of its own. Interrupted, the same command resumes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import ProgressLine, duration, say
from regpt2.base.device import pick_device
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock
from regpt2.base.options import parse
from regpt2.machine.speed.ladder_record import LadderRecord, closing, describe
from regpt2.machine.speed.rungs import Rung, climb, default_rungs, find_rungs
from regpt2.machine.speed.steps import StepTimes, StepWork, measure
from regpt2.machine.speed.table import for_screen, in_columns, legend
from regpt2.model.gpt import GPTConfig

# Defaults by type of device: on a GPU the lecture's sizes; on two cores of a CPU the ladder takes some ten minutes.
GPU = StepWork(micro_batch=16, seq_len=1024, warmup_steps=5, steps=20)
CPU = StepWork(micro_batch=1, seq_len=1024, warmup_steps=1, steps=5)


@dataclass(frozen=True)
class LadderOptions:
    """Repeat the lecture's ladder of step times on this machine, then add the rungs of this project."""

    out: Path = Path("runs/ladder")
    """A folder for ladder.json, ladder.md and ladder.png. Rungs that it already holds are not measured again."""
    rungs: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="RUNGS")] = None
    """Only these rungs, such as: fp32 bf16 train; default: all that apply to the device, without compile on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    micro_batch: int | None = None
    """Sequences per step; default: 16 on a GPU, as in the lecture, and 1 on a CPU."""
    seq_len: int | None = None
    """Tokens per sequence; default: 1024, or the model's block_size if that is less."""
    steps: int | None = None
    """Timed steps per rung, after warm-up; default: 20 on a GPU, 5 on a CPU."""
    again: bool = False
    """Measure every rung again."""
    model: GPTConfig = field(default_factory=GPTConfig)


def main(arguments: list[str]) -> int:
    """The verb `regpt2 ladder`: 1 if no rung could be measured, or a rung computes something else than the first."""
    options = parse(LadderOptions, arguments, "regpt2 ladder")
    work, rungs = chosen(options)
    say(f"{describe(work)}; {len(rungs)} rungs, {work.warmup_steps} + {work.steps} steps each")
    with folder_lock(options.out):
        record = LadderRecord(options.out, work, again=options.again)
        try:
            for row in climb(work, rungs, known=record.known, time=_timer(rungs)):
                record.add(row)
                say(f"{row.rung}: {row.outcome}")
        except KeyboardInterrupt:
            say("Interrupted; what was measured is kept; run the same command again to resume.")
            raise
        finally:
            record.write_pages()
    tables = for_screen(record.rows), in_columns(legend(record.rows))
    for line in (f"\n{describe(work)}", *tables[0], "", *tables[1], "", *closing(record.rows)):
        say(line)
    say(f"\nWritten: {options.out / 'ladder.json'}, ladder.md and ladder.png.")
    return 1 if any(row.is_wrong for row in record.rows) or all(row.times is None for row in record.rows) else 0


def chosen(options: LadderOptions) -> tuple[StepWork, list[Rung]]:
    """The step and the rungs.

    Raises:
        UsageError: an option is out of its range, or a device or rung is unknown.
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


def _timer(rungs: Sequence[Rung]) -> Callable[[Rung, StepWork], StepTimes]:
    """A function that measures a rung and shows its progress."""
    last_s = 0.0

    def timed(rung: Rung, work: StepWork) -> StepTimes:
        nonlocal last_s
        place, started_at = rungs.index(rung), time.monotonic()
        left = f", at most {duration(last_s * (len(rungs) - place))} left in all" if last_s else ""
        what = f"rung {place + 1} of {len(rungs)}, {rung.name}{left}"
        with ProgressLine(what, work.warmup_steps + work.steps, "steps") as line:
            times = measure(work, on_step=lambda _: line.advance(1))
        last_s = time.monotonic() - started_at
        return times

    return timed
