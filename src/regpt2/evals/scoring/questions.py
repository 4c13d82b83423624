"""Questions out of text. In: a context and its possible endings, as strings; out: their token ids."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring.context import EvalContext, sum_over_ranks
from regpt2.evals.scoring.endings import Question

T = TypeVar("T")


def question(tokenizer: Tokenizer, context: str, endings: Sequence[str]) -> Question:
    """The whole is encoded and cut where the ids of the context alone end, as lm-evaluation-harness does.

    Spaces at the end of the context go to the endings: GPT-2's tokens begin with a space, they do not end with one.
    """
    before = context.rstrip()
    ids = tokenizer.encode(before)
    whole = [tokenizer.encode(context + ending) for ending in endings]
    return Question(ids or [tokenizer.start_id], tuple(each[len(ids) :] for each in whole))


def read_on_all_ranks(context: EvalContext, name: str, read: Callable[[], T]) -> T:
    """What `read` returns. Where it fails on one rank, all raise: none waits for that one in the scoring.

    Raises:
        Exception: what this rank failed with.
        Problem: another rank failed.
    """
    found: list[T] = []

    def read_mine() -> Tensor:
        found.append(read())
        return torch.zeros(1)

    sum_over_ranks(context, name, read_mine, torch.zeros(1))
    return found[0]
