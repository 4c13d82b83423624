"""A power law on pages. In: plan, runs and outcomes; out: HTML that opens offline, Markdown, a PNG."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from regpt2.pages.charts.draw import PRINT, heading, png, settings
from regpt2.pages.report.page import drawing
from regpt2.pages.safe_html import fill
from regpt2.run.comparing.outcomes import Outcome
from regpt2.run.comparing.page import Result, subtitle
from regpt2.run.comparing.runs import Comparison, Run
from regpt2.run.comparing.scaling import charts
from regpt2.run.comparing.scaling.forecast import Fitted, Forecast, forecast, law_remarks
from regpt2.run.comparing.scaling.sizes import VARIABLES
from regpt2.run.comparing.scaling.tables import HOW_TO_READ, laws_table, sizes_table


def result(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> Result:
    """The law for the screen and the files."""
    law = forecast(plan, found)
    title = f"Loss over {VARIABLES[law.over]}"
    figure = drawing(
        lambda figure, ink: charts.paint(figure, ink, law), "law", f"{title}, log-log", charts.description(law)
    )
    return Result(
        title=f"{plan.arms[0].spec.split()[0]}: loss over {law.over}",
        kind="one recipe at several sizes",
        answer=law.answer(),
        tables=[("Sizes", sizes_table(law, plan.axes[0])), ("Laws", laws_table(law))],
        remarks=law_remarks(law, plan),
        how_to_read=HOW_TO_READ,
        drawn=fill('<div class="curves">\n{figure}\n</div>', figure=figure),
        picture=_picture(plan, runs, law, title),
        json=_json(law),
    )


def _picture(plan: Comparison, runs: Sequence[Sequence[Run]], law: Forecast, title: str) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only a picture needs it)

    with settings("scaled"):
        figure = Figure(figsize=(11, 5.8), dpi=160, facecolor="white")
        axes = figure.add_axes((0.07, 0.11, 0.905, 0.64))
        axes.set_title(f"{title}, nats per token", loc="left", fontsize=10, color=PRINT["text"], pad=8)
        charts.paint(figure, PRINT, law, axes)
        heading(figure, law.answer(), subtitle(plan, runs), (0.965, 0.845), size=13)
    return png(figure)


def _json(found: Forecast) -> dict[str, Any]:
    laws = [
        _law(fitted)
        | {"checks": [
            {"label": one.size.arm.label, "x": one.size.x, "predicted": one.value, "interval": asdict(one.interval),
             "came": one.size.mean, "verdict": one.verdict} for one in checks
        ]}
        for fitted, checks in zip(found.laws, found.checks, strict=True)
    ]  # fmt: skip
    ahead = None
    if found.whole is not None:
        predicts = {"x": found.ahead, "predicted": float(found.whole.law(found.ahead))}
        ahead = _law(found.whole) | predicts | {"interval": asdict(found.ahead_interval())}
    sizes = [
        {"label": size.arm.label, "x": size.x, "losses": size.losses, "held_out": size.is_held_out}
        for size in found.sizes
    ]
    return {"over": found.over, "sizes": sizes, "laws": laws, "all_sizes": ahead}


def _law(fitted: Fitted) -> dict[str, Any]:
    law = fitted.law
    return {
        "form": "E + A x^-a" if law.with_floor else "A x^-a",
        "E": law.floor,
        "E_interval": asdict(fitted.floor),
        "A": law.amount_at_one,
        "a": law.exponent,
        "a_interval": asdict(fitted.exponent),
        "sd_of_a_run": law.variance**0.5,
        "degrees_of_freedom": law.freedom,
        "is_lacking": law.lacks,
    }
