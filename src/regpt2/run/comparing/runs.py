"""The runs of a comparison. In: its plan and its folders; out: each run's state and its curve of validation losses."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regpt2.base.errors import DataError
from regpt2.base.files import read_small
from regpt2.pages.record import Column, Event, Record, number, numbers, read_record

TAIL_BYTES = 1 << 16  # larger than any event of a run
NOT_BEGUN = "not begun"


@dataclass(frozen=True)
class Arm:
    """One of the things compared: a recipe with options."""

    label: str
    spec: str
    """As it was given."""
    max_steps: int
    tokens: int
    changes: list[str]
    """Settings that are not the first arm's."""
    at: list[int] = field(default_factory=list)
    """Its place along each axis of a grid."""
    weights: int = 0
    """Parameters without embeddings, positions and a head of its own; of a comparison over sizes."""
    flops: float = 0.0
    """Matmul FLOPs of its whole training, forward and backward; likewise."""


@dataclass(frozen=True)
class Axis:
    """One direction of a grid: a setting, or several that change together."""

    names: list[str]
    values: list[list[Any]]
    """By place, a value for each name."""


@dataclass(frozen=True)
class Comparison:
    """What is compared. The first arm is the baseline."""

    arms: list[Arm]
    seeds: int
    """Each arm has the seeds 1 to this one."""
    budget: str
    target: float | None
    command: str
    failures: dict[str, str] = field(default_factory=dict)
    """The last line of the log of each run that failed, by ARM/seed-N."""
    kind: str = "arms"
    """arms, sweep (a grid over one recipe) or scaling (one recipe at several sizes or budgets)."""
    axes: list[Axis] = field(default_factory=list)
    """Of a grid; one axis of all sizes."""
    hold_out: int = 0
    """How many of the largest sizes the power law is not fitted to."""
    over: str = ""
    """What the law is a function of: parameters, tokens or flops."""


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come."""

    seed: int
    status: str
    """finished, or why it does not count."""
    tokens: Column
    seconds: Column
    """Time of updates alone, without evaluations and checkpoints."""
    losses: Column
    """The validation losses, in nats per token."""
    start: Event
    sha256: str
    """Of its record."""

    @property
    def is_finished(self) -> bool:
        """It made every update, and its last validation loss is a number."""
        return self.status == "finished"


def read_plan(folder: Path) -> Comparison:
    """The plan in `compare.json`.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / "compare.json"
    try:
        plan = json.loads(read_small(path, DataError))["plan"]
        axes = [Axis(**axis) for axis in plan.get("axes", [])]
        return Comparison(**{**plan, "arms": [Arm(**arm) for arm in plan["arms"]], "axes": axes})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} holds no comparison ({type(error).__name__}: {error}); give the recipes again, as at the start."
        ) from None


def read_runs(folder: Path, plan: Comparison) -> list[list[Run]]:
    """The runs of each arm, by seed."""
    return [[read_run(folder, plan, arm, seed) for seed in range(1, plan.seeds + 1)] for arm in plan.arms]


def read_run(folder: Path, plan: Comparison, arm: Arm, seed: int) -> Run:
    """One run, started or not."""
    place = f"{arm.label}/seed-{seed}"
    failure, nothing = plan.failures.get(place, ""), np.zeros(0)
    if not (folder / place / "metrics.jsonl").exists():
        return Run(seed, f"failed: {failure}" if failure else NOT_BEGUN, nothing, nothing, nothing, {}, "")
    record = read_record(folder / place)
    steps, losses = numbers(record.validations, "step"), numbers(record.validations, "loss")
    status = _status(record, arm.max_steps, failure)
    return Run(seed, status, record.tokens_at(steps), seconds_at(record, steps), losses, record.start, record.sha256)


def _status(record: Record, max_steps: int, failure: str) -> str:
    if failure:
        return f"failed: {failure}"
    if record.end is None or record.status != "finished" or record.last_step < max_steps:
        return record.status if record.status.startswith("failed") else f"at step {record.last_step:,.0f}"
    last = record.validations[-1] if record.validations else {}
    if number(last.get("step")) != max_steps:
        return "failed: its last validation loss is missing"
    loss = number(last.get("loss"))
    return "finished" if math.isfinite(loss) else f"diverged: its last validation loss is {loss}"


def seconds_at(record: Record, steps: Column) -> Column:
    """Time spent in updates until these steps."""
    made, step_ms = record.train["step"], record.train["step_ms"]
    spent = np.nancumsum(step_ms * np.diff(made, prepend=0.0)) / 1000
    at: Column = np.interp(steps, np.append(0.0, made), np.append(0.0, spent))
    return at


def first_reached(at: Column, losses: Column, level: float) -> float:
    """Where a curve first reaches `level`, interpolated linearly between its points; infinity if it never does."""
    known = np.isfinite(losses)
    at, losses = at[known], losses[known]
    below = np.flatnonzero(losses <= level)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(at[0])
    share = (losses[i - 1] - level) / (losses[i - 1] - losses[i])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))


def on_common_steps(runs: Sequence[Run]) -> list[Run]:
    """The finished runs, if their evaluations are at the same tokens, so that their curves have a mean."""
    finished = [run for run in runs if run.is_finished]
    alike = all(np.array_equal(run.tokens, finished[0].tokens) for run in finished)
    return finished if alike else finished[:1]


def last_step(run: Path) -> int:
    """The newest update in the record of a running run, read from the end of the file; 0 if there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "train":
                return int(event["step"])
        except (ValueError, KeyError, TypeError):  # half a line, at either end
            continue
    return 0
