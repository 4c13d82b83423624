"""What a comparison shows. In: the runs of each arm; out: means, differences to the baseline, tokens and time saved."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regpt2.run.comparing.runs import NOT_BEGUN, Comparison, Run, first_reached
from regpt2.run.comparing.significance import ALPHA, Paired, holm, paired

MATTERS = 0.004
"""Nats. Seeds of one recipe at 124M differ by 0.0013 to 0.004; the records of the speedruns claim at least that."""
LEVEL = "no difference shown"
WORDS = ("better", "worse", "no")
"""With which a verdict begins, in the order of the answer."""
MOST_IN_WORDS = 3
"""Arms beside the first that the answer describes one by one; of more it counts them."""
FEW = 4  # seeds: with fewer the interval is too wide to be useful


@dataclass(frozen=True)
class Reached:
    """What finished runs took to reach a loss: one figure for each seed, infinite where a run never reached it."""

    tokens: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Outcome:
    """One arm."""

    label: str
    finals: dict[int, float]
    """The final validation loss by seed, of the runs that finished."""
    tokens: float
    seconds: float
    """Of training; the mean over the runs."""
    against: Paired | None = None
    """The differences of the final losses to the baseline's, seed by seed; None for the baseline, or a single pair."""
    p_holm: float | None = None
    """Its p by the t-test, corrected for the number of arms."""
    shares: Reached | None = None
    """To the baseline's final loss, seed by seed, as shares of what the baseline took."""
    to_target: Reached | None = None

    @property
    def mean(self) -> float:
        """Of the final losses."""
        return float(np.mean(list(self.finals.values()))) if self.finals else math.nan

    @property
    def sd(self) -> float:
        """Of the final losses, over seeds."""
        return float(np.std(list(self.finals.values()), ddof=1)) if len(self.finals) > 1 else math.nan

    @property
    def verdict(self) -> str:
        """In words."""
        if self.against is None or self.p_holm is None:
            return "no test: it takes two seeds" if self.finals else "no run finished"
        if self.p_holm >= ALPHA:
            return LEVEL
        word = "better" if self.against.mean < 0 else "worse"
        return f"{word} by less than {MATTERS}" if abs(self.against.mean) < MATTERS else word


def outcomes(plan: Comparison, runs: Sequence[Sequence[Run]]) -> list[Outcome]:
    """One for each arm, the baseline first."""
    baseline = {run.seed: run for run in runs[0] if run.is_finished}
    found = [
        _outcome(arm.label, of_arm, baseline if place else {}, plan.target)
        for place, (arm, of_arm) in enumerate(zip(plan.arms, runs, strict=True))
    ]
    tested = [place for place, one in enumerate(found) if one.against is not None]
    corrected = holm([one.against.p for one in found if one.against is not None])
    for place, p in zip(tested, corrected, strict=True):
        found[place] = replace(found[place], p_holm=p)
    return found


def _outcome(label: str, runs: Sequence[Run], baseline: dict[int, Run], target: float | None) -> Outcome:
    finished = [run for run in runs if run.is_finished]
    pairs = [(run, baseline[run.seed]) for run in finished if run.seed in baseline]
    shares = [(run, float(at.losses[-1]), float(at.tokens[-1]), float(at.seconds[-1])) for run, at in pairs]
    return Outcome(
        label=label,
        finals={run.seed: float(run.losses[-1]) for run in finished},
        tokens=float(np.mean([run.tokens[-1] for run in finished])) if finished else math.nan,
        seconds=float(np.mean([run.seconds[-1] for run in finished])) if finished else math.nan,
        against=paired([float(run.losses[-1] - base.losses[-1]) for run, base in pairs]),
        shares=_reached(shares) if shares else None,
        to_target=None if target is None else _reached((run, target, 1.0, 1.0) for run in finished),
    )


def _reached(runs: Iterable[tuple[Run, float, float, float]]) -> Reached:
    """What each run took to reach a loss, in units of these tokens and seconds."""
    tokens, seconds = [], []
    for run, level, token_unit, second_unit in runs:
        tokens.append(first_reached(run.tokens, run.losses, level) / token_unit)
        seconds.append(first_reached(run.seconds, run.losses, level) / second_unit)
    return Reached(tokens, seconds)


def answer(plan: Comparison, found: Sequence[Outcome]) -> str:
    """The result in a sentence: which arms are better than the first, by how much, and with what certainty."""
    first, *others = found
    if not first.finals:
        return f"No run of {first.label} finished, so nothing can be compared with it."
    if len(others) == 1:
        return _of_one(plan, first, others[0])
    tested = sum(one.against is not None for one in others)
    ending = f"; p is corrected for {tested} arms." if tested > 1 else "."
    beside = f"{first.label} with {plan.seeds} {'seed' if plan.seeds == 1 else 'seeds'}"
    ranked = sorted(others, key=lambda one: (WORDS.index(one.verdict.split()[0]), one.mean))
    if len(others) <= MOST_IN_WORDS:
        *parts, last = [f"{one.label} {_in_words(first, one)}" for one in ranked]
        return f"Beside {beside}, {', '.join(parts)} and {last}{ending}"
    kinds = [one.verdict.split()[0] if one.against else "" for one in others]
    counts = [("better", kinds.count("better")), ("worse", kinds.count("worse"))]
    parts = [f"{n or 'none'} {'are' if n > 1 else 'is'} {word}" for word, n in counts if n or word == "better"]
    parts[0] += f" (the best, {ranked[0].label}, {_in_words(first, ranked[0])})" if counts[0][1] else ""
    parts += [f"{n} {'show' if n > 1 else 'shows'} no difference" for n in (kinds.count("no"),) if n]
    parts += [f"{n} {'have' if n > 1 else 'has'} no test" for n in (kinds.count(""),) if n]
    return f"Of {len(others)} arms beside {beside}, {', '.join(parts)}{ending}"


def _of_one(plan: Comparison, first: Outcome, one: Outcome) -> str:
    """The only arm beside the first."""
    test = one.against
    if test is None:
        return f"Beside {first.label}, {one.label} {_in_words(first, one)}."
    seeds = f"{test.n} seeds" if test.n == plan.seeds else f"{test.n} of {plan.seeds} seeds"
    certainty = f"95 % interval {test.low:+.4f} to {test.high:+.4f}, {_p(test.p)}, {seeds}"
    words = one.verdict.split()[0]
    if words == "no":
        return f"{one.label} shows no difference from {first.label}: it ends {_off(test.mean)} ({certainty})."
    less = f", less than the {MATTERS} that matter" if abs(test.mean) < MATTERS else ""
    return f"{one.label} is {words} than {first.label} by {abs(test.mean):.4f} nats{less} ({certainty})."


def _in_words(first: Outcome, one: Outcome) -> str:
    """An arm beside the first, after its name."""
    common = [seed for seed in one.finals if seed in first.finals]
    if not common:
        return "cannot be compared: " + ("no seed finished in both" if one.finals else "no run of it finished")
    if one.against is None or one.p_holm is None:
        return f"ends {_off(one.finals[common[0]] - first.finals[common[0]])} on one seed, which shows nothing"
    mean, kind = one.against.mean, one.verdict.split()[0]
    if kind == "no":
        return f"shows no difference ({_off(mean)}, {_p(one.p_holm)})"
    less = f", less than the {MATTERS} that matter" if abs(mean) < MATTERS else ""
    return f"is {kind} by {abs(mean):.4f} nats{less} ({_p(one.p_holm)})"


def _p(p: float) -> str:
    return "p < 1e-6" if p < 1e-6 else f"p = {p:.2g}"


def _off(difference: float) -> str:
    amount = f"{abs(difference):.4f}"
    return f"{amount} nats {'lower' if difference < 0 else 'higher'}" if float(amount) else "at the same loss"


def remarks(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> list[str]:
    """What limits the figures: runs that do not count, differences of set-up, too few seeds."""
    lines = set_up_remarks(plan, runs)
    n = min((one.against.n if one.against else 0 for one in found[1:]), default=0)
    if n < FEW:
        lines.append(f"Fewer than {FEW} pairs of runs: only a large difference can be told from chance.")
    else:
        lines.append(f"The sign-flip test cannot give a p below 2^(1-n), which is {2.0 ** (1 - n):.3g} for {n} seeds.")
    return lines


def set_up_remarks(plan: Comparison, runs: Sequence[Sequence[Run]]) -> list[str]:
    """Runs that do not count, and differences of set-up."""
    every = [run for of_arm in runs for run in of_arm]
    begun = [run for run in every if run.start]
    lines = [
        f"{arm.label} seed {run.seed} does not count: {run.status}."
        for arm, of_arm in zip(plan.arms, runs, strict=True)
        for run in of_arm
        if not run.is_finished and run.status != NOT_BEGUN
    ]
    if waiting := [
        f"{arm.label} ({', '.join(seeds)})"
        for arm, of_arm in zip(plan.arms, runs, strict=True)
        if (seeds := [str(run.seed) for run in of_arm if run.status == NOT_BEGUN])
    ]:
        lines.append(f"Not begun, with these seeds: {', '.join(waiting)}.")
    if len({run.start.get("data_fingerprint") for run in begun}) > 1:
        lines.append("The data of these runs differ, so their losses cannot be compared.")
    for name, key in (
        ("commits", "commit"), ("versions of PyTorch", "torch"), ("devices", "device"), ("threads", "threads"),
        ("precisions", "precision"),
    ):  # fmt: skip
        seen = list(dict.fromkeys(str(run.start.get(key)) for run in begun))
        if len(seen) > 1:
            lines.append(f"The runs used different {name}: {', '.join(seen)}.")
    return lines
