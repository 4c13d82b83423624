"""Prompts whose continuations are known. In: a model; out: requests, each with the text that `regpt2 sample` writes."""

import random
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.continue_text import SampleOptions, completions

LEAST_MARGIN = 1e-3  # nats between the two likeliest tokens; below it rounding may decide, as docs/sampling.md says
REASONS = {"length": "length", "stop": "stop", "end_of_text": "stop"}  # ours: OpenAI's


@dataclass(frozen=True)
class Known:
    """A request, and what its answer must be."""

    body: dict[str, Any]
    """In OpenAI's form, without `model` and `stream`."""
    text: str
    finish_reason: str
    is_greedy: bool
    """A drawn text may differ where rounding moves a probability over the number that was drawn."""


def prose() -> str:
    """A text that every Python has."""
    return Path(textwrap.__file__).read_text()


def known_texts(
    loaded: LoadedModel, tokenizer: Tokenizer, n: int, *, most_new: int = 64, context: int | None = None, seed: int = 0
) -> list[Known]:
    """`n` requests of random lengths and options; two of three are greedy, a third of those ends at a stop text."""
    chosen, ids = random.Random(seed), tokenizer.encode(prose())
    context = context or loaded.model.context_size
    found: list[Known] = []
    while len(found) < n:
        length = 1 + int(chosen.random() ** 2 * (context // 2 - 1))  # many short ones, some long ones
        at = chosen.randrange(len(ids) - length)
        prompt = tokenizer.decode(ids[at : at + length])
        room = context - len(tokenizer.encode(prompt))
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": chosen.randint(1, min(room, most_new))}
        if len(found) % 3 == 2:
            body |= {"temperature": chosen.choice([0.7, 1.0, 1.3]), "top_p": chosen.choice([0.8, 0.95, 1.0])}
            body |= {"seed": chosen.randrange(1 << 31)}
            found.append(_drawn(loaded, tokenizer, body))
        elif known := _greedy(loaded, tokenizer, body, chosen):
            found.append(known)
    return found


def _drawn(loaded: LoadedModel, tokenizer: Tokenizer, body: dict[str, Any]) -> Known:
    options = SampleOptions("", max_new_tokens=body["max_tokens"], top_k=0, top_p=body["top_p"], seed=body["seed"])
    (made,) = completions(replace(options, temperature=body["temperature"]), loaded, tokenizer, [body["prompt"]])
    return Known(body, made.text, REASONS[made.finish_reason], is_greedy=False)


def _greedy(loaded: LoadedModel, tokenizer: Tokenizer, body: dict[str, Any], chosen: random.Random) -> Known | None:
    """None: two tokens were nearly as likely somewhere."""
    options = SampleOptions("", temperature=0, max_new_tokens=body["max_tokens"], logprobs=2)
    (made,) = completions(options, loaded, tokenizer, [body["prompt"]])
    assert made.logprobs is not None
    if min(token.top[0][1] - token.top[1][1] for token in made.logprobs) < LEAST_MARGIN:
        return None
    body = body | {"temperature": 0}
    if chosen.random() < 1 / 3 and len(made.text) > 4:
        at = chosen.randrange(len(made.text) // 2, len(made.text) - 2)
        body["stop"] = [made.text[at : at + chosen.randint(1, 3)], "not in any text"]
        (made,) = completions(replace(options, stop=tuple(body["stop"])), loaded, tokenizer, [body["prompt"]])
    return Known(body, made.text, REASONS[made.finish_reason], is_greedy=True)
