"""Is one recipe better than another? In: recipes with options; out: runs of several seeds, p-values, a page.

regpt2 compare demo "demo --optim.lr 2e-3" --seeds 4
regpt2 compare demo "slow=demo --optim.lr 2e-3" --budget 10min --out runs/lr -- --data data/python_library_bytes
regpt2 compare demo --sweep optim.lr=1e-3,2e-3,4e-3 optim.weight_decay=0.1,0.8         a grid: which place is best?
regpt2 compare demo --scaling model.n_embd=32,64,96,128 model.n_head=1,2,3,4           a power law, checked on the last
regpt2 compare runs/lr --target 1.5                                      write the tables again, train nothing

Each run is a `regpt2 train` in a process of its own, in OUT/ARM/seed-N. Interrupted, the same command resumes.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from regpt2.base.console import count, duration, say, warn
from regpt2.base.device import pick_device
from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock
from regpt2.base.options import parse
from regpt2.base.ranks.processes import Place, places
from regpt2.base.shelves import plugin_options
from regpt2.config.run import RunConfig
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.machine.planning.formulas import FORWARD
from regpt2.machine.planning.run_time import OF_MATMULS, START_S, eval_tokens, n_evaluations
from regpt2.model.flops import flops_per_token
from regpt2.model.matmul_rate import matmul_rate, model_shapes
from regpt2.run.comparing.arms import Budget, Given, keep_recipe, read_arms, read_budget, with_baseline, within
from regpt2.run.comparing.axes import place_arms, read_axes, together
from regpt2.run.comparing.runs import Arm, Axis, Comparison, read_plan
from regpt2.run.comparing.scaling.sizes import require_enough, sized, variable
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
SWEEP = (
    "A grid over one recipe: optim.lr=1e-3,2e-3,4e-3 optim.weight_decay=0.1,0.8. Settings in one quoted word change "
    "together. The tables name the best place and those that cannot be told from it."
)
SCALING = (
    "One recipe at four or more sizes (model.n_embd=64,128,192,256 model.n_head=1,2,3,4; all lists change together) "
    "or budgets (budget=300k,1M,3M,10M): fits a power law and predicts the loss of the largest."
)
MANY = 50  # runs: beyond it a grid is worth a warning


@dataclass(frozen=True)
class CompareOptions:
    """Train several recipes, or one with several settings, with several seeds each, and test which is better."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARM [ARM ...]", help=ARMS)]
    sweep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETTING=VALUE,VALUE,... [...]", help=SWEEP)] = ()
    scaling: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETTING=VALUE,VALUE,... [...]", help=SCALING)] = ()
    hold_out: int | None = None
    """With --scaling: the law is not fitted to the N largest, which check what it predicts. Default: 1."""
    over: str = ""
    """With --scaling: the law is one of parameters, tokens or flops. Default: what varies; flops if both do."""
    budget: Annotated[str, tyro.conf.arg(help=BUDGET)] = ""
    seeds: int = 4
    """Train each arm with the seeds 1 to N; the same seed gives the same order of the data."""
    target: float | None = None
    """A validation loss: the tables also show when each arm reached it."""
    out: Path = Path("runs/compare")
    """The folder of all runs, and of compare.json, compare.md, compare.png and compare.html."""
    baseline: str = ""
    """The arm to compare the others with; default: the first, or in a grid the recipe's own settings."""
    parallel: int = 1
    """Number of runs at once: one GPU each, or on a CPU a share of the threads each."""
    evaluations: int = 20
    """Validation losses measured in each run, evenly spaced."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, checked."""

    kind: str
    """As in `Comparison`."""
    arms: list[Given]
    first: str
    """The default baseline."""
    axes: list[Axis] = field(default_factory=list)
    at: list[list[int]] = field(default_factory=list)
    budgets: list[str] = field(default_factory=list)
    """Of each arm; empty: that of all."""


def main(arguments: list[str]) -> int:
    """`regpt2 compare ARM ARM ...`: 1 if a run failed."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parse(CompareOptions, arguments[:at], "regpt2 compare")
    for name in ("seeds", "parallel", "evaluations"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)} must be at least 1.")
    _check(options)
    if len(options.arms) == 1 and not (options.sweep or options.scaling) and Path(options.arms[0]).is_dir():
        return show_again(Path(options.arms[0]), options)
    asked = read(options, arguments[at + 1 :])
    budget = read_budget(options.budget, asked.arms[0].config)
    room = places(options.parallel, pick_device(asked.arms[0].config.device))
    for split in ("train", "val"):
        open_mixture(read_shares(asked.arms[0].config.data, asked.arms[0].config.mix), split).close()
    with folder_lock(options.out):
        tokens = tokens_of(asked, options.out, budget, room)
        configs = {
            arm.label: within(arm, most, options.evaluations) for arm, most in zip(asked.arms, tokens, strict=True)
        }
        compared = [_arm(asked, place, configs[arm.label]) for place, arm in enumerate(asked.arms)]
        over = variable(compared, options.over, _held_out(options)) if asked.kind == "scaling" else ""
        for label, config in configs.items():
            keep_recipe(options.out, label, config)
        plan = Comparison(
            arms=with_baseline(options.out, compared, options.baseline or asked.first),
            seeds=options.seeds,
            budget=in_words(budget, compared),
            target=options.target,
            command=shlex.join(["regpt2", "compare", *plugin_options(), *arguments]),
            kind=asked.kind,
            axes=asked.axes,
            hold_out=_held_out(options) if asked.kind == "scaling" else 0,
            over=over,
        )
        if asked.axes:
            _announce(plan, configs, budget, len(room))
        train_all(options.out, plan, configs, room)
        show(options.out, plan)
    return 1 if plan.failures else 0


def _check(options: CompareOptions) -> None:
    """Refuse options that do not go together."""
    if options.sweep and options.scaling:
        raise UsageError("--sweep and --scaling exclude each other; give them to two comparisons.")
    if (options.sweep or options.scaling) and len(options.arms) != 1:
        option = "--sweep" if options.sweep else "--scaling"
        raise UsageError(
            f"{option} takes one recipe before it, got {len(options.arms)}: regpt2 compare demo {option} ..."
        )
    if options.scaling:
        for name, given in (("--baseline", options.baseline), ("--target", options.target is not None)):
            if given:
                raise UsageError(f"{name} does not apply to --scaling, which compares no arms with a baseline.")
    elif (options.over or options.hold_out is not None) and (options.sweep or len(options.arms) > 1):
        raise UsageError("--hold-out and --over apply to --scaling only.")


def _held_out(options: CompareOptions) -> int:
    return 1 if options.hold_out is None else options.hold_out


def read(options: CompareOptions, common: Sequence[str]) -> Asked:
    """The arms that the command line asks for.

    Raises:
        UsageError: there are too few, or one is wrong.
    """
    if not (options.sweep or options.scaling):
        if len(options.arms) < 2:
            raise UsageError(
                "a comparison needs two recipes or more, one recipe with --sweep or --scaling, or the folder of an "
                "earlier comparison."
            )
        arms = read_arms(options.arms, common)
        return Asked("arms", arms, arms[0].label)
    option = "--sweep" if options.sweep else "--scaling"
    axes = read_axes(options.sweep or options.scaling, option)
    if options.scaling:
        axes = [together(axes, option)]
        require_enough(len(axes[0].values), _held_out(options))
    placed, axes, own = place_arms(options.arms[0], common, axes)
    arms = [arm.given for arm in placed]
    return Asked(
        "sweep" if options.sweep else "scaling",
        arms,
        arms[own if options.sweep else 0].label,
        axes,
        [arm.at for arm in placed],
        [arm.budget for arm in placed],
    )


def tokens_of(asked: Asked, out: Path, budget: Budget, room: Sequence[Place]) -> list[int]:
    """The most tokens that each arm may take.

    Raises:
        UsageError: an arm's own budget is not one of tokens.
    """
    if not any(asked.budgets):
        return budgets(out, asked.arms, budget, room)
    own = [read_budget(text, asked.arms[0].config).tokens for text in asked.budgets]
    if not all(own):
        raise UsageError(f"budget={asked.budgets[own.index(0)]} must be tokens (300k, 5M, 1.7B), not time.")
    return own


def _arm(asked: Asked, place: int, config: RunConfig) -> Arm:
    given, steps = asked.arms[place], config.max_steps
    arm = Arm(given.label, given.spec, steps, config.batch.tokens_until(steps), [])
    arm = replace(arm, at=asked.at[place]) if asked.axes else arm
    return sized(arm, config) if asked.kind == "scaling" else arm


def _announce(plan: Comparison, configs: dict[str, RunConfig], budget: Budget, at_once: int) -> None:
    """How many runs the grid has, and roughly for how long; a warning for many."""
    n_runs = len(plan.arms) * plan.seeds
    line = f"{n_runs} runs, {count(plan.seeds * sum(arm.tokens for arm in plan.arms))} tokens in all"
    if budget.seconds:
        line += f", {duration(n_runs * budget.seconds / at_once)} of training"
    elif pick_device(configs[plan.arms[0].label].device).type == "cpu":
        seconds = plan.seeds * sum(_rough_seconds(config) for config in configs.values())
        line += f", roughly {duration(seconds)} on this CPU if nothing else runs"
    if n_runs > MANY:
        warn(f"{line}. Fewer values, --seeds or a smaller --budget would be quicker; Ctrl-C keeps what is finished.")
    else:
        say(f"{line}.")


def _rough_seconds(config: RunConfig) -> float:
    """Of a run on this CPU, from its matmul rate: start, training and validation."""
    rate = OF_MATMULS * matmul_rate(
        model_shapes(config.model, 1024), torch.float32, torch.device("cpu"), at_least_s=0.05
    )
    evaluated = FORWARD * n_evaluations(config) * sum(eval_tokens(config).values())
    tokens = config.batch.tokens_until(config.max_steps) + evaluated
    return START_S + tokens * flops_per_token(config.model, config.batch.seq_len) / rate


def show_again(folder: Path, options: CompareOptions) -> int:
    """Write the tables of a comparison again, from its records."""
    plan = read_plan(folder)
    arms = with_baseline(folder, plan.arms, options.baseline)
    target = plan.target if options.target is None else options.target
    plan = replace(plan, arms=arms, target=target)
    if plan.kind == "scaling":
        hold_out = plan.hold_out if options.hold_out is None else options.hold_out
        plan = replace(plan, hold_out=hold_out, over=variable(plan.arms, options.over or plan.over, hold_out))
    with folder_lock(folder):
        show(folder, plan)
    return 1 if plan.failures else 0
