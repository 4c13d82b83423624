"""A grid on pages. In: its plan, runs and outcomes; out: HTML that opens offline, Markdown, a PNG."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from regpt2.pages.charts.draw import PRINT, heading, png, settings
from regpt2.pages.report.page import drawing
from regpt2.pages.safe_html import Html, fill, join
from regpt2.run.comparing.outcomes import Outcome
from regpt2.run.comparing.page import Result, subtitle
from regpt2.run.comparing.runs import Comparison, Run
from regpt2.run.comparing.sweep import charts
from regpt2.run.comparing.sweep.best import Sweep, judge
from regpt2.run.comparing.sweep.tables import HOW_TO_READ, grid_table, ranked_table


def result(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> Result:
    """The grid for the screen and the files."""
    sweep = judge(plan, runs, found)
    names = " and ".join(", ".join(axis.names) for axis in sweep.axes)
    figures = [
        drawing(paint, name, title, charts.description(sweep), height=height)
        for name, title, paint, height in charts.drawings(sweep)
    ]
    return Result(
        title=f"{plan.arms[0].spec.split()[0]}: {names}",
        kind="a grid over one recipe",
        answer=sweep.answer(),
        tables=[("Grid", grid_table(sweep)), ("From the best to the worst", ranked_table(sweep))],
        remarks=sweep.edges,
        how_to_read=HOW_TO_READ,
        drawn=fill('<div class="curves">\n{all}\n</div>', all=join(figures)) if figures else Html(""),
        picture=_picture(plan, runs, sweep),
        json=_json(sweep),
    )


def _picture(plan: Comparison, runs: Sequence[Sequence[Run]], sweep: Sweep) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a picture needs it)

    drawn = charts.drawings(sweep)
    inches = 5.4 if drawn else 1.2
    with settings("swept"):
        figure = Figure(figsize=(11, inches), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            1, max(1, len(drawn)), left=0.08, right=0.975, top=1 - 1.4 / inches, bottom=0.6 / inches, wspace=0.2
        )
        for place, (name, title, _, _) in enumerate(drawn):
            axes = figure.add_subplot(grid[0, place])
            axes.set_title(title, loc="left", fontsize=10, color=PRINT["text"], pad=8, parse_math=False)
            (charts.heat_map if name == "grid" and len(sweep.axes) == 2 else charts.lines)(figure, PRINT, sweep, axes)
        heading(figure, sweep.answer(), subtitle(plan, runs), (1 - 0.2 / inches, 1 - 0.88 / inches), size=13)
    return png(figure)


def _json(sweep: Sweep) -> dict[str, Any]:
    cells = [
        {
            "label": cell.arm.label,
            "at": cell.arm.at,
            "mean": cell.outcome.mean,
            "sd": cell.outcome.sd,
            "finals": cell.outcome.finals,
            "verdict": cell.verdict,
            "to_the_best": None if cell.against is None else asdict(cell.against),
            "p_holm": cell.p_holm,
        }
        for cell in sweep.cells
    ]
    return {"axes": [asdict(axis) for axis in sweep.axes], "cells": cells, "edges": sweep.edges}
