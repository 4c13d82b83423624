"""Multiple choice. In: a file of examples, and how one is worded; out: how often the right choice is the likeliest.

Wording, token split and both accuracies are those of lm-evaluation-harness 0.4, as it judges base models.
"""

import json
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from regpt2.base.errors import DataError
from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import read_text
from regpt2.evals.scoring.endings import score_endings
from regpt2.evals.scoring.questions import question, read_on_all_ranks

ACC = "share of examples whose right choice has the lowest summed loss; zero-shot, as in the EleutherAI harness 0.4"
ACC_NORM = "the same, but each choice's loss is divided by its number of characters"

_MOST_BYTES = 1 << 28  # of text in a packed file

Line = dict[str, Any]
"""A line of a file: a JSON object."""
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """What the model reads, what may follow it (after a space), and the number of the right one."""

    context: str
    choices: Sequence[str]
    gold: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not 0 <= self.gold < len(self.choices):
            raise ValueError(f"right choice {self.gold} of {len(self.choices)}, counted from 0")


def read_examples(path: Path, wording: Callable[[Line], T], fields: str, *, limit: int, member: str = "") -> list[T]:
    """What `wording` makes of each line, a JSON object; of an archive the lines of its `member` are read.

    Args:
        fields: what a line is expected to have, for the message.
        limit: only the first N; 0 = all.

    Raises:
        DataError: the file cannot be read, or a line is something else.
    """
    return examples_in(read_unpacked(path, member), path, wording, fields, limit=limit)


def examples_in(text: str, path: Path, wording: Callable[[Line], T], fields: str, *, limit: int = 0) -> list[T]:
    """The same for the text of a file that is read already."""
    examples = []
    for n, line in enumerate(text.rstrip("\n").split("\n")[: limit or None], start=1):
        try:
            examples.append(wording(json.loads(line)))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, line {n}: {what:.200}; expected {fields}, got {line[:80]!r}.") from None
    return examples


def read_unpacked(path: Path, member: str = "") -> str:
    """The text of a file, packed (.xz) or not, or of one member of an archive.

    Raises:
        DataError: it cannot be read.
    """
    return _unpack(path) if path.suffix == ".xz" else read_text(path, member)


def _unpack(path: Path) -> str:
    try:
        with lzma.open(path) as file:
            return file.read(_MOST_BYTES).decode("utf-8")
    except (lzma.LZMAError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}; fetch it again.") from None


def simple(record: Line, answer: str = "") -> Example | None:
    """The example of a record in the simple layout (`query`, `choices`, `gold`), None if it is in another.

    Args:
        answer: comes between query and choice, unless the query ends with it.
    """
    if "query" not in record:
        return None
    query = record["query"].rstrip()
    query = query if query.endswith(answer.strip()) else query + answer
    return Example(query, [choice.strip() for choice in record["choices"]], int(record["gold"]))


def ai2(record: Line, before: str = "", after: str = "") -> Example:
    """The example of a record of ARC or OpenBookQA, as AI2 or Hugging Face serves them, or in the simple layout."""
    if example := simple(record, after):
        return example
    asked = record["question_stem"] if "question_stem" in record else record["question"]
    choices = record["choices"] if "choices" in record else asked["choices"]
    if isinstance(choices, list):  # AI2: objects of text and label; Hugging Face: an object of two lists
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    stem = asked if isinstance(asked, str) else asked["stem"]
    return Example(f"{before}{stem}{after}", choices["text"], choices["label"].index(record["answerKey"].strip()))


def predictions(nats: Tensor, lengths: Sequence[Sequence[int]] | None = None) -> list[int]:
    """The number of each question's likeliest ending, the first of equals: nats (N, E), as they are or / length."""
    rows = nats.numpy()
    if lengths is None:
        return [int(row.argmin()) for row in rows]
    return [int((row[: len(n)] / np.maximum(n, 1)).argmin()) for row, n in zip(rows, lengths, strict=True)]


def accuracy(metric: str, predicted: Sequence[int], gold: Sequence[int]) -> Figures:
    """How many are right, and the standard error of that (None for a single example)."""
    n = len(gold)
    share = sum(a == b for a, b in zip(predicted, gold, strict=True)) / n
    return {metric: share, f"{metric}_stderr": math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None}


def evaluate_choices(
    context: EvalContext,
    asset: Asset,
    wording: Callable[[Line], Example],
    fields: str,
    *,
    name: str,
    member: str = "",
    norm: bool = True,
) -> Figures:
    """`acc`, with `norm` also `acc_norm`, their standard errors, and `count`; see `read_examples`."""

    def read() -> list[Example]:
        return read_examples(find(asset, name, context.files), wording, fields, limit=context.limit, member=member)

    examples = read_on_all_ranks(context, name, read)
    tokenizer = context.need_tokenizer()
    questions = [question(tokenizer, one.context, [f" {choice}" for choice in one.choices]) for one in examples]
    scored = score_endings(context, name, questions)
    gold = [one.gold for one in examples]
    figures = accuracy("acc", predictions(scored.nats), gold)
    if norm:
        n_characters = [[len(choice) for choice in one.choices] for one in examples]
        figures |= accuracy("acc_norm", predictions(scored.nats, n_characters), gold)
    return {**figures, "count": len(examples)}
