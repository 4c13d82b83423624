"""CORE on the screen. In: the result of `core`, or of one of its tasks; out: a table beside OpenAI's four GPT-2."""

from collections.abc import Sequence
from typing import Any

from regpt2.evals.scoring.core.tasks import TASKS, Task
from regpt2.references.core import core_scores

_NOTE = (
    "  124M to 1558M: OpenAI's GPT-2, centered, as nanochat scored them. 124M is over whole sets, the others over at\n"
    "  most 1,000 examples a task, so smaller differences from those are noise."
)


def core_table(result: dict[str, Any]) -> str:
    """A row for each task that was measured, the mean over them, and CORE or why there is none."""
    tasks = [task for task in TASKS.values() if task.name in result]
    sizes = [model.rpartition(" ")[2] for model in core_scores().models]
    lines = [f"  {'task':<33}{'shots':>5}  {'accuracy':<17}{'centered':<17}" + "".join(f"{one:>8}" for one in sizes)]
    lines += [_row(task, result) for task in tasks]
    if "tasks" in result:
        means = core_scores().means([task.name for task in tasks])
        whole = len(tasks) == len(TASKS)
        name = "CORE" if whole else f"mean of these {len(tasks)} tasks"
        lines.append(_line(name, "", "", _with_spread(result, "centered_mean"), means))
        if not whole:
            left_out = ", ".join(name for name in TASKS if name not in result)
            lines.append(_line("CORE, all 22 tasks", "", "", "-", core_scores().core))
            lines.append(f"  no data: {left_out}")
    return "\n".join([*lines, _NOTE])


def _row(task: Task, result: dict[str, Any]) -> str:
    centered = f"{result[f'{task.name}_centered']:.4f}"
    published = [task.scores.centered(one) for one in task.scores.accuracy]
    return _line(task.name, str(task.shots), _with_spread(result, task.name), centered, published)


def _line(name: str, shots: str, accuracy: str, centered: str, published: Sequence[float]) -> str:
    return f"  {name:<33}{shots:>5}  {accuracy:<17}{centered:<17}" + "".join(f"{one:>8.3f}" for one in published)


def _with_spread(result: dict[str, Any], metric: str) -> str:
    stderr = result.get(f"{metric}_stderr")
    return f"{result[metric]:.4f}" + ("" if stderr is None else f" +- {stderr:.4f}")
