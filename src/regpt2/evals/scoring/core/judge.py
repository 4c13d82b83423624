"""Right or wrong. In: examples of one of CORE's tasks, and a model; out: for each example, whether the model is right.

Every sequence begins with <|endoftext|>, and of one that is too long the last tokens are kept. The tokens that the
sequences of an example share at the beginning are computed once, if they are the same after the cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.core.prompts import Item, prompts
from regpt2.evals.scoring.core.tasks import Kind, Task
from regpt2.evals.scoring.endings import Question, Scored, score_endings

_AT_ONCE = 2048  # examples; more would pack a little better, and their ids take memory

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A sequence as the model sees it."""

    ids: Ids
    n_cut: int
    """How many tokens before it were left out."""
    n_scored: int
    """How many of its last tokens count."""


def judge(
    context: EvalContext, task: Task, items: Sequence[Item], n: int, context_size: int, tokenizer: Tokenizer
) -> list[bool]:
    """Whether each of the first `n` examples is answered rightly. Every rank calls it, and gets all."""
    right: list[bool] = []
    for first in range(0, n, _AT_ONCE):
        questions: list[Question] = []
        places: list[list[tuple[int, int]]] = []  # of each sequence of an example: its question and ending
        chunk = range(first, min(first + _AT_ONCE, n))
        for i in chunk:
            rows = encoded(tokenizer, prompts(task, items, i))
            found, own = shared(windows(task.kind, rows, context_size))
            places.append([(len(questions) + question, ending) for question, ending in own])
            questions += found
        scored = score_endings(context, f"core.{task.name}", questions)
        right += [_is_right(task.kind, items[i], scored, own) for i, own in zip(chunk, places, strict=True)]
    return right


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text after <|endoftext|>. What the texts share at the beginning is encoded once where it can."""
    cut = tokenizer.last_split(texts[0][: common(texts)])
    start = (tokenizer.start_id, *tokenizer.encode(texts[0][:cut]))
    return [(*start, *tokenizer.encode(text[cut:])) for text in texts]


def windows(kind: Kind, rows: Sequence[Ids], context_size: int) -> list[Window]:
    """The sequences that are scored, at most `context_size` tokens of each, the last one included."""
    if kind == "schema":
        n_last = min(common([row[::-1] for row in rows]), min(map(len, rows)) - 1)
        return [_window(row, n_last, context_size) for row in rows]
    n_first = common(rows)
    # Of a prompt without and with its answer only the latter is scored.
    scored = rows[1:] if kind == "language_modeling" else rows
    return [_window(row, len(row) - n_first, context_size) for row in scored]


def _window(row: Ids, n_scored: int, context_size: int) -> Window:
    ids = row[-context_size:]
    return Window(ids, len(row) - len(ids), min(n_scored, len(ids) - 1))  # nothing predicts the first token


def common(rows: Sequence[Ids] | Sequence[str]) -> int:
    """How many ids, or characters, all rows share at the beginning."""
    first, last = min(rows), max(rows)  # what these two share, all between them share too
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def shared(found: Sequence[Window]) -> tuple[list[Question], list[tuple[int, int]]]:
    """Questions that score these windows, and for each window its question and ending.

    Windows with the same cut and first token become one question. Its context is what they share before the first
    token that counts; the rest of each is an ending, whose first tokens may not count. Equal windows are scored once.
    """
    groups: dict[tuple[int, int], list[Window]] = {}
    places: list[tuple[int, int]] = []
    for window in found:
        group = groups.setdefault((window.n_cut, window.ids[0]), [])
        if window not in group:
            group.append(window)
        places.append((list(groups.values()).index(group), group.index(window)))
    return [_question(group) for group in groups.values()], places


def _question(group: Sequence[Window]) -> Question:
    n = min(common([window.ids for window in group]), *(len(window.ids) - window.n_scored for window in group))
    endings = tuple(window.ids[n:] for window in group)
    return Question(group[0].ids[:n], endings, tuple(len(one.ids) - one.n_scored - n for one in group))


def _is_right(kind: Kind, item: Item, scored: Scored, places: Sequence[tuple[int, int]]) -> bool:
    """By the rule of the task's kind."""
    if kind == "language_modeling":
        return bool(scored.greedy[places[0]])
    means = [_mean(float(scored.nats[place]), int(scored.n_tokens[place])) for place in places]
    return means.index(min(means)) == item.gold  # the first of equals


def _mean(nats: float, n_tokens: int) -> float:
    """NaN for a choice with which all others begin: as in nanochat, it is chosen only where it is the first."""
    return nats / n_tokens if n_tokens else math.nan
