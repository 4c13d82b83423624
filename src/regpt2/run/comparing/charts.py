"""Charts of a comparison. In: its runs and outcomes; out: curves for a page, and a PNG with the differences beside."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from regpt2.pages.charts.draw import PRINT, heading, plain, png, print_panel, settings
from regpt2.pages.charts.formats import Format
from regpt2.pages.charts.panels import MOST_RUNS, Across, Panel, Trace, look_of
from regpt2.pages.record import Column
from regpt2.run.comparing.outcomes import Outcome, answer
from regpt2.run.comparing.runs import Comparison, Run, on_common_steps

FIRST_SHOWN = 0.15  # of the run: before that all curves fall steeply; the differences are at the end
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def panels(plan: Comparison, runs: Sequence[Sequence[Run]]) -> list[Panel]:
    """The validation losses over tokens and over time: the mean over each arm's seeds, in a band of one deviation."""
    shown = [
        (place, arm.label, on_common_steps(of_arm))
        for place, (arm, of_arm) in enumerate(zip(plan.arms, runs, strict=True))
        if any(run.is_finished for run in of_arm)
    ][:MOST_RUNS]
    if not shown:
        return []
    note = "Means over seeds; the band is one standard deviation."
    if len(plan.arms) > MOST_RUNS:
        note += f" Only the first {MOST_RUNS} arms are shown; the tables have all."
    last_s = max(float(run.seconds[-1]) for _, _, finished in shown for run in finished)
    unit, unit_s = next((unit, size) for unit, size in _UNITS if last_s >= 2 * size or size == 1)
    over_tokens = _panel("loss", "Validation loss, nats per token", "tokens", shown, lambda run: run.tokens)
    over_time = _panel("time", "The same over training time", unit, shown, lambda run: run.seconds / unit_s)
    return [replace(over_tokens, note=note), over_time]


def _panel(
    name: str, title: str, unit: str, shown: Sequence[tuple[int, str, list[Run]]], x_of: Callable[[Run], Column]
) -> Panel:
    traces = []
    for place, label, runs in shown:
        losses = np.stack([run.losses for run in runs])  # (seeds, evaluations)
        x: Column = np.mean([x_of(run) for run in runs], axis=0)
        spread = losses.std(axis=0, ddof=1) if len(runs) > 1 else None
        traces.append(Trace(label, x, losses.mean(axis=0), look_of(place), spread))
    last = max(float(trace.x[-1]) for trace in traces)
    most = max(float(np.interp(FIRST_SHOWN * last, trace.x, trace.y)) for trace in traces)
    return Panel(name, title, Across(unit, last), traces, tick=Format("general", 3), most=most)


def picture(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome], subtitle: str) -> bytes:
    """The PNG: the answer, the curves, and each arm's difference to the first with its interval and its seeds."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a picture needs it)

    drawn = panels(plan, runs)
    inches = max(5.2, 2.2 + 0.42 * len(found))
    with settings("compared"):
        figure = Figure(figsize=(11, inches), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            1, 2, width_ratios=[1.5, 1], left=0.06, right=0.975, top=1 - 1.4 / inches, bottom=0.6 / inches, wspace=0.42
        )
        for panel in drawn[:1]:
            print_panel(figure.add_subplot(grid[0, 0]), panel, ticks=6)
        _differences(figure.add_subplot(grid[0, 1]), plan, runs, found)
        heading(figure, answer(plan, found), subtitle, (1 - 0.2 / inches, 1 - 0.88 / inches), size=13)
    return png(figure)


def _differences(axes: Any, plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> None:
    """A row for each arm but the first: a dot for each seed, a bar for the interval, a mark for the mean."""
    axes.set_title(f"Difference to {plain(plan.arms[0].label, 40)}: left is better", loc="left", fontsize=10,
                   color=PRINT["text"], pad=8, parse_math=False)  # fmt: skip
    axes.axvline(0, color=PRINT["faint"], linewidth=1, linestyle=(0, (4, 3)))
    base = found[0].finals
    for place, one in enumerate(found[1:], start=1):
        ink = PRINT[look_of(place).ink]
        differences = [loss - base[seed] for seed, loss in one.finals.items() if seed in base]
        axes.plot(differences, [place] * len(differences), "o", color=ink, markersize=4, alpha=0.45)
        if one.against is not None:
            axes.plot([one.against.low, one.against.high], [place, place], color=ink, linewidth=2)
            axes.plot([one.against.mean], [place], "D", color=ink, markersize=6)
    axes.set_yticks(range(1, len(found)), [plain(one.label, 28) for one in found[1:]], parse_math=False)
    axes.set_ylim(len(found) - 0.4, 0.4)
    axes.tick_params(length=0, labelcolor=PRINT["faint"], labelsize=9, pad=5)
    axes.tick_params(axis="y", labelcolor=PRINT["text"])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(PRINT["grid"])
    axes.grid(axis="x", color=PRINT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
