"""POST /v1/completions. In: its body; out: what to write, and its parts in OpenAI's form."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from regpt2.base.errors import Problem
from regpt2.data.tokenizer import valid_text
from regpt2.sampling.batching.engine import Event, Piece, Prompt
from regpt2.sampling.writing import Request
from regpt2.serving.api.asking import (
    MOST_LOGPROBS,
    MOST_NEW,
    SHARED,
    Ask,
    choice_of,
    n_of,
    require_fit,
    require_short,
    require_small,
    seed_of,
    served_by,
    stops_of,
    stream_of,
)
from regpt2.serving.api.errors import ApiError
from regpt2.serving.api.fields import Fields
from regpt2.serving.api.tokens import CompletionLogprobs
from regpt2.serving.models import Models, Served

DEFAULT_NEW = 16  # as at OpenAI
MOST_PROMPTS = 256
KNOWN = (*SHARED, "prompt", "echo", "best_of", "suffix")
PROMPT_FORMS = f"a text, up to {MOST_PROMPTS} texts, a list of token ids, or up to {MOST_PROMPTS} lists of them"

Choice = dict[str, Any]


class Completions:
    """One request to write, and the form of its answer."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, ask: Ask, prompts: list[str], *, echo: bool) -> None:
        self.ask, self.prompts, self.echo = ask, prompts, echo
        self.n, self.n_top = ask.requests[0].n, ask.requests[0].logprobs
        tokenizer, n_top = ask.served.tokenizer, self.n_top or 0
        self._logprobs = [CompletionLogprobs(tokenizer, n_top) for _ in prompts for _ in range(self.n)]

    def first(self) -> Iterator[Choice]:
        """What comes before all tokens."""
        if self.echo and self.n_top is None:
            reason = "length" if self.ask.only_score else None
            for index in range(len(self.prompts) * self.n):
                yield self._choice(index, self.prompts[index // self.n], None, reason)

    def of(self, number: int, event: Event) -> Iterator[Choice]:
        """What an event of a request adds."""
        if isinstance(event, Prompt):
            yield from self._prompt(number, event)
        elif isinstance(event, Piece):
            index = number * self.n + event.index
            kept = None if self.n_top is None else self._logprobs[index].of(event.tokens, event.logprobs)
            reason = "stop" if event.finish_reason == "end_of_text" else event.finish_reason
            yield self._choice(index, event.text, kept, reason)

    def merged(self, choices: list[Choice]) -> list[Choice]:
        """The parts as whole choices."""
        whole: dict[int, Choice] = {}
        texts = [list[str]() for _ in self._logprobs]
        for part in choices:
            index, kept = part["index"], part["logprobs"]
            one = whole.setdefault(index, {**part, "logprobs": None if kept is None else {name: [] for name in kept}})
            one["finish_reason"] = part["finish_reason"]
            texts[index].append(part["text"])
            for name in kept or ():
                one["logprobs"][name] += kept[name]
        return [{**whole[index], "text": "".join(texts[index])} for index in range(len(texts))]

    def _prompt(self, number: int, event: Prompt) -> Iterator[Choice]:
        """The prompt with its scores. One that was empty has an id that is not of its text."""
        text = self.prompts[number]
        ids, scores = (self.ask.requests[number].ids, event.logprobs) if text else ((), ())
        reason = "length" if self.ask.only_score else None
        for index in range(number * self.n, (number + 1) * self.n):
            kept = self._logprobs[index].of(ids, scores)
            self._logprobs[index].end_prompt(text)
            yield self._choice(index, text, kept, reason)

    def _choice(self, index: int, text: str, logprobs: object, reason: str | None) -> Choice:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


async def read_completions(body: dict[str, object], models: Models) -> Completions:
    """What a body asks for.

    Raises:
        ApiError: a field is wrong, or the prompt does not fit.
    """
    fields = Fields(body, KNOWN)
    served = served_by(fields, models)
    fields.only("suffix", "", why="the model writes what follows a prompt, not what fits between two texts")
    fields.text("user")
    stream, include_usage = stream_of(fields)
    echo, n = fields.flag("echo"), n_of(fields, served)
    if fields.whole("best_of", 1, MOST_NEW) not in (None, n):
        raise ApiError(400, f"best_of is supported only where it equals n, {n}.", param="best_of")
    n_top, asked = fields.whole("logprobs", 0, MOST_LOGPROBS), fields.whole("max_tokens", 0, MOST_NEW)
    choice, seed, stop = choice_of(fields), seed_of(fields), stops_of(fields)
    if asked == 0 and not echo:
        raise ApiError(400, "max_tokens = 0 needs echo: true; it must be at least 1 without.", param="max_tokens")
    prompts = await _prompts(fields, served)
    times, requests = Counter[tuple[int, ...]](), []
    for _, ids in prompts:
        n_new = min(DEFAULT_NEW, max(1, served.context - len(ids))) if asked is None else asked
        require_fit(served, len(ids), n_new)
        kept = None if n_top is None else min(n_top, served.tokenizer.vocab_size)
        one = Request(ids, max(1, n_new), n, choice, seed + times[ids] * n, stop, logprobs=kept)
        requests.append(one)
        times[ids] += 1  # a prompt that comes twice is drawn twice
    ask = Ask(
        served,
        tuple(requests),
        stream,
        include_usage,
        score_prompts=echo and n_top is not None,
        only_score=asked == 0,
    )
    return Completions(require_small(ask), [text for text, _ in prompts], echo=echo)


async def _prompts(fields: Fields, served: Served) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of each prompt; an empty text has the id that a text begins with."""
    value = fields.get("prompt")
    found = [""] if value is None else value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        found = [found]
    if not 0 < len(found) <= MOST_PROMPTS:
        fields.refuse("prompt", PROMPT_FORMS)
    if all(isinstance(one, str) for one in found):
        return await asyncio.to_thread(_of_texts, [valid_text(str(one)) for one in found], served)
    return [_of_ids(one, fields, served) for one in found]


def _of_texts(texts: list[str], served: Served) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for text in texts:
        require_short(served, text)
        try:
            ids = served.tokenizer.encode(text) or [served.tokenizer.start_id]
        except Problem as problem:  # characters that the model does not know
            raise ApiError(400, str(problem), param="prompt") from None
        found.append((text, tuple(ids)))
    return found


def _of_ids(value: object, fields: Fields, served: Served) -> tuple[str, tuple[int, ...]]:
    rows = served.tokenizer.vocab_size
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        fields.refuse("prompt", f"{PROMPT_FORMS}, none of them empty")
    bad = next((one for one in value if not 0 <= one < rows), None)
    if bad is not None:
        message = f"prompt has the token id {bad!r:.40}; expected ids from 0 to {rows - 1:,}."
        raise ApiError(400, message, param="prompt")
    require_fit(served, len(value), 0)
    return served.tokenizer.decode(value), tuple(value)
