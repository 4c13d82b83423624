"""What a power law predicts. In: the outcomes of sizes; out: laws fitted without the largest, and what came there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regpt2.base.console import count
from regpt2.run.comparing.outcomes import Outcome
from regpt2.run.comparing.runs import Arm, Comparison
from regpt2.run.comparing.scaling.law import LACKING, Interval, Law, exponents_of, falls, fit, floors_of, predicted
from regpt2.run.comparing.scaling.sizes import LEAST_FITTED, VARIABLES, size_of

AHEAD = 2.0  # how far beyond the largest size a law fitted to all is asked


@dataclass(frozen=True)
class Size:
    """An arm as a point."""

    arm: Arm
    x: float
    losses: list[float]
    is_held_out: bool

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass(frozen=True)
class Fitted:
    """A law with its intervals."""

    law: Law
    exponent: Interval
    floor: Interval

    @property
    def has_interval(self) -> bool:
        return self.law.freedom > 0

    @property
    def knows_floor(self) -> bool:
        """Is E = 0 outside its interval?"""
        return self.has_interval and self.floor.low > 0


@dataclass(frozen=True)
class Check:
    """A size held out: what a law says, and what came."""

    size: Size
    value: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """within the interval, or missed and by how much."""
        if not self.size.losses:
            return "no run finished"
        if math.isnan(self.interval.low):
            return "no interval"
        off = self.size.mean - self.value
        return "within" if self.size.mean in self.interval else f"missed by {off:+.4f}"


@dataclass(frozen=True)
class Forecast:
    """All that is fitted and predicted."""

    over: str
    sizes: list[Size]
    """From small to large."""
    laws: list[Fitted]
    """With a floor, then without, fitted to the sizes that are not held out; empty if too few have a loss."""
    checks: list[list[Check]]
    """For each law, each size held out."""
    whole: Fitted | None
    """The first law that has an interval, fitted to all sizes."""
    ahead: float
    """Twice the largest size."""
    n_seeds: int

    @property
    def main(self) -> int:
        """Which law counts: the first that has an interval."""
        return next((at for at, one in enumerate(self.laws) if one.has_interval), 0)

    def ahead_interval(self) -> Interval:
        """For the mean loss of as many seeds at twice the largest size."""
        assert self.whole is not None
        return predicted(self.whole.law, self.ahead, self.n_seeds)

    def answer(self) -> str:
        """The result in a sentence or two."""
        if not self.laws or self.whole is None:
            return "Too few sizes finished for a power law."
        what = VARIABLES[self.over]
        value, interval = float(self.whole.law(self.ahead)), self.ahead_interval()
        first = f"With {count(self.ahead)} {what}, twice the most here, a loss of {value:.3f} is predicted"
        first += f" (95 % interval {interval.low:.3f} to {interval.high:.3f})" if self.whole.has_interval else ""
        if self.whole.has_interval and not falls(self.whole.law):
            first = f"The loss does not fall measurably with {what} here, so no law is shown"
        checks = self.checks[self.main]
        if not checks:
            return f"{first}; no size was held out to check the law."
        parts = [self._came(one) for one in checks]
        return f"{first}; {'; '.join(parts)}."

    def _came(self, one: Check) -> str:
        """A size held out, in words."""
        name = f"the {count(one.size.x)} held out"
        if not one.size.losses:
            return f"{name} have no loss"
        if not self.laws[self.main].has_interval:
            return f"{name} came to {one.size.mean:.3f}, where {one.value:.3f} was predicted"
        where = "inside" if one.verdict == "within" else "outside"
        predicted_interval = f"{one.interval.low:.3f} to {one.interval.high:.3f}"
        return f"{name} came to {one.size.mean:.3f}, {where} the predicted {predicted_interval}"


def forecast(plan: Comparison, found: Sequence[Outcome]) -> Forecast:
    """Laws over the plan's variable, the largest sizes held out."""
    places = sorted(zip(plan.arms, found, strict=True), key=lambda each: size_of(each[0], plan.over))
    fitted = len(places) - plan.hold_out
    sizes = [
        Size(arm, size_of(arm, plan.over), list(one.finals.values()), at >= fitted)
        for at, (arm, one) in enumerate(places)
    ]
    used = [size for size in sizes if not size.is_held_out and size.losses]
    laws, checks = [], []
    if len(used) >= LEAST_FITTED:
        laws = [_fitted(used, with_floor=with_floor) for with_floor in (True, False)]
        held_out = [size for size in sizes if size.is_held_out]
        checks = [[_check(one.law, size) for size in held_out] for one in laws]
    every = [size for size in sizes if size.losses]
    both = [_fitted(every, with_floor=with_floor) for with_floor in (True, False)] if laws else []
    whole = next((one for one in both if one.has_interval), both[0] if both else None)
    return Forecast(plan.over, sizes, laws, checks, whole, AHEAD * sizes[-1].x, plan.seeds)


def _fitted(sizes: Sequence[Size], *, with_floor: bool) -> Fitted:
    x = [size.x for size in sizes for _ in size.losses]
    law = fit(x, [loss for size in sizes for loss in size.losses], with_floor=with_floor)
    return Fitted(law, exponents_of(law), floors_of(law))


def _check(law: Law, size: Size) -> Check:
    return Check(size, float(law(size.x)), predicted(law, size.x, max(1, len(size.losses))))


def law_remarks(found: Forecast, plan: Comparison) -> list[str]:
    """What limits the law."""
    lines = []
    if not found.laws:
        return [f"A law needs {LEAST_FITTED} finished sizes that are not held out."]
    law, bare = found.laws
    if not law.has_interval:
        lines.append(
            f"{len(law.law.y)} runs fix E, A and the exponent exactly and leave nothing to judge them by: the law with "
            "E has no interval. More seeds or sizes give it one."
        )
    elif not falls(law.law):
        lines.append(
            f"The same loss at every size fits too. More {'seeds' if found.over == 'tokens' else 'tokens, seeds'} or "
            "sizes farther apart may show a law."
        )
    elif not law.knows_floor:
        lines.append(
            f"These sizes do not determine E: every value from 0 to {law.floor.high:.3f} fits. The intervals of the "
            "exponent and of predictions are wider for it."
        )
    if law.law.lacks:
        lines.append(
            f"The sizes lie off the law by more than {LACKING:g} times the variance that seeds explain. The intervals "
            "are taken from these deviations, and a law of another form may fit better."
        )
    if bare.has_interval and law.knows_floor:
        lines.append("A pure power law (E = 0) does not fit these sizes; it is shown to compare.")
    if found.over != "tokens":
        lines.append("The learning rate is not tuned anew for each size, which bends the curve at its ends.")
    changed = [name for name in ("parameters", "tokens") if len({size_of(arm, name) for arm in plan.arms}) > 1]
    if found.over != "flops" and len(changed) > 1:
        lines.append(f"Parameters and tokens both change from size to size; the law is over {found.over} alone.")
    return lines
