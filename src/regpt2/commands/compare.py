"""Is one recipe better than another? In: recipes with options; out: runs of several seeds, p-values, a page.

regpt2 compare demo "demo --optim.lr 2e-3" --seeds 4
regpt2 compare demo "slow=demo --optim.lr 2e-3" --budget 10min --out runs/lr -- --data data/python_library_bytes
regpt2 compare runs/lr --target 1.5                                      write the tables again, train nothing

Each run is a `regpt2 train` in a process of its own, in OUT/ARM/seed-N. Interrupted, the same command resumes.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.device import pick_device
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock
from regpt2.base.options import parse
from regpt2.base.ranks.processes import places
from regpt2.base.shelves import plugin_options
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.run.comparing.arms import keep_recipe, read_arms, read_budget, with_baseline, within
from regpt2.run.comparing.runs import Arm, Comparison, read_plan
from regpt2.run.comparing.train_arms import budgets, in_words, train_all
from regpt2.run.comparing.write import show

ARMS = (
    'Recipes, each with its own options in quotes: "demo --optim.lr 2e-3" or "NAME=demo --optim.lr 2e-3". The first is '
    "the baseline. Options after ` -- ` apply to all of them: ... -- --data DIR. Or the folder of one earlier "
    "comparison, to write its tables again."
)
BUDGET = (
    "What each run may use: tokens (300k, 5M, 1.7B), or training time (90s, 10min, 2h; the speed of each arm is then "
    "measured first). Default: the tokens of the first arm. The schedule spans the budget. An arm with its own "
    "--max-steps keeps them."
)


@dataclass(frozen=True)
class CompareOptions:
    """Train several recipes with several seeds each, and test whether any is better than the first (p-value)."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARM [ARM ...]", help=ARMS)]
    budget: Annotated[str, tyro.conf.arg(help=BUDGET)] = ""
    seeds: int = 4
    """Train each arm with the seeds 1 to N; the same seed gives the same order of the data."""
    target: float | None = None
    """A validation loss: the tables also show when each arm reached it."""
    out: Path = Path("runs/compare")
    """The folder of all runs, and of compare.json, compare.md, compare.png and compare.html."""
    baseline: str = ""
    """The arm to compare the others with; default: the first."""
    parallel: int = 1
    """Number of runs at once: one GPU each, or on a CPU a share of the threads each."""
    evaluations: int = 20
    """Validation losses measured in each run, evenly spaced."""


def main(arguments: list[str]) -> int:
    """`regpt2 compare ARM ARM ...`: 1 if a run failed."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parse(CompareOptions, arguments[:at], "regpt2 compare")
    for name in ("seeds", "parallel", "evaluations"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)} must be at least 1.")
    if len(options.arms) == 1 and Path(options.arms[0]).is_dir():
        return show_again(Path(options.arms[0]), options)
    if len(options.arms) < 2:
        raise UsageError("a comparison needs two recipes or more, or the folder of an earlier comparison.")
    arms = read_arms(options.arms, arguments[at + 1 :])
    budget = read_budget(options.budget, arms[0].config)
    room = places(options.parallel, pick_device(arms[0].config.device))
    for split in ("train", "val"):
        open_mixture(read_shares(arms[0].config.data, arms[0].config.mix), split).close()
    with folder_lock(options.out):
        configs = {
            arm.label: within(arm, tokens, options.evaluations)
            for arm, tokens in zip(arms, budgets(options.out, arms, budget, room), strict=True)
        }
        for label, config in configs.items():
            keep_recipe(options.out, label, config)
        steps = {label: config.max_steps for label, config in configs.items()}
        tokens = {label: config.batch.tokens_until(steps[label]) for label, config in configs.items()}
        compared = [Arm(arm.label, arm.spec, steps[arm.label], tokens[arm.label], []) for arm in arms]
        plan = Comparison(
            arms=with_baseline(options.out, compared, options.baseline),
            seeds=options.seeds,
            budget=in_words(budget, compared),
            target=options.target,
            command=shlex.join(["regpt2", "compare", *plugin_options(), *arguments]),
        )
        train_all(options.out, plan, configs, room)
        show(options.out, plan)
    return 1 if plan.failures else 0


def show_again(folder: Path, options: CompareOptions) -> int:
    """Write the tables of a comparison again, from its records."""
    plan = read_plan(folder)
    arms = with_baseline(folder, plan.arms, options.baseline)
    target = plan.target if options.target is None else options.target
    with folder_lock(folder):
        show(folder, replace(plan, arms=arms, target=target))
    return 1 if plan.failures else 0
