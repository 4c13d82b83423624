"""POST /v1/chat/completions. In: its body; out: a prompt, and the answer's parts in OpenAI's form."""

import asyncio
from collections.abc import Iterator
from typing import Any

from regpt2.base.errors import DataError
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import SYSTEM, USER, Message, check, special_ids
from regpt2.data.tokenizer import valid_text
from regpt2.sampling.batching.engine import Event, Piece
from regpt2.sampling.chat.conversation import fitting
from regpt2.sampling.writing import Request
from regpt2.serving.api.asking import (
    MOST_LOGPROBS,
    MOST_NEW,
    SHARED,
    Ask,
    choice_of,
    n_of,
    require_short,
    require_small,
    seed_of,
    served_by,
    stops_of,
    stream_of,
    too_long,
)
from regpt2.serving.api.errors import ApiError
from regpt2.serving.api.fields import Fields
from regpt2.serving.api.tokens import chat_logprob
from regpt2.serving.models import Models, Served

ABSENT = {  # what clients send by default, and what cannot be had
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
KNOWN = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", *ABSENT)
OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls")  # null in an answer that is sent back
MOST_MESSAGES = 1024

Choice = dict[str, Any]


class ChatCompletions:
    """One answer to write, n times, and its form."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, ask: Ask) -> None:
        self.ask, self.request = ask, ask.requests[0]
        self.tokenizer = ask.served.tokenizer
        self._ends = {*self.request.stop_ids, self.tokenizer.eot}
        self._texts = [_Trimmed() for _ in range(self.request.n)]

    def first(self) -> Iterator[Choice]:
        """The role of each choice."""
        for index in range(self.request.n):
            yield self._choice(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def of(self, number: int, event: Event) -> Iterator[Choice]:
        """What an event adds; the reason for the end comes alone."""
        if not isinstance(event, Piece):
            return
        text = self._texts[event.index].add(event.text)
        yield self._choice(event.index, {"content": text}, self._logprobs(event), None)
        if event.finish_reason is not None:
            reason = "stop" if event.finish_reason == "end_of_text" else event.finish_reason
            yield self._choice(event.index, {}, None, reason)

    def merged(self, choices: list[Choice]) -> list[Choice]:
        """The parts as whole choices."""
        n = self.request.n
        texts, kept, reasons = [list[str]() for _ in range(n)], [list[Choice]() for _ in range(n)], [""] * n
        for part in choices:
            index, logprobs = part["index"], part["logprobs"]
            texts[index].append(part["delta"].get("content", ""))
            kept[index] += logprobs["content"] if logprobs else []
            reasons[index] = part["finish_reason"]
        return [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
                "logprobs": None if self.request.logprobs is None else {"content": kept[index], "refusal": None},
                "finish_reason": reasons[index],
            }
            for index in range(n)
        ]

    def _logprobs(self, piece: Piece) -> Choice | None:
        """Of the tokens of the text: the end of the turn is none."""
        n_top = self.request.logprobs
        if n_top is None:
            return None
        kept = [one for one in piece.logprobs if one.token not in self._ends]
        return {"content": [chat_logprob(self.tokenizer, one, n_top) for one in kept], "refusal": None}

    def _choice(self, index: int, delta: Choice, logprobs: Choice | None, reason: str | None) -> Choice:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class _Trimmed:
    """A text without white space around it, piece by piece: what may be at its end waits for what follows."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def add(self, piece: str) -> str:
        """What is certain now."""
        text = self._held + piece if self._begun else piece.lstrip()
        kept = text.rstrip()
        self._begun = self._begun or bool(kept)
        self._held = text[len(kept) :] if self._begun else ""
        return kept


async def read_chat(body: dict[str, object], models: Models) -> ChatCompletions:
    """What a body asks for.

    Raises:
        ApiError: a field is wrong, the model does not chat, or the last message does not fit.
    """
    fields = Fields(body, KNOWN)
    default = next((one for one in models.values() if one.chats), None)  # another than that of /v1/completions
    served = default if default is not None and fields.text("model") is None else served_by(fields, models)
    tokenizer = _chat_tokenizer(served)
    for name, neutral in ABSENT.items():
        fields.only(name, *neutral, why="this server writes text, and stores nothing")
    fields.text("user")
    stream, include_usage = stream_of(fields)
    n, n_top, asked = n_of(fields, served), _n_top(fields), _most_new(fields)
    choice, seed, stop = choice_of(fields), seed_of(fields), stops_of(fields)
    messages = _messages(fields)
    for one in messages[-1:] + [one for one in messages[:1] if one.role == SYSTEM]:
        require_short(served, one.content)
    _, ids = await asyncio.to_thread(fitting, messages, tokenizer, served.context, asked)
    room = served.context - len(ids)
    if room < 1:
        raise too_long(served, f"your last message has {len(ids):,} tokens with the marks of turns", "messages")
    special = special_ids(tokenizer)
    assert special is not None, "_chat_tokenizer has checked it"
    start, end = special
    request = Request(
        tuple(ids),
        room if asked is None else min(asked, room),
        n,
        choice,
        seed,
        stop,
        stop_ids=(end,),
        never=(start,),  # a message cannot begin within an answer
        logprobs=None if n_top is None else min(n_top, tokenizer.vocab_size),
    )
    return ChatCompletions(require_small(Ask(served, (request,), stream, include_usage)))


def _chat_tokenizer(served: Served) -> AddedTokens:
    if not served.chats or not isinstance(served.tokenizer, AddedTokens):
        message = (
            f"The model {served.name!r:.80} does not chat: it has seen no conversations. `regpt2 prepare chat` makes "
            "data to train one that does. /v1/completions continues a text with any model."
        )
        raise ApiError(400, message, param="model", code="model_does_not_chat")
    return served.tokenizer


def _n_top(fields: Fields) -> int | None:
    """How many of the likeliest tokens to tell; None: no log-probabilities."""
    wanted, n_top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if n_top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    return (n_top or 0) if wanted else None


def _most_new(fields: Fields) -> int | None:
    """Most tokens of an answer, by the new name or the old; None: as many as fit."""
    old, new = (fields.whole(name, 1, MOST_NEW) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        message = f"max_tokens = {old} and max_completion_tokens = {new} are the same limit; give one of them."
        raise ApiError(400, message, param="max_tokens")
    return old if new is None else new


def _messages(fields: Fields) -> list[Message]:
    """A conversation that ends with a message of the user."""
    value = fields.get("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        message = f"messages must be a list of 1 to {MOST_MESSAGES:,} objects with role and content."
        raise ApiError(400, message, param="messages")
    messages = [_message(one, f"messages.{number}.") for number, one in enumerate(value)]
    try:
        check(messages)
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from None
    if messages[-1].role != USER:
        raise ApiError(400, "The last message is an answer already; one of the user must come last.", param="messages")
    return messages


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise ApiError(400, f"{place[:-1]} is no object with role and content.", param=place[:-1])
    fields = Fields(value, ("role", "content", "name", *OF_ANSWERS), place)
    for name in OF_ANSWERS:
        fields.only(name, [], "", why="a message is text")
    fields.text("name")
    role, content = fields.text("role"), fields.get("content")
    if role is None:
        raise ApiError(400, f"{place}role is missing.", param=f"{place}role")
    if isinstance(content, list):
        content = "\n".join(_part(one, f"{place}content.{number}.") for number, one in enumerate(content))
    if not isinstance(content, str):
        message = f'{place}content must be a text, or a list of {{"type": "text", "text": ...}}.'
        raise ApiError(400, message, param=f"{place}content")
    return Message(role, valid_text(content))


def _part(value: object, place: str) -> str:
    """The text of a part of a content."""
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise ApiError(
            400, f'{place[:-1]} must be {{"type": "text", "text": ...}}: models read text alone.', place[:-1]
        )
    return str(Fields(value, ("type", "text"), place).text("text"))
