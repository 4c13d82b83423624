"""A power law fitted. In: sizes and losses of runs; out: L(x) = E + A x^-a, its intervals, and what it predicts.

For a given exponent the law is linear in E and A, so the fit is a search over one number with an exact solution inside,
which needs no starting point and cannot end in a local minimum of the other two. Hoffmann et al. (arXiv:2203.15556,
approach 3) minimize a Huber loss on log L from many starting points, because they fit 400 runs, some of them far off;
a handful of sizes has no outlier that could be told from the curve.

Intervals are profiles: all values for which the best law through them has a sum of squares below
S + s^2 t^2, with the smallest sum S, the variance s^2 of a run and Student's t. They need no resampling of 2 to 4
seeds, are not symmetric where the loss is not, and end at E = 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regpt2.run.comparing.significance import ALPHA, student_t_quantile

Numbers = NDArray[np.float64]
LEAST_EXPONENT, MOST_EXPONENT = 1e-3, 4.0  # published ones of language models lie between 0.05 and 0.5
N_EXPONENTS = 1001
LACKING = 4.0
"""Sizes off the law by more than this many times the variance of seeds: the law does not hold, seeds do not count."""


@dataclass(frozen=True)
class Interval:
    """From low to high, 95 %."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, eq=False)  # arrays have no equality
class Law:
    """L(x) = floor + amount * (x / unit) ** -exponent, fitted to runs."""

    x: Numbers
    """(runs,)"""
    y: Numbers
    """(runs,): their losses, in nats per token."""
    with_floor: bool
    """Without: a pure power law, E = 0."""
    unit: float
    """The geometric mean of x: sums of x ** -a itself would lose digits."""
    floor: float
    amount: float
    exponent: float
    squares: float
    """S: the sum of squared deviations that counts for the intervals."""
    variance: float
    """s^2: of a run round the law; NaN if too few runs are left to know it."""
    freedom: int
    """Degrees of freedom of `variance`."""
    lacks: bool
    """The sizes lie farther from the law than seeds explain."""

    def __call__(self, x: float | Numbers) -> Numbers:
        """The loss at these sizes."""
        shown: Numbers = self.floor + self.amount * (np.asarray(x, dtype=np.float64) / self.unit) ** -self.exponent
        return shown

    @property
    def amount_at_one(self) -> float:
        """A of L(x) = E + A x^-a."""
        return self.amount * math.pow(self.unit, self.exponent)


def fit(x: Sequence[float], y: Sequence[float], *, with_floor: bool = True) -> Law:
    """The law of least squares through all runs, E >= 0 and A >= 0; exponents from 0.001 to 4.

    Args:
        x: the size of each run, above 0; at least three of them differ.
        y: its loss in nats per token.
        with_floor: fit E; else it is 0.
    """
    sizes, losses = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    unit = float(np.exp(np.log(sizes).mean()))
    low, high = math.log(LEAST_EXPONENT), math.log(MOST_EXPONENT)
    for _ in range(8):  # each time 100 times finer round the best
        tried = np.exp(np.linspace(low, high, 201))
        best = int(np.argmin(_at(tried, sizes / unit, losses, with_floor).squares))
        low, high = math.log(tried[max(0, best - 1)]), math.log(tried[min(200, best + 1)])
    found = _at(tried, sizes / unit, losses, with_floor)
    squares, variance, freedom, lacks = _noise(sizes, losses, float(found.squares[best]), 2 + with_floor)
    return Law(
        sizes, losses, with_floor, unit, float(found.floor[best]), float(found.amount[best]), float(tried[best]),
        squares, variance, freedom, lacks,
    )  # fmt: skip


def falls(law: Law) -> bool:
    """Is the same loss at every size outside the interval?"""
    return law.freedom > 0 and _level(law) < 0


def exponents_of(law: Law) -> Interval:
    """The interval of the exponent."""
    tried = _exponents(law)
    if not law.freedom:
        return Interval(math.nan, math.nan)
    inside = tried[_slack(law, _at(tried, law.x / law.unit, law.y, law.with_floor).squares) >= 0]
    return Interval(float(inside.min(initial=law.exponent)), float(inside.max(initial=law.exponent)))


def floors_of(law: Law) -> Interval:
    """The interval of E."""
    if not law.with_floor:
        return Interval(0.0, 0.0)
    return predicted(law, math.inf, 0)


def predicted(law: Law, x: float, n_runs: int) -> Interval:
    """The interval for the mean loss of `n_runs` new runs of this size; 0: of the law itself, without their noise."""
    found = _profile(law, x, n_runs)
    return Interval(max(0.0, found.low), found.high) if law.freedom else found  # no loss is below 0


@dataclass(frozen=True)
class _Fits:
    """For each exponent of a list, the best law with it."""

    floor: Numbers
    amount: Numbers
    squares: Numbers


def _at(tried: Numbers, x: Numbers, y: Numbers, with_floor: bool) -> _Fits:
    """The best E >= 0 and A >= 0 for each exponent."""
    powers = x ** -tried[:, None]  # (exponents, runs)
    amount = powers @ y / (powers**2).sum(1)
    floor = np.zeros_like(amount)
    if with_floor:
        offs = powers - powers.mean(1, keepdims=True)
        slope = offs @ y / (offs**2).sum(1)
        start = y.mean() - slope * powers.mean(1)
        amount, floor = np.where(start >= 0, slope, amount), np.maximum(start, 0)
        floor, amount = np.where(amount < 0, y.mean(), floor), np.maximum(amount, 0)  # a loss that rises: no law
    squares = ((floor[:, None] + amount[:, None] * powers - y) ** 2).sum(1)
    return _Fits(floor, amount, squares)


def _noise(x: Numbers, y: Numbers, squares: float, n_free: int) -> tuple[float, float, int, bool]:
    """Squares, variance and degrees of freedom for the intervals; and whether the law lacks something.

    Deviations from the law are those of runs from their size's mean, which are noise, and those of the means from the
    law. Where the second are as small as the first explain, all count as noise. Else only the second do.
    """
    sizes = np.unique(x)
    within = float(sum(((y[x == size] - y[x == size].mean()) ** 2).sum() for size in sizes))
    n, k, off = len(y), len(sizes), max(0.0, squares - within)
    n_within, n_off = n - k, max(0, k - n_free)
    lacks = bool(n_within and n_off and off / n_off > LACKING * within / n_within)
    if lacks:
        return off, off / n_off, n_off, True
    freedom = max(0, n - n_free)
    return squares, squares / freedom if freedom else math.nan, freedom, False


def _exponents(law: Law) -> Numbers:
    """All that are tried, the more densely the nearer to the best: an interval may be narrow."""
    off = np.geomspace(1e-7, 0.3, N_EXPONENTS // 2)
    near = law.exponent * np.concatenate([1 - off, 1 + off])
    tried = np.concatenate([np.geomspace(LEAST_EXPONENT, MOST_EXPONENT, N_EXPONENTS), near])
    return np.unique(np.clip(tried, LEAST_EXPONENT, MOST_EXPONENT))


def _slack(law: Law, squares: Numbers) -> Numbers:
    """By how much these sums of squares stay below the limit of the interval."""
    least = float(_at(np.array([law.exponent]), law.x / law.unit, law.y, law.with_floor).squares[0])
    return law.variance * student_t_quantile(1 - ALPHA, law.freedom) ** 2 - (squares - least)


def _profile(law: Law, x: float, n_runs: int) -> Interval:
    """All values at `x` (infinity: of E) that some law within the limit goes through.

    For each exponent the squares are a parabola in E and A, so the value at x has an interval with a formula: of the
    free parabola where neither is below 0, and of those with E = 0 and with A = 0. The union over all is the profile.
    The mean of n new runs adds s^2 / n to the variance of the value.
    """
    if not law.freedom:
        return Interval(math.nan, math.nan)
    tried, noise = _exponents(law), 1 / n_runs if n_runs else 0.0
    powers = (law.x / law.unit) ** -tried[:, None]  # (exponents, runs)
    at = np.zeros_like(tried) if math.isinf(x) else (x / law.unit) ** -tried
    bare = _at(tried, law.x / law.unit, law.y, with_floor=False)
    spread = np.sqrt(np.maximum(0, _slack(law, bare.squares)) * (at**2 / (powers**2).sum(1) + noise))
    inside = _slack(law, bare.squares) >= 0
    ends = [(bare.amount * at - spread)[inside], (bare.amount * at + spread)[inside]]
    if law.with_floor:
        ends += _free(law, powers, at, noise)
    every = np.concatenate([*ends, law(x)[None]])
    return Interval(float(every.min()), float(every.max()))


def _free(law: Law, powers: Numbers, at: Numbers, noise: float) -> list[Numbers]:
    """The ends of the intervals with E and A free and not below 0, and with A = 0: the same loss everywhere."""
    n, mean = len(law.y), powers.mean(1)
    offs = powers - mean[:, None]
    spread_of_powers = (offs**2).sum(1)
    slope = offs @ law.y / spread_of_powers
    start = law.y.mean() - slope * mean
    squares = ((start[:, None] + slope[:, None] * powers - law.y) ** 2).sum(1)
    value = start + slope * at
    variance = 1 / n + (at - mean) ** 2 / spread_of_powers + noise
    with_floor = 1 / n - mean * (at - mean) / spread_of_powers  # the covariance of E and the value
    with_slope = (at - mean) / spread_of_powers  # that of A and the value
    slack = _slack(law, squares)
    half = np.sqrt(np.maximum(0, slack) * variance)
    # Along the parabola E and A move with the value: each must not pass 0 on the way to an end.
    low, high = value - half, value + half
    for start_of, shared in ((start, with_floor), (slope, with_slope)):
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = value - start_of * variance / shared
        low = np.where((shared > 0) & (limit > low), limit, low)
        high = np.where((shared < 0) & (limit < high), limit, high)
    inside = (slack >= 0) & (low <= high)
    ends = [low[inside], high[inside]]
    if (level := _level(law)) >= 0:
        ends.append(law.y.mean() + math.sqrt(level * (1 / n + noise)) * np.array([-1.0, 1.0]))
    return ends


def _level(law: Law) -> float:
    """`_slack` of one loss for all sizes."""
    return float(_slack(law, np.array([((law.y - law.y.mean()) ** 2).sum()]))[0])
