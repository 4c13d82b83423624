"""The runs of a comparison. In: its plan and configurations; out: run folders, each trained in its own process."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from regpt2.base.console import ProgressLine, count, duration, say
from regpt2.base.errors import Problem, UsageError
from regpt2.base.files import folder_lock, write_atomic
from regpt2.base.ranks.processes import Command, Place, run_commands
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import to_toml
from regpt2.pages.record import read_record
from regpt2.run.comparing.arms import Budget, Given
from regpt2.run.comparing.runs import Arm, Comparison, last_step, read_run
from regpt2.run.comparing.write import write_json

TIMED_STEPS = 30  # the first third warms up
LEAVING_S = 60.0  # a run whose comparison was killed may need this long to write its last checkpoint


@dataclass(frozen=True)
class Task:
    """A run to train."""

    arm: Arm
    seed: int
    config: RunConfig
    folder: Path

    def command(self, recipe: Path) -> Command:
        """The command line; its output goes into the run folder."""
        arguments = ["train", str(recipe), "--run", str(self.folder), "--seed", str(self.seed)]
        return Command(arguments, self.folder / "train.log")

    def tokens_made(self) -> int:
        """Tokens trained on so far."""
        return self.config.batch.tokens_until(last_step(self.folder))


def in_words(budget: Budget, arms: Sequence[Arm]) -> str:
    """The budget of each run, for the page."""
    if budget.seconds:
        return f"{duration(budget.seconds)} of training"
    least, most = (count(which(arm.tokens for arm in arms)) for which in (min, max))
    return f"{least} tokens" if least == most else f"{least} to {most} tokens"


def budgets(out: Path, arms: Sequence[Given], budget: Budget, room: Sequence[Place]) -> list[int]:
    """The tokens of each arm: those of the budget, or what it processes in that time at its measured speed.

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


def train_all(out: Path, plan: Comparison, configs: Mapping[str, RunConfig], room: Sequence[Place]) -> None:
    """Train the unfinished runs, seed by seed, and update compare.json after each. Failures go into the plan."""
    tasks = [
        Task(arm, seed, configs[arm.label], out / arm.label / f"seed-{seed}")
        for seed in range(1, plan.seeds + 1)
        for arm in plan.arms
        if not read_run(out, plan, arm, seed).is_finished
    ]
    n_runs = plan.seeds * len(plan.arms)
    n_done = n_runs - len(tasks)
    listed = ", ".join(f"{arm.label} ({count(arm.tokens)} tokens)" for arm in plan.arms)
    arms = f"{len(plan.arms)} places, {plan.budget} each" if plan.axes else listed
    say(f"{n_runs} runs in {out}: {plan.seeds} seeds of {arms}")
    write_json(out, plan)
    try:
        for task, code in _trained(out, tasks, room):
            n_done += 1
            if code:
                plan.failures[f"{task.arm.label}/seed-{task.seed}"] = last_words(task.folder / "train.log")
            run = read_run(out, plan, task.arm, task.seed)
            result = f"loss {run.losses[-1]:.4f}, {duration(run.seconds[-1])}" if run.is_finished else run.status
            say(f"{task.arm.label} seed {task.seed}: {result} ({n_done} of {n_runs})")
            write_json(out, plan)
    except KeyboardInterrupt:
        say("Interrupted. Finished runs are kept; run the same command again to resume.")
        raise


def _trained(out: Path, tasks: Sequence[Task], room: Sequence[Place]) -> Iterator[tuple[Task, int]]:
    """Each task with its exit code when it ends; shows the progress of all meanwhile."""
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
    """Wait for a run whose comparison was killed: it writes a checkpoint before it exits.

    Raises:
        UsageError: another process still holds the folder.
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
    """The last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.removeprefix("regpt2: ")[:500] for line in reversed(lines) if line.strip()), "no output")
