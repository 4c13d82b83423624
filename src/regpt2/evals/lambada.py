"""LAMBADA. In: a model and passages; out: how often, and how well, it predicts the last word of each."""

import json
import math
from collections.abc import Sequence

from regpt2.base.errors import DataError
from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import read_text
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.evals.scoring.questions import question, read_on_all_ranks

DESCRIPTION = "LAMBADA, OpenAI's file: the last word of 5,153 passages, accuracy and perplexity"
PROTOCOLS = {
    "perplexity": "exp(mean nats of the last word over all its tokens); EleutherAI harness 0.4, lambada_openai",
    "accuracy": "every token of the last word the likeliest; lambada_openai; the paper's has a stop-word filter",
}
ASSETS = (
    Asset(
        "lambada_test.jsonl",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        licence="CC BY 4.0",
    ),
)


def evaluate(context: EvalContext) -> Figures:
    """`perplexity` and `accuracy`, each with its standard error, and `count` passages."""
    questions = read_on_all_ranks(context, "lambada", lambda: _questions(context))
    scored = score_endings(context, "lambada", questions)
    nats, right = scored.nats[:, 0], scored.greedy[:, 0].double()
    n = len(questions)
    perplexity = math.exp(min(float(nats.mean()), 700.0))
    spread = n > 1  # of a single passage nothing is known about the spread
    return {
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * float(nats.std()) / math.sqrt(n) if spread else None,
        "accuracy": float(right.mean()),
        "accuracy_stderr": float(right.std()) / math.sqrt(n) if spread else None,
        "count": n,
    }


def _questions(context: EvalContext) -> Sequence[Question]:
    path = find(ASSETS[0], "lambada", context.files)
    lines = read_text(path, ASSETS[0].name).rstrip("\n").split("\n")[: context.limit or None]
    return [_question(context, line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]


def _question(context: EvalContext, line: str, where: str) -> Question:
    """The passage up to its last space, and the word after it."""
    try:
        before, space, word = json.loads(line)["text"].rpartition(" ")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        before = ""
    if not before:
        raise DataError(f'{where}: expected {{"text": "a passage of several words"}}, got {line[:80]!r}.')
    return question(context.need_tokenizer(), before, [space + word])
