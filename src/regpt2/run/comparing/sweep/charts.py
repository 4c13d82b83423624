"""A grid as pictures. In: its places with verdicts; out: losses over one setting, a heat map of two."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from regpt2.pages.charts.draw import Paint, plain
from regpt2.pages.charts.panels import MOST_RUNS, look_of
from regpt2.run.comparing.axes import place_name, values_of
from regpt2.run.comparing.runs import Axis
from regpt2.run.comparing.sweep.best import BEST, LEVEL, UNTESTED, Cell, Sweep, is_geometric, is_numeric, place_words
from regpt2.run.comparing.sweep.tables import loss, mark

WELL_ABOVE = (
    6.0  # times the median's distance from the best: a loss beyond it is drawn at the upper edge, with its value
)
DEEPEST = 0.5  # opacity of the best cell: text on it must stay readable in light and dark
MOST_ACROSS = 8


def drawings(sweep: Sweep) -> list[tuple[str, str, Paint, float]]:
    """Name, title, drawing and height in inches of each picture; none for a grid of three axes or more."""
    if not any(cell.outcome.finals for cell in sweep.cells):
        return []
    if len(sweep.axes) == 1:
        return [("grid", f"Loss over {_names(sweep.axes[0])}", lambda figure, ink: lines(figure, ink, sweep), 3.7)]
    if len(sweep.axes) > 2:
        return []
    first, second = sweep.axes
    height = 1.0 + 0.55 * len(first.values)
    made = [(
        "grid", f"Loss by {_names(first)} (down) and {_names(second)} (across)",
        lambda figure, ink: heat_map(figure, ink, sweep), height,
    )] if len(second.values) <= MOST_ACROSS else []  # fmt: skip
    title = f"Loss over {_names(first)}, a line for each {_names(second)}"
    return [*made, ("lines", title, lambda figure, ink: lines(figure, ink, sweep), 3.7)]


def description(sweep: Sweep) -> str:
    """The pictures in words, for screen readers."""
    cells = (f"{place_words(sweep.axes, cell.arm)}: {loss(cell)} {mark(cell)}".strip() for cell in sweep.cells)
    return "; ".join(cells).replace("~", "like the best")


def lines(figure: Any, ink: dict[str, str], sweep: Sweep, where: Any = None) -> None:
    """The mean over each value of the first setting, a dot for each seed; a line for each value of the second."""
    axes = where or _axes(figure, bottom=0.52, left=0.55)
    x, first = _positions(sweep.axes[0]), sweep.axes[0]
    groups = range(len(sweep.axes[1].values)) if len(sweep.axes) > 1 else [None]
    top, above = _top(sweep), dict.fromkeys(x, 0)
    for group in groups:
        cells = [cell for cell in sweep.cells if group is None or cell.arm.at[1] == group]
        look = look_of(group or 0)
        label = "" if group is None else plain(place_name(sweep.axes[1], group).replace("=", " = "), 50)
        at = [x[cell.arm.at[0]] for cell in cells]
        means = [cell.outcome.mean for cell in cells]
        shown = np.where(np.asarray(means) <= top, means, np.nan)
        named = label if group is not None and group < MOST_RUNS else "_"
        axes.plot(at, shown, color=ink[look.ink], linewidth=1.7, linestyle=look.dash, label=named)
        for place, cell in zip(at, cells, strict=True):
            above[place] = _point(axes, ink, ink[look.ink], place, cell, top, above[place], is_last=place == max(x))
    _dress(axes, ink)
    if is_geometric([value[0] for value in first.values] if is_numeric([v[0] for v in first.values]) else []):
        axes.set_xscale("log")
    axes.set_xticks(x, [plain(name, 24) for name in values_of(first)], parse_math=False)
    axes.minorticks_off()
    axes.set_xlabel(plain(_names(first), 60), color=ink["faint"], fontsize=9, parse_math=False)
    if len(sweep.axes) > 1:
        axes.legend(frameon=False, labelcolor=ink["text"], handlelength=2.2, fontsize=9)


def _point(
    axes: Any, ink: dict[str, str], color: str, x: float, cell: Cell, top: float, n_above: int, *, is_last: bool
) -> int:
    """A place: its seeds as dots, its mean as a diamond, hollow if it is worse; what happened if it has no loss.

    `n_above` marks are at the upper edge there already; returns their number with this one.
    """
    one = cell.outcome
    if not one.finals or one.mean > top:
        text = f"{one.mean:.3g}" if one.finals else plain(cell.verdict.replace("failed or ", ""), 12)
        at, across = 0.97 - 0.07 * n_above, axes.get_xaxis_transform()
        axes.plot([x], [at], "^" if one.finals else "x", color=color, markersize=6, transform=across, clip_on=False)
        side, shift = ("right", -6) if is_last else ("left", 6)
        axes.annotate(text, (x, at), xycoords=across, xytext=(shift, -3), textcoords="offset points", ha=side,
                      color=ink["faint"], fontsize=8.5, parse_math=False)  # fmt: skip
        return n_above + 1
    seeds = [value for value in one.finals.values() if value <= top]
    axes.plot([x] * len(seeds), seeds, "o", color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
    is_level = cell.verdict in (BEST, LEVEL, UNTESTED)
    axes.plot([x], [one.mean], "D", color=color, markersize=6, markerfacecolor=color if is_level else ink["paper"])
    if cell.is_best:
        axes.plot([x], [one.mean], "o", color=ink["text"], markersize=14, markerfacecolor="none", markeredgewidth=1.2)
    return n_above


def heat_map(figure: Any, ink: dict[str, str], sweep: Sweep, where: Any = None) -> None:
    """A cell for each pair of values: the deeper, the lower its loss; the best has a frame."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    down, across = sweep.axes
    left = 0.25 + 0.075 * max(len(name) for name in values_of(down))
    axes = where or _axes(figure, bottom=0.5, left=left, top=0.12)
    best, top = min(cell.outcome.mean for cell in sweep.cells if cell.outcome.finals), _top(sweep)
    for cell in sweep.cells:
        i, j = cell.arm.at
        depth = 0.0
        if cell.outcome.finals:
            depth = DEEPEST * max(0.0, 1 - (cell.outcome.mean - best) / ((top - best) or 1.0))
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=ink["train"], alpha=max(depth, 0.03), linewidth=0))
        if cell.is_best:
            axes.add_patch(
                Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor=ink["text"], linewidth=1.4)
            )
        value = f"{cell.outcome.mean:.4f} {mark(cell).removesuffix('best')}".strip() if cell.outcome.finals else ""
        spread = f"± {cell.outcome.sd:.4f}" if math.isfinite(cell.outcome.sd) else ""
        narrow = len(across.values) > 4 and figure.get_figwidth() < 5
        axes.text(j, i - (0.12 if spread else 0), value or plain(cell.verdict, 20), ha="center", va="center",
                  color=ink["text"], fontsize=7.5 if narrow else 10, parse_math=False)  # fmt: skip
        axes.text(j, i + 0.2, spread, ha="center", va="center", color=ink["text"], fontsize=6.5 if narrow else 8.5,
                  parse_math=False)  # fmt: skip
    axes.set_xlim(-0.5, len(across.values) - 0.5)
    axes.set_ylim(len(down.values) - 0.5, -0.5)
    axes.set_xticks(range(len(across.values)), [plain(name, 24) for name in values_of(across)], parse_math=False)
    axes.set_yticks(range(len(down.values)), [plain(name, 24) for name in values_of(down)], parse_math=False)
    axes.tick_params(length=0, labelcolor=ink["text"], labelsize=9, pad=5)
    axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
    axes.set_xlabel(plain(_names(across), 60), color=ink["faint"], fontsize=9, parse_math=False)
    if where is not None:
        axes.set_ylabel(plain(_names(down), 60), color=ink["faint"], fontsize=9, parse_math=False)


def _axes(figure: Any, *, bottom: float, left: float, top: float = 0.15) -> Any:
    """Axes with these margins in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + 0.2) / width, 1 - (bottom + top) / height))


def _dress(axes: Any, ink: dict[str, str]) -> None:
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(ink["grid"])
    axes.tick_params(length=0, labelcolor=ink["faint"], labelsize=9, pad=5)
    axes.grid(axis="y", color=ink["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.12)
    axes.locator_params(axis="y", nbins=5)


def _names(axis: Axis) -> str:
    return ", ".join(axis.names)


def _positions(axis: Axis) -> list[float]:
    """Where the values lie: at themselves if they are numbers, else evenly."""
    values = [place[0] for place in axis.values]
    even = not is_numeric(values) or (0 in values and is_geometric([value for value in values if value]))
    return [float(place if even else value) for place, value in enumerate(values)]


def _top(sweep: Sweep) -> float:
    """Losses above it are not drawn to scale: they would flatten all others."""
    means: Sequence[float] = sorted(cell.outcome.mean for cell in sweep.cells if cell.outcome.finals)
    middle = means[len(means) // 2]
    limit = means[0] + WELL_ABOVE * (middle - means[0])
    return limit if means[-1] > limit > means[0] else means[-1] * (1 + 1e-9)
