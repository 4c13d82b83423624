"""What a report draws. In: the records of runs; out: panels with curves and the lines to compare them with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from regpt2.base.console import count
from regpt2.pages.charts.formats import Format
from regpt2.pages.published import CHANCE, references_of
from regpt2.pages.record import LIMIT, Column, Record, number, numbers, smooth, thin, thin_peaks
from regpt2.references import curves as reference_curves

MOST_RUNS = 8
SHORT, SHORT_COMPARED = 10_000, 1_000
"""Updates: a run of fewer is shown whole, or of fewer than the second if its end is compared with published levels."""
TIMED_TITLE = "Share of the machine's matmul rate"
GENERAL, PERCENT = Format("general", 6), Format("percent")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), "-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
MARKERS = "os^Dv*PX"
BAND = "The band is one standard error."


@dataclass(frozen=True)
class Look:
    """How a curve is drawn. `ink` is a role of `draw.PRINT`; each run has its own ink, dash and marker."""

    ink: str
    width: float = 1.7
    alpha: float = 1.0
    dash: object = "-"
    marker: str = ""


@dataclass(frozen=True)
class Trace:
    """A curve; one without a label is not named. `spread` is drawn as a band on both sides of it."""

    label: str
    x: Column
    y: Column
    look: Look
    spread: Column | None = None
    about: str = ""
    """The full name of a published curve; its label is short."""
    source: str = ""


@dataclass(frozen=True)
class Rule:
    """A published level to compare with."""

    label: str
    value: float
    source: str = ""
    on_right: bool = False


@dataclass(frozen=True)
class Across:
    """The axis from left to right: steps of one run, with its tokens above, or the tokens of several."""

    unit: str
    last: float
    resumes: tuple[float, ...] = ()
    tokens_at: Callable[[Column], Column] | None = None


@dataclass(frozen=True)
class Panel:
    """The content of one chart."""

    name: str
    title: str
    across: Across
    traces: list[Trace]
    rules: list[Rule] = field(default_factory=list)
    tick: Format = GENERAL
    from_zero: bool = False
    log: bool = False
    note: str = ""
    most: float = math.inf
    """Values above it are left out."""
    whole: bool = False
    """No value of a named curve is left out."""

    def limits(self) -> tuple[float, float] | None:
        """Limits of all values, or those that fit the end of the run: then the first fall enters from above."""
        drawn = [(trace.look.alpha == 1, trace.y[np.isfinite(trace.y)]) for trace in self.traces]
        drawn = [(strong, y) for strong, y in drawn if len(y) > (not self.whole)]
        named, faint = ([y for strong, y in drawn if strong is one] for one in (True, False))
        if self.log or self.from_zero or not named:
            return None
        lows = [float(y.min()) for y in named] + [float(np.quantile(y, 0.01)) for y in faint]
        highs = [float(y.max()) if self.whole else _after_the_fall(y) for y in named]
        levels = [*lows, *highs, *(rule.value for rule in self.rules)]
        low, high = min(levels), min(max(levels), self.most)
        margin = 0.07 * (high - low)
        return (low - margin, high + margin * (2 if self.rules else 1)) if margin else None

    def description(self) -> str:
        """The chart in words, for screen readers."""
        parts = [_describe(trace, self) for trace in self.traces if trace.label and np.isfinite(trace.y).any()]
        parts += [f"{rule.label}: {self.tick(rule.value)}" for rule in self.rules]
        return f"{self.title}. {'; '.join(parts)}."


def _after_the_fall(y: Column) -> float:
    """The top of a falling curve without its beginning."""
    return float(np.quantile(y, 0.95)) if len(y) >= 50 else float(y[len(y) > 2 :].max())


def panels(records: Sequence[Record]) -> list[Panel]:
    """The charts that these runs have data for, the loss first."""
    across = _across(records)
    drawn = [_loss(records, across), _hellaswag(records, across), _core(records, across)]
    drawn += [_bits(records[0], across)] if len(records) == 1 else []
    drawn += [_column(records, across, *how) for how in _COLUMNS]
    return [panel for panel in drawn if any(np.isfinite(trace.y).any() for trace in panel.traces)]


def compared_on(records: Sequence[Record]) -> str:
    """The data that all these runs were validated on; empty if it differs, for then losses cannot be compared."""
    starts = [(record.dataset, record.start) for record in records]
    on = {f"{name or run.get('data_fingerprint')} in tokens of {run.get('tokenizer')}" for name, run in starts}
    return on.pop() if len(on) == 1 else ""


def look_of(place: int, *, faint: bool = False) -> Look:
    """The ink, dash and marker of a run beside others: no two share all three."""
    place %= MOST_RUNS
    if faint:
        return Look(f"run{place + 1}", 0.9, 0.4)
    return Look(f"run{place + 1}", 1.7, 1.0, DASHES[place], MARKERS[place])


def _across(records: Sequence[Record]) -> Across:
    if len(records) > 1:
        return Across("tokens", max(record.tokens for record in records))
    (record,) = records
    resumes = tuple(number(run.get("step")) for run in record.runs[1:50])
    return Across("steps", record.last_step, resumes, record.tokens_at if record.tokens else None)


def _x(records: Sequence[Record], record: Record, steps: Column) -> Column:
    return steps if len(records) == 1 else record.tokens_at(steps)


def _is_short(records: Sequence[Record], *, compared: bool) -> bool:
    """Is the first fall so wide that it must be seen? `compared`: there are published levels at the end."""
    return max(record.last_step for record in records) < (SHORT_COMPARED if compared else SHORT)


def _loss(records: Sequence[Record], across: Across) -> Panel:
    traces: list[Trace] = []
    for place, record in enumerate(records):
        alone = len(records) == 1
        x, loss = _x(records, record, record.train["step"]), record.train["loss"]
        val_x = _x(records, record, numbers(record.validations, "step"))
        val = _within(numbers(record.validations, "loss"))
        if alone:
            traces += [Trace("", *thin(x, loss), Look("train", 0.7, 0.35))]
            traces += [Trace("training", *thin(x, smooth(loss)), Look("train"))]
            traces += [Trace("validation", val_x, val, Look("val", marker="o"))]
            # Published levels are measured in 1,024 tokens too.
            short = _within(numbers(record.validations, "loss_1024"))
            if np.isfinite(short).any():
                traces += [Trace("in 1,024 tokens", val_x, short, Look("val", 1.2, dash=DASHES[2]))]
            continue
        validated = bool(np.isfinite(val).any())
        traces += [Trace("" if validated else record.name, *thin(x, smooth(loss)), look_of(place, faint=validated))]
        traces += [Trace(record.name, *thin(val_x, val), look_of(place))] if validated else []
    rules, reference = [], None
    if compared_on(records):
        rules = [Rule(one.model, one.value, one.source) for one in references_of(records[0], "val_loss", "loss")]
        reference = _reference_curve(records, across)
    note = "Strong: validation; thin: training." if len(records) > 1 else ""
    traces += [reference] if reference else []
    whole = _is_short(records, compared=bool(rules or reference))
    return Panel(
        "loss", "Loss, nats per token", across, traces, rules, tick=Format("digits", 3), note=note, whole=whole
    )


def _reference_curve(records: Sequence[Record], across: Across) -> Trace | None:
    """The curve of the verdict up to the runs' last tokens; its band from the first verdict to the last."""
    judged = next((record for record in records if record.verdicts), None)
    named = judged and judged.verdicts[-1].get("curve")
    curve = next((one for one in reference_curves.load() if one.name == named), None)
    if judged is None or curve is None:
        return None
    band_at, widths = judged.tokens_at(numbers(judged.verdicts, "step")), numbers(judged.verdicts, "band")
    known = np.isfinite(band_at) & np.isfinite(widths)
    band: Column = np.full_like(curve.tokens, np.nan)
    if known.any():
        band = np.interp(curve.tokens, band_at[known], widths[known], left=np.nan, right=np.nan)
    x = curve.tokens
    if across.unit == "steps":
        steps = np.linspace(0, across.last, 2000)
        x = np.interp(curve.tokens, judged.tokens_at(steps), steps, right=np.nan)
    shown = np.isfinite(x) & (x <= across.last)
    look, about = Look("faint", 1.1), f"{curve.title}{' (by shape)' if curve.by_shape else ''}"
    return Trace("reference", x[shown], curve.loss[shown], look, band[shown], about, curve.source)


def _hellaswag(records: Sequence[Record], across: Across) -> Panel:
    rules = [
        Rule(one.model, one.value, one.source)
        for record in records
        for one in references_of(record, "hellaswag", "acc_norm")
    ]
    rules = [*dict.fromkeys(rules), Rule("chance", CHANCE["hellaswag"], on_right=True)]
    traces = _measured(records, "hellaswag", "acc_norm", "HellaSwag")
    note = BAND if len(records) == 1 else ""
    return Panel("hellaswag", "HellaSwag, acc_norm", across, traces, rules, tick=PERCENT, note=note, whole=True)


def _core(records: Sequence[Record], across: Across) -> Panel:
    """CORE, or where some of its tasks were not measured the mean over the others, which has no published figure."""
    events = [event for record in records for event in record.evals_of("core")]
    n_tasks = sorted({n for event in events if math.isfinite(n := number(event.get("tasks")))})
    whole = all("core" in event for event in events)
    rules = [
        Rule(one.model, one.value, one.source) for record in records for one in references_of(record, "core", "core")
    ]
    rules = [*(dict.fromkeys(rules) if whole else ()), Rule("chance", 0.0, on_right=True)]
    title = "CORE" if whole else f"CORE, the mean over {' or '.join(f'{n:.0f}' for n in n_tasks)} tasks"
    note = BAND if len(records) == 1 else ""
    traces = _measured(records, "core", "centered_mean", "CORE")
    return Panel("core", title, across, traces, rules, tick=Format("digits", 3), note=note, whole=True)


def _measured(records: Sequence[Record], name: str, metric: str, label: str) -> list[Trace]:
    """One metric of an evaluation while training; of a single run within its standard error."""
    traces = []
    for place, record in enumerate(records):
        events, alone = record.evals_of(name), len(records) == 1
        x = _x(records, record, numbers(events, "step"))
        look = Look("val", marker="o") if alone else look_of(place)
        y, spread = _within(numbers(events, metric)), _within(numbers(events, f"{metric}_stderr"))
        traces.append(Trace(label if alone else record.name, x, y, look, spread if alone else None))
    return traces


def _bits(record: Record, across: Across) -> Panel:
    bits = _within(numbers(record.validations, "bits_per_byte"))
    finite = bits[np.isfinite(bits)]
    most = 2 * float(finite.max(initial=8.0))
    rules = [Rule(name[:40], value) for name, value in record.baselines.items() if value < most]
    trace = Trace("bits per byte", numbers(record.validations, "step"), bits, Look("val", marker="o"))
    whole = _is_short([record], compared=bool(rules))
    return Panel("bits", "Validation, bits per byte", across, [trace], rules, tick=Format("digits", 2), whole=whole)


def _column(records: Sequence[Record], across: Across, column: str, title: str, tick: Format) -> Panel:
    """A panel of one training column; the norm and the step time show single peaks behind their mean."""
    traces, has_peaks = [], column in ("grad_norm", "step_ms")
    title, note = _peak(records, title) if column == "mfu" else (title, "")
    for place, record in enumerate(records):
        alone = len(records) == 1
        x, y = _x(records, record, record.train["step"]), record.train[column]
        look = Look("train", 1.5) if alone else look_of(place)
        if alone and has_peaks:
            traces.append(Trace("", *thin_peaks(x, y), Look("train", 0.7, 0.35)))
        shown = y if column == "lr" else smooth(y)
        traces.append(Trace(title if alone else record.name, *thin(x, shown, 500), look))
    values = np.concatenate([trace.y[np.isfinite(trace.y) & (trace.y > 0)] for trace in traces] or [np.zeros(0)])
    log = has_peaks and len(values) > 0 and values.max() > 20 * values.min()
    note = _slow_steps(records[0]) if column == "step_ms" and len(records) == 1 else note
    return Panel(column, title, across, traces, tick=tick, from_zero=not log, log=bool(log), note=note)


def _peak(records: Sequence[Record], title: str) -> tuple[str, str]:
    """The title and the remark of the panel of MFU: on a CPU it is a share of the matmuls that the run timed."""
    if len(records) == 1:
        peak = records[0].peak
        return (TIMED_TITLE if records[0].has_timed_peak else title), f"A rank's peak: {peak}." if peak else ""
    timed = [record.has_timed_peak for record in records]
    if all(timed):
        return TIMED_TITLE, ""
    return title, "On a CPU the peak is the rate of its matmuls." if any(timed) else ""


def _slow_steps(record: Record) -> str:
    """How many steps took more than twice the median, and the slowest; steps logged together share a time."""
    step_ms, median = record.train["step_ms"], record.typical("step_ms")
    slow = np.flatnonzero(_within(step_ms) > 2 * median)
    if not len(slow):
        return "No step took more than twice the median."
    worst = slow[np.argmax(step_ms[slow])]
    slowest = f"the slowest {step_ms[worst]:,.0f} ms, step {record.train['step'][worst]:,.0f}"
    return f"{len(slow):,} of {len(step_ms):,} steps took more than twice the median of {median:,.0f} ms; {slowest}."


def _within(y: Column) -> Column:
    """The values with gaps for those that cannot be drawn."""
    return np.where(np.abs(y) < LIMIT, y, np.nan)


def _describe(trace: Trace, panel: Panel) -> str:
    place = np.flatnonzero(np.isfinite(trace.y))
    first, last = place[0], place[-1]
    at = f"at {count(trace.x[last])} {panel.across.unit}"
    if first == last:
        return f"{trace.label}: {panel.tick(trace.y[last])} {at}"
    low, high = (panel.tick(float(pick(trace.y))) for pick in (np.nanmin, np.nanmax))
    ends = f"from {panel.tick(trace.y[first])} to {panel.tick(trace.y[last])} {at}"
    return f"{trace.label}: {ends}, between {low} and {high}"


_COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("lr", "Learning rate", Format("short")),
    ("grad_norm", "Gradient norm", Format("general", 3)),
    ("tokens_per_s", "Tokens per second", Format("count")),
    ("mfu", "Model FLOPs utilization (MFU)", PERCENT),
    ("step_ms", "Milliseconds per step", Format("count")),
)
