"""A grid as tables. In: its places with verdicts; out: rows of text, for a screen, for Markdown and for a page."""

import math

from regpt2.run.comparing.axes import values_of
from regpt2.run.comparing.sweep.best import BEST, LEVEL, UNTESTED, Cell, Sweep
from regpt2.run.comparing.tables import NOTHING, chance

HOW_TO_READ = (
    "Loss: the last validation loss, in nats per token, mean and standard deviation over the seeds; ~ marks places "
    "that cannot be told from the best. Difference: to the best, seed by seed, with the 95 % confidence interval of "
    "its mean. p: paired t-test, two-sided, corrected for all pairs of places (Holm), because the best is chosen by "
    "the losses that it is tested with. The noise is that of the better half of the places, or of the pair if that is "
    "larger. Because it was chosen, the best's own loss is a little too low: train it with new seeds before you quote "
    "it. A place with fewer finished seeds than others cannot be the best."
)


def grid_table(sweep: Sweep) -> list[list[str]]:
    """A head and rows: of two axes the first down and the second across, else a row for each place."""
    if len(sweep.axes) != 2:
        return [
            [*_names(sweep), "loss", ""],
            *([*_values(sweep, cell), loss(cell), mark(cell)] for cell in sweep.cells),
        ]
    down, across = sweep.axes
    head = [" \\ ".join(_names(sweep)), *values_of(across)]
    by_place = {tuple(cell.arm.at): cell for cell in sweep.cells}
    rows = [
        [name, *(f"{loss(by_place[i, j])} {mark(by_place[i, j])}".strip() for j in range(len(across.values)))]
        for i, name in enumerate(values_of(down))
    ]
    return [head, *rows]


def ranked_table(sweep: Sweep) -> list[list[str]]:
    """A head and a row for each place, the best first: how far off it is, and whether seeds explain it."""
    rows = [[*_names(sweep), "verdict", "to the best", "95 % interval", "p (Holm)", "loss", "seeds"]]
    for cell in sweep.ranked:
        test = cell.against
        tested = [NOTHING] * 3
        if test is not None:
            tested = [f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", chance(cell.p_holm)]
        rows.append([*_values(sweep, cell), cell.verdict, *tested, loss(cell), str(len(cell.outcome.finals))])
    return rows


def loss(cell: Cell) -> str:
    """Mean and deviation; what happened if there is none."""
    one = cell.outcome
    if not one.finals:
        return cell.verdict
    return f"{one.mean:.4f}" + (f" ± {one.sd:.4f}" if math.isfinite(one.sd) else "")


def mark(cell: Cell) -> str:
    """best, ~ or nothing."""
    return "best" if cell.verdict == BEST else "~" if cell.verdict in (LEVEL, UNTESTED) else ""


def _names(sweep: Sweep) -> list[str]:
    return [", ".join(axis.names) for axis in sweep.axes]


def _values(sweep: Sweep, cell: Cell) -> list[str]:
    return [values_of(axis)[at] for axis, at in zip(sweep.axes, cell.arm.at, strict=True)]
