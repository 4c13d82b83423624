"""What every head looks at from one token. In: a served model and a text; out: weights as compact JSON."""

import base64
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.exploring.measure import Habit, habits_of, layer_by_layer
from regpt2.serving.models import Served

# L layers, H heads, T tokens

# The engine waits while this runs, and with it all who are being answered: with 256 tokens 0.2 s in GPT-2's 124M
# model on two cores, with 1,024 of them 2 s.
MOST_TOKENS = 256
MOST_CHARACTERS = 32_768  # to be encoded at all

Found = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """From which token, and which head's whole map besides."""

    text: str | None
    ids: tuple[int, ...]
    """Instead of a text."""
    position: int | None
    """The token that looks; None: the last."""
    head: tuple[int, int] | None
    """Layer and head."""


def read_question(body: Found) -> Question:
    """The body of a request, checked but for what depends on the model.

    Raises:
        UsageError: a field is missing, unknown, or not of its type.
    """
    if unknown := sorted(body.keys() - {"model", "text", "ids", "position", "head"}):
        raise UsageError(f"{unknown[0]!r:.80} is not a field; expected model, text or ids, position, head.")
    text, ids, position, head = (body.get(key) for key in ("text", "ids", "position", "head"))
    if (text is None) == (ids is None):
        raise UsageError("give either text or ids, the tokens that come before and the one that looks.")
    if text is not None and not (isinstance(text, str) and 0 < len(text) <= MOST_CHARACTERS):
        raise UsageError(f"text must be a string of 1 to {MOST_CHARACTERS:,} characters.")
    if ids is not None and not (_are_whole(ids) and 0 < len(ids) <= MOST_CHARACTERS):
        raise UsageError(f"ids must be a list of 1 to {MOST_CHARACTERS:,} token ids.")
    if position is not None and not _are_whole([position]):
        raise UsageError(f"position = {position!r:.80} must be the index of a token; leave it out for the last.")
    if head is not None and not (_are_whole(head) and len(head) == 2):
        raise UsageError(f"head = {head!r:.80} must be [layer, head].")
    return Question(text, tuple(ids or ()), position, None if head is None else (head[0], head[1]))


def _are_whole(values: object) -> bool:
    """Is it a list of whole numbers, 0 or more?"""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def look(served: Served, question: Question) -> Found:
    """The answer. To be called in the engine's thread: a hook on the model must not meet a running step.

    Only the last tokens up to the one that looks are computed, as many as fit: the model's context, or MOST_TOKENS.

    Raises:
        UsageError: the model has no such token, position or head, or its attention is not this package's.
    """
    model, config = served.loaded.model, served.loaded.model.config
    ids = _ids(served, question)
    seen = ids[-min(MOST_TOKENS, served.context) :]
    if question.head is not None and not (question.head[0] < config.n_layer and question.head[1] < config.n_head):
        raise UsageError(
            f"head = {list(question.head)} is not in this model of {config.n_layer} layers with {config.n_head} heads."
        )
    device = next(model.parameters()).device

    def keep(weights: Tensor) -> tuple[Tensor, Tensor | None, list[Habit]]:  # (H, T, T)
        weights = weights.float().cpu()
        whole = None if question.head is None else weights[question.head[1]]
        return weights[:, -1], whole, habits_of(weights[None], seen)

    layers = layer_by_layer(model, torch.tensor(seen, device=device), keep)
    rows = torch.stack([row for row, _, _ in layers])  # (L, H, T)
    found = {
        "tokens": [served.tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace") for token in seen],
        "skipped": len(ids) - len(seen),
        "layers": config.n_layer,
        "heads": config.n_head,
        "weights": _packed((rows * 65535).round().to(torch.int32), "<u2"),
        "habits": _habits([habits for _, _, habits in layers]),
    }
    if question.head is not None and (whole := layers[question.head[0]][1]) is not None:
        found["map"] = _packed((whole.sqrt() * 255).round().to(torch.int32), "u1")
    return found


def _ids(served: Served, question: Question) -> list[int]:
    """The tokens up to the one that looks."""
    ids = list(question.ids) if question.text is None else served.tokenizer.encode(question.text)
    vocab_size = served.loaded.model.config.vocab_size
    if (largest := max(ids)) >= vocab_size:
        raise UsageError(f"ids: {largest:,} is not below {vocab_size:,}, the size of the model's vocabulary.")
    position = len(ids) - 1 if question.position is None else question.position
    if position >= len(ids):
        raise UsageError(f"position = {position:,} must be below {len(ids):,}, the number of tokens of the text.")
    return ids[: position + 1]


def _packed(values: Tensor, kind: str) -> str:
    """Small whole numbers as base64, in order."""
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def _habits(layers: list[list[Habit]]) -> list[Found]:
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


def parsed(data: bytes) -> Found:
    """A body as an object.

    Raises:
        UsageError: it is not JSON, or not an object.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise UsageError("the body is not JSON; expected an object with model and text.") from None
    if not isinstance(body, dict):
        raise UsageError(f"the body is a JSON {type(body).__name__}, expected an object with model and text.")
    return body
