"""CORE. In: a model and 22 tasks of several kinds; out: how far above chance it is on each, and the mean of that.

Order of the examples, shots, wording and rules are nanochat's, so that the figures are comparable with its scores of
OpenAI's four GPT-2 (references/core.toml).
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regpt2.base.console import warn
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.data.fast_tokenizer import fast_tokenizer
from regpt2.evals.scoring.assets import find_parts
from regpt2.evals.scoring.choices import accuracy
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.core.judge import judge
from regpt2.evals.scoring.core.prompts import read_items
from regpt2.evals.scoring.core.tasks import TASKS, Task
from regpt2.evals.scoring.questions import read_on_all_ranks

DESCRIPTION = "CORE: 22 tasks, most with ten shots; how far above chance, 0 to 1, as nanochat measures it"
PARTS = tuple(TASKS)
PROTOCOLS = {
    "core": "mean over the 22 tasks of (accuracy - chance) / (1 - chance), as nanochat measures it: examples in the order of "
    "Random(1337).shuffle, the shots of example i by Random(1234 + i).sample from all others, a blank line after each; "
    "<|endoftext|> first, prompt and answer within the model's context, cut on the left",
    "centered_mean": "the same over the tasks that were measured",
    **{task.name: task.protocol for task in TASKS.values()},
}
ASSETS = tuple(task.asset for task in TASKS.values())
BRIEF_EXAMPLES = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """CORE's own options."""

    examples: int = 0
    """Score only the first N examples of each task, in its shuffled order; 0 = all, while training 100."""
    context: int = 0
    """The most tokens of a prompt with its answer; 0 = the model's context. GPT-2's is 1,024."""

    def __post_init__(self) -> None:
        for name, least in (("examples", 0), ("context", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"core.{name} = {getattr(self, name)} must be at least {least}.")


def evaluate(context: EvalContext) -> Figures:
    """Of each task `TASK` (accuracy), `TASK_stderr`, `TASK_centered`; over all `core`, `centered_mean`, `tasks`.

    `core` is there only if all 22 were measured. With context.brief only the figures over all.

    Raises:
        DataError, DownloadError: no task has its data, or the only one has not.
    """
    options = context.options or Options()
    paths = _files(context)
    limits = [n for n in (context.limit, options.examples or (BRIEF_EXAMPLES if context.brief else 0)) if n]
    size = min([context.context_size, *([options.context] if options.context else [])])
    tokenizer = fast_tokenizer("auto", context.need_tokenizer())
    figures: Figures = {}
    count = 0
    for name, path in paths.items():
        task = TASKS[name]
        read = partial(read_items, task, path, is_main=context.world.is_main)
        items = read_on_all_ranks(context, f"core.{name}", read)
        n = min([len(items), *limits])
        right = judge(context, task, items, n, size, tokenizer)
        figures |= accuracy(name, [int(one) for one in right], [1] * n)
        figures[f"{name}_centered"] = task.scores.centered(sum(right) / n)
        count += n
        context.on_part(f"core.{name}", sum(right) / n)
    if context.part:
        return {**figures, "count": count}
    over_all = _over_all([TASKS[name] for name in paths], figures)
    return {**({} if context.brief else figures), **over_all, "tasks": len(paths), "count": count}


def _files(context: EvalContext) -> dict[str, Path]:
    """The file of each task that can be measured, the same tasks on every rank; names those that cannot."""
    given = context.files.get("core")
    if not context.part and given is not None and given.is_file():
        raise UsageError(f"--files core={given}: CORE has a file for each task; give their folder, or core.TASK=FILE.")
    asked = [TASKS[context.part]] if context.part else list(TASKS.values())
    # While training nothing is downloaded: that was done, or failed, before the first update.
    assets = [task.asset for task in asked]
    find = partial(find_parts, assets, "core", context.files, ask=not context.brief)
    paths, missing = read_on_all_ranks(context, "core", find)
    everywhere = {name: why for found in context.world.everyones(_reasons(missing)) for name, why in found.items()}
    paths = {name: path for name, path in paths.items() if name not in everywhere}
    if not paths:
        raise next(iter(missing.values()), DataError("core: the data of no task is on every machine."))
    if everywhere and context.world.is_main and not context.brief:
        names, why = ", ".join(everywhere), next(iter(everywhere.values()))
        warn(f"core: without the data of {names}: the mean is over the other {len(paths)} tasks. {why}")
    return paths


def _reasons(missing: dict[str, Problem]) -> dict[str, str]:
    return {name: str(why) for name, why in missing.items()}


def _over_all(tasks: list[Task], figures: Figures) -> Figures:
    """The mean of the centered accuracies and its standard error, as of independent tasks."""
    centered = [figures[f"{task.name}_centered"] or 0.0 for task in tasks]
    spreads = [figures[f"{task.name}_stderr"] for task in tasks]
    mean, stderr = sum(centered) / len(tasks), None
    if None not in spreads:
        parts = [(spread or 0.0) / (1 - task.scores.baseline) for spread, task in zip(spreads, tasks, strict=True)]
        stderr = math.hypot(*parts) / len(tasks)
    found: Figures = {"centered_mean": mean, "centered_mean_stderr": stderr}
    return {"core": mean, "core_stderr": stderr, **found} if len(tasks) == len(TASKS) else found
