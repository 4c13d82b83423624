"""The ladder as a table. In: the results of its rungs; out: their figures, and lines for the screen or in Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from regpt2.base.device import peak_flops, pick_device
from regpt2.machine.speed.rungs import COMPARED, RUNGS, RungResult
from regpt2.machine.speed.steps import StepTimes
from regpt2.model.flops import flops_per_token, mfu, palm_flops_per_token


@dataclass(frozen=True, kw_only=True)
class Figures:
    step_ms: float  # the median
    low_ms: float
    high_ms: float  # eight of ten steps lie between low_ms and high_ms
    tokens_per_s: float
    gain: float | None  # speed over the last correct rung before; None for the first
    in_all: float  # speed over the first rung
    flop_per_s: float
    """With causal attention counted once, as in model/flops.py; 798 MFLOP per token for the 124M model."""
    palm_flop_per_s: float  # as nanoGPT and the PaLM paper count; 860 MFLOP per token
    mfu: float | None  # share of the data sheet's peak at this precision; None without a data sheet
    palm_mfu: float | None
    peak_bytes: int
    attention: str
    loss_apart: float  # the largest difference of an early loss from the first rung's at the same step


def figures_of(rows: Sequence[RungResult]) -> list[Figures | None]:
    """The figures of each row; None if it does not count."""
    found: list[Figures | None] = []
    counted: list[StepTimes] = []
    for row in rows:
        if row.times is None or row.why_not:
            found.append(None)
            continue
        found.append(_figures(row, row.times, counted))
        counted.append(row.times)
    return found


def _figures(row: RungResult, times: StepTimes, before: Sequence[StepTimes]) -> Figures:
    rate, work = times.tokens_per_s, row.work
    first = before[0] if before else times
    peak = peak_flops(pick_device(work.device), times.precision)
    ours, palm = (count_flops(work.model, work.seq_len) for count_flops in (flops_per_token, palm_flops_per_token))
    several = len(times.step_s) > 1
    tenths = statistics.quantiles(times.step_s, n=10, method="inclusive") if several else times.step_s
    return Figures(
        step_ms=1e3 * times.median_s,
        low_ms=1e3 * tenths[0],
        high_ms=1e3 * tenths[-1],
        tokens_per_s=rate,
        gain=rate / before[-1].tokens_per_s if before else None,
        in_all=rate / first.tokens_per_s,
        flop_per_s=rate * ours,
        palm_flop_per_s=rate * palm,
        mfu=mfu(rate, ours, peak, 1),
        palm_mfu=mfu(rate, palm, peak, 1),
        peak_bytes=times.peak_bytes,
        attention=times.attention,
        loss_apart=max(abs(a - b) for a, b in zip(times.losses[:COMPARED], first.losses, strict=False)),
    )


def cells(rows: Sequence[RungResult]) -> list[list[str]]:
    """The cells of the head and of each row. A row that does not count ends with its reason."""
    figures = figures_of(rows)
    known = any(one is not None and one.mfu is not None for one in figures)
    rate = "MFU" if known else "TFLOP/s"
    lines = [["rung", "lecture", "ms/step", "spread", "tokens/s", "gain", rate, "6N+12CTL", "memory", "attention"]]
    for row, one in zip(rows, figures, strict=True):
        lines.append([row.rung, _lecture(row), *([row.why_not] if one is None else _measured(one, known))])
    return lines


def _measured(one: Figures, known: bool) -> list[str]:
    rates = [f"{rate / 1e12:.3g}" for rate in (one.flop_per_s, one.palm_flop_per_s)]
    if known:
        rates = ["" if share is None else f"{share:.1%}" for share in (one.mfu, one.palm_mfu)]
    return [
        f"{one.step_ms:,.0f}" if one.step_ms >= 1000 else f"{one.step_ms:.1f}",
        f"±{(one.high_ms - one.low_ms) / 2 / one.step_ms:.1%}",
        f"{one.tokens_per_s:,.0f}",
        "" if one.gain is None else f"x{one.gain:.2f}",
        *rates,
        f"{one.peak_bytes / 1e9:.2f} GB",
        one.attention,
    ]


def _lecture(row: RungResult) -> str:
    """The lecture's step time and its gain over the lecture's rung before."""
    if row.lecture_ms is None:
        return ""
    slower = [rung.lecture_ms for rung in RUNGS if rung.lecture_ms and rung.lecture_ms > row.lecture_ms]
    return f"{row.lecture_ms:,.0f} ms" + (f" x{slower[-1] / row.lecture_ms:.2f}" if slower else "")


def for_screen(rows: Sequence[RungResult]) -> list[str]:
    """Lines with aligned columns; a reason fills the rest of its line."""
    head, *lines = cells(rows)
    whole = [line for line in (head, *lines) if len(line) == len(head)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(head))]
    widths[:2] = [max(len(line[i]) for line in (head, *lines)) for i in range(2)]
    shown = []
    for first, *others in (head, *lines):
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        if len(others) + 1 < len(head):
            aligned[-1] = others[-1]
        shown.append("  ".join([first.ljust(widths[0]), *aligned]))
    return shown


def for_markdown(rows: Sequence[RungResult]) -> list[str]:
    return [*_as_markdown(cells(rows), "---:"), "", *_as_markdown(legend(rows), "---")]


def _as_markdown(rows: Sequence[Sequence[str]], rule: str) -> list[str]:
    head, *lines = rows
    ruled = [head, ["---", *[rule] * (len(head) - 1)], *lines]
    filled = [[cell.replace("|", "/") for cell in line] + [""] * (len(head) - len(line)) for line in ruled]
    return [f"| {' | '.join(line)} |" for line in filled]


def legend(rows: Sequence[RungResult]) -> list[list[str]]:
    """A head and a row for each rung: what it changes, and how `regpt2 train` does the same."""
    head = ["rung", "what changes", "in regpt2 train"]
    return [head, *([row.rung, row.title, row.option or "always"] for row in rows)]


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns that begin at one place each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary(rows: Sequence[RungResult]) -> list[str]:
    counted = [(row, one) for row, one in zip(rows, figures_of(rows), strict=True) if one is not None]
    if not counted:
        return ["No rung could be measured."]
    (first, _), (last, at_last) = counted[0], counted[-1]
    lecture = [(row, one) for row, one in counted if row.lecture_ms]
    lines = [f"From {first.rung} to {last.rung}: x{at_last.in_all:.2f}."]
    if len(lecture) > 1:
        (low, at_low), (high, at_high) = lecture[0], lecture[-1]
        theirs = (low.lecture_ms or 0.0) / (high.lecture_ms or 1.0)
        ours = at_high.in_all / at_low.in_all
        lines.append(f"From {low.rung} to {high.rung}: x{ours:.2f}; in the lecture, on an A100: x{theirs:.2f}.")
    apart = max(one.loss_apart for _, one in counted)
    lines.append(f"Correct: in the first {COMPARED} steps every loss is within {apart:.1g} of that of {first.rung}.")
    return lines
