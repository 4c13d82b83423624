"""A run in a terminal. In: its record, status and a size in characters; out: lines that fit it."""

import math
from dataclasses import replace

import numpy as np
from rich.text import Text

from regpt2.base.console import count, duration, safe_text
from regpt2.pages.charts.panels import Panel, panels
from regpt2.pages.live.braille import Curve, draw
from regpt2.pages.live.status import FAILED, FINISHED, KILLED, RUNNING, STOPPED, WAITING, Status
from regpt2.pages.record import Record

INKS = {"train": "blue", "val": "red", "faint": "bright_black"}
STATES = {RUNNING: "green", FAILED: "red", KILLED: "red", FINISHED: "bold", STOPPED: "bold", WAITING: "bright_black"}
SIGNS = {RUNNING: "●", FINISHED: "✓", FAILED: "✗", KILLED: "✗"}
FAINT = "bright_black"
LABEL_COLUMNS = 7
LEAST_ROWS, MOST_ROWS = 6, 24
"""Of the loss chart."""
SMALL_ROWS = 3
SMALL = ("bits", "hellaswag", "core", "lr", "tokens_per_s", "grad_norm")
LEAST_SMALL = 26
"""Columns of a small chart."""
SAMPLE_ROWS = 5


def view_of(record: Record, status: Status, name: str, size: tuple[int, int]) -> Text:
    """The run on this many columns and rows."""
    columns, rows = size
    head = [*_head(status, name, columns), *_figures(status, columns), *_verdict(status, columns)]
    drawn = {panel.name: panel for panel in panels([record])}
    small = _small(drawn, columns)
    sample = _sample(record, columns)
    while len(head) + len(small) + len(sample) + LEAST_ROWS + 3 > rows and (sample or small):  # the loss comes first
        small, sample = (small, []) if sample else ([], [])
    free = rows - len(head) - len(small) - len(sample) - 3
    chart = _chart(drawn.get("loss"), columns, max(LEAST_ROWS, min(MOST_ROWS, free)))
    lines = [*head, *chart, *small, *sample]
    for line in lines:
        line.truncate(columns, overflow="ellipsis")
    return Text("\n").join(lines)


def progress_bar(share: float, columns: int, style: str = "green") -> Text:
    """A bar of this width."""
    done = round(columns * share) if math.isfinite(share) else 0
    return Text.assemble(("━" * done, style), ("─" * (columns - done), FAINT))


def state_text(status: Status) -> Text:
    """The state with its sign, in its color."""
    return Text(f"{SIGNS.get(status.state, '○')} {status.state}", style=STATES[status.state])


def left_of(status: Status) -> str:
    """How far it is, and the time left or the time that it took."""
    share = f"{math.floor(100 * status.share)} %" if math.isfinite(status.share) else ""
    if status.state == RUNNING and math.isfinite(status.left_s):
        return f"{share}, {duration(status.left_s)} left"
    return f"{share}, {duration(status.elapsed_s)}" if math.isfinite(status.elapsed_s) else share


def steps_of(status: Status) -> str:
    """1,200/2,000"""
    return f"{status.step:,.0f}" + (f"/{status.max_steps:,.0f}" if math.isfinite(status.max_steps) else "")


def _head(status: Status, name: str, columns: int) -> list[Text]:
    title = Text.assemble((safe_text(name), "bold"), " ")
    if status.recipe and status.recipe != name:
        title.append(safe_text(status.recipe), style=FAINT)
    state = state_text(status)
    title.truncate(max(8, columns - len(state) - 1), overflow="ellipsis")
    title.append(" " * max(1, columns - title.cell_len - state.cell_len))
    title.append_text(state)
    if status.state == WAITING:
        return [title, Text("Waiting for the first event of its record.", style=FAINT)]
    words = f" step {steps_of(status)}, {left_of(status)}"
    style = STATES[status.state] if status.state != FINISHED else FAINT
    lines = [title]
    if columns - len(words) >= 12:
        lines.append(Text.assemble(progress_bar(status.share, columns - len(words), style), words))
    else:
        lines += [progress_bar(status.share, columns, style), Text(words.strip())]
    if status.reason:
        lines.append(Text(safe_text(status.reason).replace("\n", " "), style=STATES[status.state]))
    return lines


def _figures(status: Status, columns: int) -> list[Text]:
    """The figures of now, as many in a line as fit."""
    best = status.best_loss < status.val_loss
    pairs = [
        ("loss", f"{status.loss:.4f}", status.loss),
        ("validation", f"{status.val_loss:.4f}", status.val_loss),
        ("best", f"{status.best_loss:.4f} at {status.best_step:,.0f}", status.best_loss if best else math.nan),
        ("tokens/s", count(status.tokens_per_s), status.tokens_per_s),
        (status.mfu_name, f"{status.mfu:.1%}", status.mfu),
        ("lr", f"{status.lr:.2e}", status.lr),
        ("norm", f"{status.grad_norm:.3f}", status.grad_norm),
        ("tokens", count(status.tokens), status.tokens or math.nan),
    ]
    lines = [Text()]
    for name, shown, value in pairs:
        if not math.isfinite(value):
            continue
        pair = Text.assemble((f"{name} ", FAINT), (shown, "bold"))
        if lines[-1].cell_len and lines[-1].cell_len + 3 + pair.cell_len > columns:
            lines.append(Text())
        lines[-1].append("   " if lines[-1].cell_len else "").append_text(pair)
    return [line for line in lines if line.cell_len]


def _verdict(status: Status, columns: int) -> list[Text]:
    if not status.verdict:
        return []
    style = "green" if status.verdict in ("On track", "Better") else "red" if status.verdict == "Above" else "bold"
    said = Text.assemble((safe_text(status.verdict), style), safe_text(status.verdict_text).replace("\n", " "))
    return _folded(said, columns, most=3)


def _chart(panel: Panel | None, columns: int, rows: int) -> list[Text]:
    """The loss, with its names above and its steps below."""
    if panel is None:
        return [Text("No step is recorded yet.", style=FAINT)]
    named = [trace for trace in panel.traces if trace.label and np.isfinite(trace.y).any()]
    legend = Text(panel.title, style="bold")
    for trace in named:
        legend.append("   ").append("─ ", style=INKS.get(trace.look.ink, "")).append(trace.label, style=FAINT)
    return [legend, *_plot(panel, columns, rows)]


def _plot(panel: Panel, columns: int, rows: int) -> list[Text]:
    low, high = _range(panel)
    x_range = (0.0, max(1.0, panel.across.last))
    order = sorted(panel.traces, key=lambda trace: (bool(trace.label), trace.look.ink == "val"))
    curves = []
    for trace in order:
        faint = not trace.label or bool(trace.about)
        curves.append(Curve(trace.x, trace.y, FAINT if faint else INKS.get(trace.look.ink, "")))
    lines = []
    for row, line in enumerate(draw(curves, (columns - LABEL_COLUMNS, rows), x_range, (low, high))):
        value = panel.tick(_rounded(high - (high - low) * (row + 0.5) / rows, high - low))
        label = value if row in (0, rows // 2, rows - 1) else ""
        lines.append(Text.assemble((f"{label:>{LABEL_COLUMNS - 1}} ", FAINT), line))
    end = f"{panel.across.last:,.0f} {panel.across.unit}"
    floor = f"{'0':>{LABEL_COLUMNS + 1}}" + end.rjust(columns - LABEL_COLUMNS - 1)
    return [*lines, Text(floor, style=FAINT)]


def _range(panel: Panel) -> tuple[float, float]:
    values = np.concatenate([trace.y[np.isfinite(trace.y)] for trace in panel.traces])
    low, high = panel.limits() or (float(values.min()), float(values.max()))
    if panel.from_zero:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rounded(value: float, span: float) -> float:
    """To a hundredth of the chart's height: more digits would be noise."""
    return round(value, max(0, 2 - math.floor(math.log10(span)))) if span > 0 else value


def _small(drawn: dict[str, Panel], columns: int) -> list[Text]:
    """Small charts beside each other, as many as fit."""
    shown = [drawn[name] for name in SMALL if name in drawn][: max(0, columns // LEAST_SMALL)]
    if len(shown) < 2:
        return []
    each = columns // len(shown) - 1
    blocks = []
    for panel in shown:
        title = Text(panel.title, style="bold")
        title.truncate(each, overflow="ellipsis")
        blocks.append([title, *_plot(replace(panel, rules=[]), each, SMALL_ROWS)[:-1]])
    lines = [Text()]
    for row in range(SMALL_ROWS + 1):
        line = Text()
        for block in blocks:
            line.append_text(block[row]).append(" " * (each + 1 - block[row].cell_len))
        line.rstrip()
        lines.append(line)
    return lines


def _sample(record: Record, columns: int) -> list[Text]:
    """The beginning of the newest sample."""
    if not record.samples:
        return []
    newest = record.samples[-1]
    texts, prompt = newest.get("texts"), str(newest.get("prompt") or "")[:500]
    text = str((texts or [""])[0] if isinstance(texts, list) else texts)[:2000].removeprefix(prompt)
    said = Text.assemble((safe_text(prompt), FAINT), safe_text(text).replace("\t", "    "))
    title = Text(f"Sample of step {safe_text(str(newest.get('step')))}", style="bold")
    return [Text(), title, *_folded(said, columns, most=SAMPLE_ROWS)]


def _folded(said: Text, columns: int, most: int) -> list[Text]:
    """The first lines of these columns, up to a limit."""
    from rich.console import Console  # noqa: PLC0415  (only to fold)

    lines = list(said.wrap(Console(width=columns), columns))
    return lines[:most]
