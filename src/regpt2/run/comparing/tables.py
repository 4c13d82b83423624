"""A comparison as tables. In: its outcomes; out: rows of text, for a screen, for Markdown and for a page."""

import math
import statistics
from collections.abc import Callable, Sequence

from regpt2.base.console import count, duration
from regpt2.run.comparing.outcomes import MATTERS, Outcome
from regpt2.run.comparing.runs import Comparison, Run

NOTHING = "–"

HOW_TO_READ = (
    "Loss: the last validation loss, in nats per token, mean and standard deviation over the seeds. "
    "Difference: to the first arm, seed by seed, with the 95 % confidence interval of its mean; p: paired t-test, "
    "two-sided, then corrected for the number of arms (Holm; the verdict goes by it, at 0.05), and by the exact "
    f"sign-flip test. Differences below {MATTERS} nats do not matter. No difference shown does not prove that "
    "there is none. Tokens and time to a loss: when an arm first reached the first arm's last loss, as a share of what "
    "that arm took in all, seed by seed. Time counts updates alone. A schedule lowers the loss most at its end, so an "
    "arm whose schedule ended there would need less."
)


def results_table(found: Sequence[Outcome]) -> list[list[str]]:
    """A head and a row for each arm: whether it differs from the first, and its loss."""
    rows = [["arm", "verdict", "difference", "95 % interval", "p", "p (Holm)", "loss"]]
    for place, one in enumerate(found):
        test = one.against
        tested = [NOTHING] * 4
        if test is not None:
            tested = [f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", chance(test.p), chance(one.p_holm)]
        rows.append([one.label, one.verdict if place else "the baseline", *tested, _loss(one)])
    return rows


def costs_table(plan: Comparison, found: Sequence[Outcome]) -> list[list[str]]:
    """A head and a row for each arm: tokens and time, in all and to the losses of interest."""
    first, target = plan.arms[0].label, plan.target
    head = ["arm", "seeds", "tokens", "time", f"tokens to {first}'s loss", f"time to {first}'s loss"]
    head += [] if target is None else [f"tokens to {target:g}", f"time to {target:g}"]
    rows = []
    for one in found:
        row = [one.label, f"{len(one.finals)} of {plan.seeds}", _tokens(one.tokens), _time(one.seconds)]
        row += [NOTHING] * 2 if one.shares is None else [_share(one.shares.tokens), _share(one.shares.seconds)]
        if one.to_target is not None:
            row += [_first(one.to_target.tokens, _tokens), _first(one.to_target.seconds, _time)]
        rows.append(row)
    return [head, *rows]


def seeds_table(plan: Comparison, runs: Sequence[Sequence[Run]], found: Sequence[Outcome]) -> list[list[str]]:
    """A head and a row for each arm: the final loss of each run, and the p-value of the sign-flip test."""
    rows = [["arm", *(f"seed {seed}" for seed in range(1, plan.seeds + 1)), "p by signs"]]
    for of_arm, one in zip(runs, found, strict=True):
        cells = [f"{run.losses[-1]:.4f}" if run.is_finished else run.status.split(":")[0] for run in of_arm]
        rows.append([one.label, *cells, chance(one.against.p_signs if one.against else None)])
    return rows


def arms_table(plan: Comparison) -> list[list[str]]:
    """A head and a row for each arm: its recipe and budget."""
    rows = [
        [arm.label, arm.spec, f"{arm.max_steps:,}", f"{arm.tokens:,}", "; ".join(arm.changes) or NOTHING]
        for arm in plan.arms
    ]
    return [["arm", "given as", "updates", "tokens", "changes from the first"], *rows]


def for_screen(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return lines


def _loss(one: Outcome) -> str:
    spread = f" ± {one.sd:.4f}" if math.isfinite(one.sd) else ""
    return f"{one.mean:.4f}{spread}" if one.finals else NOTHING


def _share(shares: Sequence[float]) -> str:
    """Mean and standard deviation, if all runs reached the loss."""
    if any(map(math.isinf, shares)):
        return _missed(shares)
    spread = f" ± {statistics.stdev(shares):.1%}" if len(shares) > 1 else ""
    return f"{statistics.fmean(shares):.1%}{spread}"


def _first(values: Sequence[float], show: Callable[[float], str]) -> str:
    if any(map(math.isinf, values)):
        return _missed(values)
    return show(statistics.fmean(values)) if values else NOTHING


def _missed(values: Sequence[float]) -> str:
    missed = sum(map(math.isinf, values))
    return "not reached" if missed == len(values) else f"not reached by {missed} of {len(values)}"


def _tokens(tokens: float) -> str:
    return count(tokens) if math.isfinite(tokens) else NOTHING


def _time(seconds: float) -> str:
    return duration(seconds) if math.isfinite(seconds) else NOTHING


def chance(p: float | None) -> str:
    """A p-value with three digits."""
    if p is None:
        return NOTHING
    return "< 1e-6" if p < 1e-6 else f"{p:.3g}"
