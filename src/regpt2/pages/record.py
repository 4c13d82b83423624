"""A run's record as a report needs it. In: the run's folder; out: a `Record` of columns, events and conclusions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from regpt2.base.console import flop_rate
from regpt2.base.errors import UsageError, did_you_mean
from regpt2.base.files import sha256_file
from regpt2.base.record.best import BestSoFar, best_of
from regpt2.base.record.metrics import TIMED, read_events

Event = dict[str, Any]
Column = NDArray[np.float64]
T = TypeVar("T")

# A larger value is drawn as a gap: the run has diverged, and a running sum would lose its digits.
LIMIT = 1e9
BEYOND_TOKENS = 1e18

KINDS = ("run", "eval", "verdict", "sample", "note", "end")
TRAIN_COLUMNS = ("step", "loss", "grad_norm", "lr", "step_ms", "tokens_per_s", "mfu", "tokens")


@dataclass(frozen=True)
class Record:
    """All that a run recorded. Any of it may be missing, no number, or hostile text."""

    name: str
    runs: list[Event]
    train: dict[str, Column]
    skipped_steps: list[int]
    evals: list[Event]
    verdicts: list[Event]
    samples: list[Event]
    notes: list[Event]
    end: Event | None
    config_toml: str
    sha256: str
    measured: list[Event] = field(default_factory=list)
    """Later results of `regpt2 evaluate` on its model: shown in the tables, not in the curves."""

    @property
    def start(self) -> Event:
        """The first `run` event, or an empty one."""
        return self.runs[0] if self.runs else {}

    @property
    def recipe(self) -> str:
        """The recipe's name; where none is recorded, the folder's."""
        config = self.start.get("config")
        return str((config.get("recipe") if isinstance(config, dict) else "") or self.name)

    @property
    def status(self) -> str:
        """How the run ended, in a word; without an `end` event it is running, or was killed."""
        return "running, or killed" if self.end is None else str(self.end.get("reason") or "ended")

    @property
    def last_step(self) -> float:
        """Updates made, as far as the record goes."""
        seen = [number(event.get("step")) for event in (*self.runs, *self.evals)] + self.train["step"][-1:].tolist()
        return max((step for step in seen if math.isfinite(step)), default=0.0)

    @property
    def tokens(self) -> float:
        """Tokens trained on."""
        return float(np.max(self.train["tokens"], initial=0.0, where=np.isfinite(self.train["tokens"])))

    @property
    def dataset(self) -> str:
        """The name of the data set; empty if unknown, and then no published loss is shown beside the run's."""
        return str(self.start.get("dataset") or "")

    @property
    def validations(self) -> list[Event]:
        """The evaluations of the validation loss, in order."""
        return self.evals_of("val_loss")

    @property
    def best(self) -> BestSoFar:
        """The lowest validation loss and its step."""
        return best_of(self.evals)

    def evals_of(self, name: str) -> list[Event]:
        """The evaluations of one name, in order."""
        return [event for event in self.evals if event.get("eval") == name]

    def tokens_at(self, steps: Column) -> Column:
        """Tokens trained on after these steps, as recorded, since batches may grow."""
        made, tokens = self.train["step"], self.train["tokens"]
        known = np.isfinite(made) & (np.abs(tokens) < BEYOND_TOKENS)
        if not known.any():
            return steps * number(self.start.get("batch_tokens"))
        at: Column = np.interp(steps, np.append(0.0, made[known]), np.append(0.0, tokens[known]))
        return at

    @property
    def baselines(self) -> dict[str, float]:
        """Bits per byte of simple compressors and models on the same text."""
        given = self.start.get("baselines")
        pairs = given.items() if isinstance(given, dict) else ()
        return {str(name): number(bits) for name, bits in pairs if math.isfinite(number(bits))}

    @property
    def has_timed_peak(self) -> bool:
        """Is `mfu` a share of matmuls that the run timed, as on a CPU, and not of a data sheet?"""
        return any(run.get("peak_source") == TIMED for run in self.runs)

    @property
    def peak(self) -> str:
        """What `mfu` is a share of, for each rank; empty if that is not recorded."""
        rates = [rate for run in self.runs if math.isfinite(rate := number(run.get("peak_flops"))) and rate > 0]
        if not rates:
            return ""
        shown = list(dict.fromkeys(flop_rate(rate) for rate in (min(rates), max(rates))))
        source = "timed matmuls" if self.has_timed_peak else "the data sheet"
        precision = str(self.start.get("precision") or "")[:20]
        return f"{' to '.join(shown)}{' in ' * bool(precision)}{precision} by {source}"

    @property
    def elapsed_s(self) -> float:
        """The time of the whole run, from its `end` event; without one the time of its steps; NaN if unknown."""
        if self.end is not None and math.isfinite(number(self.end.get("elapsed_s"))):
            return number(self.end.get("elapsed_s"))
        step_ms = self.train["step_ms"]
        made = np.diff(self.train["step"], prepend=0.0)
        return float(np.nansum(step_ms * made)) / 1000 if np.isfinite(step_ms).any() else math.nan

    def columns(self) -> dict[str, Column]:
        """All figures by name, a row for each step that was logged or evaluated; NaN where a step has none.

        Those of an evaluation are called as in `val_loss.loss`.
        """
        made = self.train["step"]
        steps = np.unique(np.concatenate([made, numbers(self.evals, "step")]))
        found: dict[str, Column] = {}

        def put(name: str, at: Column, values: Column) -> None:
            found.setdefault(name, np.full(len(steps), np.nan))[np.searchsorted(steps, at)] = values

        for name, values in self.train.items():
            put(name, made, values)
        put("skipped", made, np.isin(made, self.skipped_steps).astype(np.float64))
        for event in self.evals:
            for key in (key for key in event if key not in ("event", "step", "eval")):
                put(f"{event.get('eval')}.{key}", numbers([event], "step"), numbers([event], key))
        return found | {"step": steps}

    def typical(self, column: str) -> float:
        """The median of a training column: warm-up and hiccups do not move it."""
        values = self.train[column][np.isfinite(self.train[column])]
        return float(np.median(values)) if len(values) else math.nan


def read_record(run: Path) -> Record:
    """Read `run/metrics.jsonl` and, if there, `run/config.toml`.

    Raises:
        UsageError: `run` is not the folder of a run.
        DataError: the record is damaged.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(_not_a_run(run))
    growing = GrowingRecord()
    for event in read_events(path):
        growing.add(event)
    return growing.record(run, sha256_file(path))


class GrowingRecord:
    """A record as it is written: events in, a `Record` out at any time, which later events do not change."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[Event]] = {kind: [] for kind in KINDS}
        self._rows = np.empty((256, len(TRAIN_COLUMNS)))
        self._n_rows = 0
        self._skipped_steps: list[int] = []
        self._end_is_last = False

    def add(self, event: Event) -> None:
        """The next event; one of an unknown kind is passed over."""
        kind = event["event"]
        if kind == "train" and math.isfinite(number(event["step"])):
            self._add_row([number(event.get(column)) for column in TRAIN_COLUMNS])
            self._skipped_steps += [int(number(event["step"]))] if event.get("skipped") is True else []
        elif isinstance(kind, str) and kind in self._kinds:
            self._kinds[kind].append(event)
        self._end_is_last = kind == "end" or (self._end_is_last and kind not in ("run", "train"))

    def _add_row(self, row: list[float]) -> None:
        if self._n_rows == len(self._rows):  # the old rows stay as they are: a `Record` may show them
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._n_rows] = row
        self._n_rows += 1

    def record(self, run: Path, sha256: str = "") -> Record:
        """All events so far, as the record of this folder; `sha256` is that of its file, if it is needed."""
        kinds, table, config = self._kinds, self._rows[: self._n_rows], run / "config.toml"
        return Record(
            name=run.resolve().name,
            runs=list(kinds["run"]),
            train={column: table[:, index] for index, column in enumerate(TRAIN_COLUMNS)},
            skipped_steps=list(self._skipped_steps),
            evals=list(kinds["eval"]),
            verdicts=list(kinds["verdict"]),
            samples=list(kinds["sample"]),
            notes=list(kinds["note"]),
            end=kinds["end"][-1] if self._end_is_last else None,
            config_toml=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
            sha256=sha256,
        )


def _not_a_run(run: Path) -> str:
    mend = "give the folder that `regpt2 train` wrote"
    if not run.exists():
        beside = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
        return f"{run} does not exist; {mend}{did_you_mean(run.name, beside)}"
    if not run.is_dir():
        return f"{run} is a file; {mend}."
    below = sorted(str(path.parent) for path in run.glob("*/metrics.jsonl"))
    found = f" Runs below it: {', '.join(below[:5])}." if below else ""
    return f"{run} holds no metrics.jsonl, so it is not the folder of a run; {mend}.{found}"


def number(value: object) -> float:
    """A recorded value as a float, also the texts "nan" and "inf"; NaN for anything else."""
    if not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def numbers(events: Iterable[Event], key: str) -> Column:
    """One value of each event."""
    return np.array([number(event.get(key)) for event in events], dtype=np.float64)


def spread(items: Sequence[T], at_most: int) -> list[T]:
    """At most `at_most` of the items, evenly chosen, with the first and the last among them."""
    if len(items) <= at_most:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, at_most)]


def thin(x: Column, y: Column, at_most: int = 1000) -> tuple[Column, Column]:
    """A curve reduced to the means of equal buckets. Values beyond LIMIT are left out; a bucket of them is a gap."""
    if len(x) <= at_most:
        return x, np.where(np.abs(y) < LIMIT, y, np.nan)
    edges = np.linspace(0, len(x), at_most, endpoint=False).astype(np.int64)
    return np.add.reduceat(x, edges) / np.diff(edges, append=len(x)), _means(y, edges, np.append(edges[1:], len(x)))


def thin_peaks(x: Column, y: Column, at_most: int = 500) -> tuple[Column, Column]:
    """A curve reduced to the greatest value of each bucket, so that a single slow step stays visible."""
    y = np.where(np.abs(y) < LIMIT, y, np.nan)
    if len(x) <= at_most:
        return x, y
    edges = np.linspace(0, len(x), at_most, endpoint=False).astype(np.int64)
    return x[edges], np.fmax.reduceat(y, edges)


def smooth(y: Column, share: float = 0.03) -> Column:
    """A moving mean over this share of the curve: centered, narrower at the start, trailing at the end."""
    place = np.arange(len(y))
    before = np.minimum(place, int(len(y) * share / 2))
    after = np.minimum(before, len(y) - 1 - place)
    return _means(y, place - before, place + after + 1)


def _means(y: Column, first: NDArray[np.int64], stop: NDArray[np.int64]) -> Column:
    """The mean of the drawable values of each y[first:stop]; NaN where there are none."""
    drawable = np.abs(y) < LIMIT
    sums = np.concatenate([[0.0], np.cumsum(np.where(drawable, y, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(drawable)])
    count = counts[stop] - counts[first]
    return np.where(count > 0, (sums[stop] - sums[first]) / np.maximum(count, 1.0), np.nan)
