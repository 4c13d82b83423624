"""A power law as tables. In: sizes, laws and predictions; out: rows of text, for a screen, for Markdown, for a page."""

import math

from regpt2.base.console import count
from regpt2.run.comparing.axes import values_of
from regpt2.run.comparing.runs import Axis
from regpt2.run.comparing.scaling.forecast import Fitted, Forecast, Size
from regpt2.run.comparing.scaling.law import Interval
from regpt2.run.comparing.tables import NOTHING

HOW_TO_READ = (
    "Loss: the last validation loss, in nats per token, mean and standard deviation over the seeds. Law: least squares "
    "over all runs that are not held out, E and A not below 0, exponent from 0.001 to 4. Intervals: 95 %, by profile: "
    "all values that some law within the limit of the sum of squares goes through. That of a held-out size is for the "
    "mean of as many seeds as it has, noise included. The last line of the laws is fitted to all sizes, and predicts "
    "twice the largest. Parameters: without embeddings, positions and a head of its own. FLOPs: matmuls, forward and "
    "backward."
)
LETTER = {"parameters": "N", "tokens": "D", "flops": "C"}


def sizes_table(found: Forecast, axis: Axis) -> list[list[str]]:
    """A head and a row for each size: what it is, its loss, and what the law says there."""
    rows = [[", ".join(axis.names), "parameters", "tokens", "FLOPs", "loss", "law", "off", "used"]]
    for size in found.sizes:
        law = float(found.laws[found.main].law(size.x)) if found.laws else math.nan
        arm, off = size.arm, size.mean - law
        rows.append(
            [values_of(axis)[arm.at[0]], count(arm.weights), count(arm.tokens), f"{arm.flops:.3g}", _loss(size),
             _number(law), f"{off:+.4f}" if math.isfinite(off) else NOTHING,
             "held out" if size.is_held_out else "to fit"]
        )  # fmt: skip
    return rows


def laws_table(found: Forecast) -> list[list[str]]:
    """A head and a row for each law and size held out; the last row is fitted to all, and looks ahead."""
    rows = [["law", "E", "A", "exponent", "predicts for", "loss", "95 % interval", "came", "verdict"]]
    letter = LETTER[found.over]
    for fitted, checks in zip(found.laws, found.checks, strict=True):
        name = f"{'E + ' if fitted.law.with_floor else ''}A {letter}^-a"
        head = [name, _floor(fitted), f"{fitted.law.amount_at_one:.4g}", _exponent(fitted)]
        rows += [
            [
                *head,
                f"{letter} = {count(one.size.x)}",
                f"{one.value:.4f}",
                interval(one.interval),
                _number(one.size.mean),
                one.verdict,
            ]
            for one in checks
        ] or [[*head, *[NOTHING] * 5]]
    if found.whole is not None:
        law = found.whole.law
        name = f"{'E + ' if law.with_floor else ''}A {letter}^-a, all sizes"
        head = [name, _floor(found.whole), f"{law.amount_at_one:.4g}", _exponent(found.whole)]
        ahead = [f"{letter} = {count(found.ahead)}", f"{float(law(found.ahead)):.4f}", interval(found.ahead_interval())]
        rows.append([*head, *ahead, NOTHING, "twice the largest"])
    return rows


def interval(one: Interval, digits: int = 4) -> str:
    """Its ends, or a dash."""
    return f"{one.low:.{digits}f} to {one.high:.{digits}f}" if math.isfinite(one.low) else NOTHING


def _floor(fitted: Fitted) -> str:
    law, of = fitted.law, fitted.floor
    if not law.with_floor:
        return "0"
    return f"{law.floor:.3f}" + (f" ({interval(of, 3)})" if math.isfinite(of.low) else "")


def _exponent(fitted: Fitted) -> str:
    law, of = fitted.law, fitted.exponent
    return f"{law.exponent:.3f}" + (f" ({interval(of, 3)})" if math.isfinite(of.low) else "")


def _loss(size: Size) -> str:
    n = len(size.losses)
    if not n:
        return NOTHING
    sd = math.sqrt(sum((loss - size.mean) ** 2 for loss in size.losses) / (n - 1)) if n > 1 else math.nan
    return f"{size.mean:.4f}" + (f" ± {sd:.4f}" if math.isfinite(sd) else "")


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else NOTHING
