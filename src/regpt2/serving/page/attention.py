"""What every head looks at from one token. In: a served model and a request's body; out: weights as compact JSON."""

import asyncio
import base64
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regpt2.base.errors import Problem, UsageError
from regpt2.exploring.measure import Habit, habits_of, layer_by_layer
from regpt2.serving.api.chat import read_chat
from regpt2.serving.api.errors import ApiError
from regpt2.serving.api.fields import Fields
from regpt2.serving.models import Models, Served

# L layers, H heads, T tokens

# The engine waits while this runs, and with it all who are being answered: as long as for a prompt of as many tokens.
MOST_TOKENS = 256
MOST_CHARACTERS = MOST_IDS = 65_536
KNOWN = ("model", "text", "ids", "position", "head", "messages", "max_tokens")


@dataclass(frozen=True)
class Question:
    """What is asked, checked."""

    ids: tuple[int, ...]
    """The tokens, the last one looks; at most MOST_TOKENS."""
    skipped: int
    """Tokens before them, left out."""
    head: tuple[int, int] | None
    """Layer and head whose whole map is wanted besides."""


async def read_question(fields: Fields, served: Served, models: Models) -> Question:
    """What a body asks.

    Raises:
        ApiError: a field is wrong, or names what the model does not have.
    """
    ids = await _ids(fields, served, models)
    position = fields.whole("position", 0, len(ids) - 1, f": the text has {len(ids):,} tokens")
    ids = ids if position is None else ids[: position + 1]
    seen = ids[-min(MOST_TOKENS, served.context) :]
    return Question(tuple(seen), len(ids) - len(seen), _head(fields, served))


async def _ids(fields: Fields, served: Served, models: Models) -> list[int]:
    """Those of the text; after `messages`, which a chat model read before it wrote the text."""
    text, ids = fields.text("text"), fields.get("ids")
    if (text is None) == (ids is None):
        raise ApiError(400, "Give either text or ids: the tokens up to the one that looks.", param="text")
    if text is None:
        rows = served.tokenizer.vocab_size
        if not isinstance(ids, list) or not 0 < len(ids) <= MOST_IDS or not _all_whole(ids, rows):
            fields.refuse("ids", f"1 to {MOST_IDS:,} token ids from 0 to {rows - 1:,}")
        return ids
    if not 0 < len(text) <= MOST_CHARACTERS:  # to be tokenized at all
        message = f"text has {len(text):,} characters; expected 1 to {MOST_CHARACTERS:,}."
        raise ApiError(400, message, param="text")
    before: tuple[int, ...] = ()
    if fields.get("messages") is not None:
        asked = {name: fields.get(name) for name in ("model", "messages", "max_tokens")}
        before = (await read_chat(asked, models)).ask.requests[0].ids
    try:
        return [*before, *await asyncio.to_thread(served.tokenizer.encode, text)]
    except Problem as problem:  # characters that the model does not know
        raise ApiError(400, str(problem), param="text") from None


def _head(fields: Fields, served: Served) -> tuple[int, int] | None:
    value, config = fields.get("head"), served.loaded.model.config
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not (_all_whole(value[:1], config.n_layer) and _all_whole(value[1:], config.n_head))
    ):
        fields.refuse("head", f"[layer, head], counted from 0: {config.n_layer} layers of {config.n_head} heads")
    return value[0], value[1]


def _all_whole(values: list[object], below: int) -> bool:
    return all(type(value) is int and 0 <= value < below for value in values)


def look(served: Served, question: Question) -> dict[str, object]:
    """The answer. To be called in the engine's thread: a hook on the model must not meet a running step.

    Raises:
        ApiError: the model's attention is not this package's.
    """
    model, head = served.loaded.model, question.head
    ids = torch.tensor(question.ids, device=next(model.parameters()).device)

    def keep(weights: Tensor) -> tuple[Tensor, Tensor | None, list[Habit]]:  # (H, T, T)
        weights = weights.float().cpu()
        return weights[:, -1], None if head is None else weights[head[1]], habits_of(weights[None], question.ids)

    try:
        layers = layer_by_layer(model, ids, keep)
    except UsageError as error:
        raise ApiError(400, f"This model: {error}", code="no_attention_maps") from None
    rows = torch.stack([row for row, _, _ in layers])  # (L, H, T)
    found = {
        "tokens": [served.tokenizer.decode_bytes([one]).decode("utf-8", "backslashreplace") for one in question.ids],
        "skipped": question.skipped,
        "layers": rows.shape[0],
        "heads": rows.shape[1],
        "weights": _packed(rows * 65535, "<u2"),
        "habits": _habits([habits for _, _, habits in layers]),
    }
    if head is not None and (whole := layers[head[0]][1]) is not None:
        found["map"] = _packed(whole.sqrt() * 255, "u1")
    return found


def _packed(values: Tensor, kind: str) -> str:
    """Numbers, rounded to small whole ones, as base64 in order."""
    return base64.b64encode(values.round().numpy().astype(kind).tobytes()).decode()


def _habits(layers: list[list[Habit]]) -> list[dict[str, object]]:
    """For each habit the head of all layers that has it most."""
    best: dict[str, Habit] = {}
    for layer, habits in enumerate(layers):
        for habit in habits:
            if habit.name not in best or habit.share > best[habit.name].share:
                best[habit.name] = replace(habit, layer=layer)
    return [
        {"what": each.what, "layer": each.layer, "head": each.head, "share": each.share, "even": each.even_share}
        for each in best.values()
    ]
