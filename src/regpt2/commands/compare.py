"""Is one recipe better than another? In: recipes with options; out: runs of several seeds, p-values, a page.

regpt2 compare demo "demo --optim.lr 2e-3" --seeds 4
regpt2 compare demo "slow=demo --optim.lr 2e-3" --budget 10min --out runs/lr -- --data data/python_library_bytes
regpt2 compare runs/lr --target 1.5                                      the tables again, nothing trained

Each run is a `regpt2 train` in a process of its own, in OUT/ARM/seed-N. Stopped and started again, it goes on.
"""

import json
import math
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from regpt2 import __version__
from regpt2.base.console import ProgressLine, count, duration, say
from regpt2.base.device import pick_device
from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import folder_lock, write_atomic
from regpt2.base.ranks.processes import Command, Place, places, run_commands
from regpt2.base.version import commit
from regpt2.comparing.arms import Budget, Given, described, keep_recipe, read_arms, read_budget, with_baseline, within
from regpt2.comparing.charts import picture
from regpt2.comparing.outcomes import outcomes, remarks
from regpt2.comparing.page import page, subtitle, text, title
from regpt2.comparing.runs import Arm, Plan, last_step, read_plan, read_run, read_runs
from regpt2.comparing.tables import costs_table, for_screen, results_table
from regpt2.config.run import RunConfig, to_toml
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.pages.record import read_record

TIMED_STEPS = 30  # the first third warms up
LEAVING_S = 60.0  # for a run whose comparison was killed to write its last checkpoint


@dataclass(frozen=True)
class CompareOptions:
    """Train several recipes with several seeds each, and say whether one is better than the first, with a p-value."""

    arms: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARM [ARM ...]")]
    """Each a recipe, with options of its own in quotes: "demo --optim.lr 2e-3", or "NAME=demo --optim.lr 2e-3". The
    first is the baseline. What follows ` -- ` goes for all of them: ... -- --data DIR. Or alone the folder of a
    comparison: its tables are written again."""
    budget: str = ""
    """What each run may take: tokens (300k, 5M, 1.7B), or time of training (90s, 10min, 2h), for which each arm's speed
    is measured first. By default the tokens of the first arm. The schedule spans it. An arm that says --max-steps
    itself keeps to that."""
    seeds: int = 4
    """Each arm is trained with the seeds 1 to this one; the same seed means the same order of the data."""
    target: float | None = None
    """A validation loss: the tables also tell when each arm came down to it."""
    out: Path = Path("runs/compare")
    """The folder of all runs, and of compare.json, compare.md, compare.png and compare.html."""
    baseline: str = ""
    """The arm that the others are held against; by default the first."""
    parallel: int = 1
    """So many runs at once: a GPU for each, or on a CPU its share of the threads."""
    evaluations: int = 20
    """Validation losses of each run, evenly spread."""


@dataclass(frozen=True)
class Task:
    """A run to make."""

    arm: Arm
    seed: int
    config: RunConfig
    folder: Path

    def command(self, recipe: Path) -> Command:
        """As a command line; what it says goes into its folder."""
        said = ["train", str(recipe), "--run", str(self.folder), "--seed", str(self.seed)]
        return Command(said, self.folder / "train.log")

    def tokens_made(self) -> int:
        """Tokens trained on so far."""
        return self.config.batch.tokens_until(last_step(self.folder))


def main(arguments: list[str]) -> int:
    """The verb `regpt2 compare`: 1 if a run failed."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = tyro.cli(CompareOptions, args=arguments[:at], prog="regpt2 compare")
    for name in ("seeds", "parallel", "evaluations"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)} must be at least 1.")
    if len(options.arms) == 1 and Path(options.arms[0]).is_dir():
        return show_again(Path(options.arms[0]), options)
    if len(options.arms) < 2:
        raise UsageError("a comparison takes two recipes at least, or the folder of one that was made.")
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
        compared = [described(arm, configs[arm.label]) for arm in arms]
        plan = Plan(
            arms=with_baseline(options.out, compared, options.baseline),
            seeds=options.seeds,
            budget=in_words(budget, compared),
            target=options.target,
            command=shlex.join(["regpt2", "compare", *arguments]),
        )
        train_all(options.out, plan, configs, room)
        show(options.out, plan)
    return 1 if plan.failures else 0


def in_words(budget: Budget, arms: Sequence[Arm]) -> str:
    """What each run takes, for the page."""
    if budget.seconds:
        return f"{duration(budget.seconds)} of training"
    least, most = (count(which(arm.tokens for arm in arms)) for which in (min, max))
    return f"{least} tokens" if least == most else f"{least} to {most} tokens"


def budgets(out: Path, arms: Sequence[Given], budget: Budget, room: Sequence[Place]) -> list[int]:
    """The tokens of each arm: those of the budget, or as many as its measured speed makes in the time.

    Raises:
        Problem: an arm cannot be measured.
    """
    if budget.tokens:
        return [budget.tokens] * len(arms)
    folders = [out / arm.label / "timing" for arm in arms]
    todo = [place for place, folder in enumerate(folders) if not _was_timed(folder)]
    commands = []
    for place in todo:
        recipe = folders[place].with_suffix(".toml")
        timing = replace(
            arms[place].config, max_steps=TIMED_STEPS, log_every=1, eval_every=0, sample_every=0, save_every=0
        )
        write_atomic(recipe, to_toml(timing))
        commands.append(Command(["train", str(recipe), "--run", str(folders[place])], folders[place] / "train.log"))
    for which, code in run_commands(commands, room):
        if code:
            raise Problem(
                f"the speed of {arms[todo[which]].label} cannot be measured: {last_words(commands[which].log)}"
            )
    rates = [float(np.median(read_record(folder).train["tokens_per_s"][TIMED_STEPS // 3 :])) for folder in folders]
    for arm, rate in zip(arms, rates, strict=True):
        say(f"{arm.label}: {rate:,.0f} tokens/s, {count(rate * budget.seconds)} tokens in {duration(budget.seconds)}")
    return [round(rate * budget.seconds) for rate in rates]


def _was_timed(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and read_record(folder).status == "finished"


def train_all(out: Path, plan: Plan, configs: Mapping[str, RunConfig], room: Sequence[Place]) -> None:
    """Make the runs that are not finished, seed by seed; compare.json grows with each. Failures go into the plan."""
    tasks = [
        Task(arm, seed, configs[arm.label], out / arm.label / f"seed-{seed}")
        for seed in range(1, plan.seeds + 1)
        for arm in plan.arms
        if not read_run(out, plan, arm, seed).is_finished
    ]
    n_runs = plan.seeds * len(plan.arms)
    n_done = n_runs - len(tasks)
    arms = ", ".join(f"{arm.label} ({count(arm.tokens)} tokens)" for arm in plan.arms)
    say(f"{n_runs} runs in {out}: {plan.seeds} seeds of {arms}")
    write_json(out, plan)
    try:
        for task, code in _trained(out, tasks, room):
            n_done += 1
            if code:
                plan.failures[f"{task.arm.label}/seed-{task.seed}"] = last_words(task.folder / "train.log")
            run = read_run(out, plan, task.arm, task.seed)
            told = f"loss {run.losses[-1]:.4f}, {duration(run.seconds[-1])}" if run.is_finished else run.status
            say(f"{task.arm.label} seed {task.seed}: {told} ({n_done} of {n_runs})")
            write_json(out, plan)
    except KeyboardInterrupt:
        say("Stopped; finished runs are kept, and the same command goes on.")
        raise


def _trained(out: Path, tasks: Sequence[Task], room: Sequence[Place]) -> Iterator[tuple[Task, int]]:
    """Each task with its exit code, as it ends; meanwhile the progress of all."""
    for task in tasks:
        _wait_until_left(task.folder)
    wholes = [task.config.batch.tokens_until(task.config.max_steps) for task in tasks]
    before = [min(task.tokens_made(), whole) for task, whole in zip(tasks, wholes, strict=True)]
    ended: set[int] = set()
    with ProgressLine("training", sum(wholes) - sum(before), "tokens") as line:

        def look() -> None:
            made = [wholes[i] if i in ended else task.tokens_made() for i, task in enumerate(tasks)]
            line.advance(max(0.0, sum(made) - sum(before) - line.done))

        commands = [task.command(out / task.arm.label / "recipe.toml") for task in tasks]
        for which, code in run_commands(commands, room, on_wait=look):
            ended.add(which)
            yield tasks[which], code


def _wait_until_left(folder: Path) -> None:
    """A run whose comparison was killed writes a checkpoint before it leaves.

    Raises:
        UsageError: somebody holds the folder still.
    """
    until = time.monotonic() + LEAVING_S
    while (folder / ".lock").exists():
        try:
            with folder_lock(folder):
                return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def last_words(log: Path) -> str:
    """The last line that a process said."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.removeprefix("regpt2: ")[:500] for line in reversed(lines) if line.strip()), "it said nothing")


def show_again(folder: Path, options: CompareOptions) -> int:
    """Write the tables of a comparison again, from its records."""
    plan = read_plan(folder)
    arms = with_baseline(folder, plan.arms, options.baseline)
    target = plan.target if options.target is None else options.target
    with folder_lock(folder):
        show(folder, replace(plan, arms=arms, target=target))
    return 1 if plan.failures else 0


def show(folder: Path, plan: Plan) -> None:
    """The tables on the screen; compare.json, compare.md, compare.png and compare.html."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    said = remarks(plan, runs, found)
    write_json(folder, plan)
    write_atomic(folder / "compare.png", picture(plan, runs, found, title(plan), subtitle(plan, runs)))
    write_atomic(folder / "compare.md", text(plan, runs, found, said, "compare.png"))
    write_atomic(folder / "compare.html", page(plan, runs, found, said))
    tables = results_table(found), costs_table(plan, found)
    for line in ("", *for_screen(tables[0]), "", *for_screen(tables[1]), "", *said):
        say(line)
    say(f"{folder / 'compare.html'} is written, and beside it compare.md, compare.png and compare.json.")


def write_json(folder: Path, plan: Plan) -> None:
    """The plan, every run's curve and what it depends on, and what follows from them."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    told = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "plan": asdict(plan),
        "outcomes": [{**asdict(one), "mean": one.mean, "sd": one.sd, "verdict": one.verdict} for one in found],
        "remarks": remarks(plan, runs, found),
        "runs": {arm.label: [asdict(run) for run in of_arm] for arm, of_arm in zip(plan.arms, runs, strict=True)},
    }
    write_atomic(folder / "compare.json", json.dumps(_plain(told), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
