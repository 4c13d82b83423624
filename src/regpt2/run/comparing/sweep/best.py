"""The best place of a grid. In: the outcome of each arm; out: the best, those that cannot be told from it, the edges.

The best is chosen by the losses that it is then tested with, so a test of it alone would find differences too often.
The correction therefore counts all pairs of places: it holds whichever of them is the best.

Tests are paired by seed, and two to four differences hardly show their own noise. The mean variance of the differences
of all pairs is twice the residual variance of the two-way analysis of variance (places, seeds), with (places - 1)
(seeds - 1) degrees of freedom. It is taken from the better half of the places: a rate at which training almost diverges
is noisier, and would hide the differences of the others. A pair that is noisier keeps its own.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regpt2.run.comparing.axes import BUDGET, place_name, shown
from regpt2.run.comparing.outcomes import Outcome
from regpt2.run.comparing.runs import NOT_BEGUN, Arm, Axis, Comparison, Run
from regpt2.run.comparing.significance import ALPHA, Paired, holm, paired, student_t_p, student_t_quantile

_Pair = tuple[int, int]
BEST, LEVEL, WORSE, UNTESTED = "the best", "cannot be told from the best", "worse", "no test: it takes two seeds"


@dataclass(frozen=True)
class Cell:
    """A place of the grid."""

    arm: Arm
    outcome: Outcome
    verdict: str
    """BEST, LEVEL, WORSE, UNTESTED, or why there is no loss."""
    against: Paired | None = None
    """The differences to the best, seed by seed."""
    p_holm: float | None = None
    """Its p by the t-test, corrected for all pairs of places."""

    @property
    def is_best(self) -> bool:
        return self.verdict == BEST


@dataclass(frozen=True)
class Sweep:
    """A grid with its results."""

    axes: list[Axis]
    cells: list[Cell]
    """In the order of the grid: the last axis changes fastest."""
    edges: list[str]
    """Where the best lies on an edge, in words."""

    @property
    def best(self) -> Cell | None:
        """None if no run finished."""
        return next((cell for cell in self.cells if cell.is_best), None)

    @property
    def ranked(self) -> list[Cell]:
        """The best first, those without a loss last."""
        means = {cell.arm.label: cell.outcome.mean for cell in self.cells}
        return sorted(self.cells, key=lambda cell: (math.isnan(means[cell.arm.label]), means[cell.arm.label]))

    def answer(self) -> str:
        """The result in a sentence."""
        best = self.best
        if best is None:
            return "No run of the grid finished, so there is no best place."
        level = sum(cell.verdict in (LEVEL, UNTESTED) for cell in self.cells)
        lost = sum(not cell.outcome.finals for cell in self.cells)
        others = len(self.cells) - 1 - lost
        spread = f" ± {best.outcome.sd:.4f}" if math.isfinite(best.outcome.sd) else ""
        end = f"{level} of {others} others cannot be told from it" if level < others else "no other can be told from it"
        end = end if level else "all others are worse"
        end += f", {lost} {'has' if lost == 1 else 'have'} no loss" if lost else ""
        return f"The best is {place_words(self.axes, best.arm)} at {best.outcome.mean:.4f}{spread} nats; {end}."


def place_words(axes: Sequence[Axis], arm: Arm) -> str:
    """The settings of an arm: optim.lr = 0.002, optim.weight_decay = 0.1."""
    parts = [place_name(axis, at, ", ") for axis, at in zip(axes, arm.at, strict=True)]
    return ", ".join(parts).replace("=", " = ")


def judge(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> Sweep:
    """The grid with a verdict for each place.

    A place may be the best only if no other has more finished seeds: a diverged seed must not help it.
    """
    places = sorted(zip(plan.arms, runs, found, strict=True), key=lambda each: each[0].at)
    most = max(len(one.finals) for _, _, one in places)
    whole = [at for at, (_, _, one) in enumerate(places) if most and len(one.finals) == most]
    best = min(whole, key=lambda at: places[at][2].mean, default=None)
    tests, corrected = _tests([one for _, _, one in places], most)
    cells = []
    for at, (arm, of_arm, one) in enumerate(places):
        pair = (min(at, best), max(at, best)) if best is not None and at != best else None
        test = tests.get(pair) if pair else None
        if test is not None and best is not None and at < best:
            test = _turned(test)  # the difference is this place's minus the best's
        p = corrected.get(pair) if pair and test else None
        cells.append(Cell(arm, one, _verdict(one, of_arm, p, test, is_best=at == best), test, p))
    edges = [] if best is None else _edges(plan.axes, cells[best].arm)
    return Sweep(plan.axes, cells, edges)


def _tests(found: Sequence[Outcome], most: int) -> tuple[dict[_Pair, Paired], dict[_Pair, float]]:
    """Each pair of places tested on their common seeds, later minus earlier; and each p corrected for all of them."""
    tests = {}
    for a, b in itertools.combinations(range(len(found)), 2):
        here, there = found[a].finals, found[b].finals
        test = paired([there[seed] - here[seed] for seed in here if seed in there])
        if test is not None:
            tests[a, b] = test
    good = sorted((at for at, one in enumerate(found) if len(one.finals) == most), key=lambda at: found[at].mean)
    good = good[: max(2, math.ceil(len(good) / 2))]
    within = [test.sd**2 for (a, b), test in tests.items() if a in good and b in good]
    freedom = (len(good) - 1) * (most - 1)
    if within and freedom:
        sd = math.sqrt(sum(within) / len(within))
        tests = {pair: _with_noise(test, max(sd, test.sd), freedom) for pair, test in tests.items()}
    return tests, dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))


def _with_noise(test: Paired, sd: float, freedom: int) -> Paired:
    """The test with another standard deviation of the differences, known with these degrees of freedom."""
    error = sd / math.sqrt(test.n)
    half = student_t_quantile(1 - ALPHA, freedom) * error
    p = student_t_p(test.mean / error, freedom) if error else test.p
    return Paired(test.n, test.mean, sd, test.mean - half, test.mean + half, p, test.p_signs)


def _turned(test: Paired) -> Paired:
    return Paired(test.n, -test.mean, test.sd, -test.high, -test.low, test.p, test.p_signs)


def _verdict(one: Outcome, runs: Sequence[Run], p: float | None, test: Paired | None, *, is_best: bool) -> str:
    if is_best:
        return BEST
    if not one.finals:
        kinds = list(dict.fromkeys(run.status.split(":")[0] for run in runs if run.status != NOT_BEGUN))
        return " or ".join(kinds) or NOT_BEGUN
    if p is None or test is None:
        return UNTESTED
    return WORSE if p < ALPHA and test.mean > 0 else LEVEL


def _edges(axes: Sequence[Axis], best: Arm) -> list[str]:
    """For each axis of numbers: is the best the least or the most of them? A least of 0 cannot be lowered."""
    lines = []
    for axis, at in zip(axes, best.at, strict=True):
        name, values = axis.names[0], [place[0] for place in axis.values]
        if name == BUDGET or not is_numeric(values):
            continue
        value = values[at]
        if value == max(values):
            lines.append(f"The best {name}, {shown(value)}, is the largest of the grid; add larger values.")
        elif value == min(values) and value != 0:
            lines.append(f"The best {name}, {shown(value)}, is the smallest of the grid; add smaller values.")
    return lines


def is_numeric(values: Sequence[Any]) -> bool:
    """Are all of them numbers?"""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def is_geometric(values: Sequence[float]) -> bool:
    """Do they read better on a logarithmic axis? They do if their ratios differ less than their steps."""
    ordered = sorted(values)
    if len(ordered) < 2 or ordered[0] <= 0:
        return False
    ratios = [math.log(b / a) for a, b in itertools.pairwise(ordered)]
    steps = [b - a for a, b in itertools.pairwise(ordered)]
    if len(ordered) == 2:
        return ordered[1] >= 4 * ordered[0]
    return max(ratios) / min(ratios) <= max(steps) / min(steps)
