"""Prompts of CORE's tasks. In: a task's file; out: its examples in their order, and each one's prompts as text.

Order, shots and wording are those of nanochat, so that the figures can be compared with its scores of OpenAI's models:
the examples are shuffled by `random.Random(1337)`, and example i draws its shots from all others by
`random.Random(1234 + i)`. Shots come from the whole set, also where only some of the examples are scored.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt2.base.console import warn
from regpt2.base.errors import DataError
from regpt2.evals.scoring.choices import Line, examples_in, read_unpacked
from regpt2.evals.scoring.core.tasks import Task
from regpt2.evals.scoring.scenes import harness_scene

ORDER_SEED = 1337
SHOTS_SEED = 1234
FIELDS = {
    "multiple_choice": "query, choices, gold",
    "schema": "context_options, continuation, gold",
    "language_modeling": "context, continuation",
}


@dataclass(frozen=True)
class Item:
    """An example: its question with each answer, as text."""

    wholes: tuple[str, ...]
    """Question, delimiter and answer: with each choice, in each context, or with the only answer."""
    gold: int
    """Which of them is right."""
    asked: str = ""
    """Language modeling: question and delimiter, without the answer."""

    def __post_init__(self) -> None:
        if not 0 <= self.gold < len(self.wholes):
            raise ValueError(f"right choice {self.gold} of {len(self.wholes)}, counted from 0")


def read_items(task: Task, path: Path, *, is_main: bool = True) -> list[Item]:
    """The examples of a task's file in CORE's order; `is_main`: warn where the file is not the pinned one.

    Raises:
        DataError: it cannot be read, a line is something else, or there are too few examples for the shots.
    """
    text = read_unpacked(path)
    if is_main and not task.asset.is_pinned(text.encode()):
        warn(f"core: {path} is not the pinned file of {task.name}: its figures are not comparable with published ones.")
    fields = FIELDS[task.kind] + (" (or activity_label, ctx_a, ctx_b, endings, label)" if task.asset.of else "")
    items = examples_in(text, path, lambda record: item_of(task, record), fields)
    if len(items) <= task.shots:
        raise DataError(f"{path} has {len(items):,} examples; {task.name} needs {task.shots + 1} for its shots.")
    return [items[i] for i in order(len(items))]


def item_of(task: Task, record: Line) -> Item:
    """A line of the file, worded."""
    delimiter = task.delimiter
    if task.kind == "language_modeling":
        asked = record["context"].strip() + delimiter
        return Item((asked + record["continuation"],), 0, asked)
    if task.kind == "schema":
        ending = delimiter + record["continuation"]
        return Item(tuple(one + ending for one in record["context_options"]), int(record["gold"]))
    if "endings" in record:  # HellaSwag, as its authors publish it
        scene = harness_scene(record)
        return Item(tuple(scene.context + delimiter + one for one in scene.choices), scene.gold)
    return Item(tuple(record["query"] + delimiter + one for one in record["choices"]), int(record["gold"]))


def order(n: int) -> list[int]:
    """Places in the file of the first, second, ... example of `n`."""
    places = list(range(n))
    random.Random(ORDER_SEED).shuffle(places)
    return places


def shots_of(i: int, n: int, shots: int) -> list[int]:
    """Which of `n` examples, in CORE's order, precede example `i`: a sample of all others, in the order drawn."""
    drawn = random.Random(SHOTS_SEED + i).sample(range(n - 1), shots)
    return [j + (j >= i) for j in drawn]


def prompts(task: Task, items: Sequence[Item], i: int) -> list[str]:
    """The texts of example `i`: one for each choice or context; of language modeling without and with the answer."""
    shown = (items[j] for j in shots_of(i, len(items), task.shots))
    before = "".join(f"{shot.wholes[shot.gold]}\n\n" for shot in shown)
    texts = [before + whole for whole in items[i].wholes]
    if task.kind == "language_modeling":
        # GPT-2's tokens begin with their space: one at the end would make the prompt no beginning of the whole.
        return [(before + items[i].asked).strip(), *texts]
    return texts
