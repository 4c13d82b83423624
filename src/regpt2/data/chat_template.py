"""A conversation as one text. In: messages, and a tokenizer with two added tokens; out: text, or ids and which count.

The form is ChatML's. In ids a conversation is `<|endoftext|>`, and then for each message `<|im_start|>`, the ids of its
role and a line end, the ids of its content, `<|im_end|>`, and the ids of a line end:

    <|endoftext|><|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

The prompt for an answer ends after `<|im_start|>assistant` and its line end, so it always begins the ids of the
conversation with its answer. White space around a content is removed. That also keeps the ids those of other programs,
which encode a role and its content in one: GPT-2's pattern splits behind the line end unless white space follows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regpt2.base.byte_level.merges import END_OF_TEXT
from regpt2.base.errors import DataError, did_you_mean
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import Tokenizer

START, END = SPECIAL = ("<|im_start|>", "<|im_end|>")
ROLES = SYSTEM, USER, ASSISTANT = ("system", "user", "assistant")

# Jinja, for transformers and llama.cpp. Only what every version of both can do; it does not check the order of roles.
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant' + '\n' -}}"
    "{%- endif -%}"
)


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: str
    """system, user or assistant."""
    content: str


def messages_of(value: Any) -> tuple[Message, ...]:
    """Messages from a list of objects with `role` and `content`, as JSON has them; other keys are ignored.

    Raises:
        DataError: it is no such list, or not a conversation (see `check`).
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"messages are a {type(value).__name__}, expected a list of objects with role and content.")
    messages = []
    for number, one in enumerate(value, start=1):
        role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"message {number} is {one!r:.80}, expected an object with the texts 'role' and 'content'.")
        messages.append(Message(role, content))
    check(messages)
    return tuple(messages)


def check(messages: Sequence[Message]) -> None:
    """Raise a DataError unless this is a conversation: a system message or none, then user and assistant in turn."""
    if not messages:
        raise DataError("a conversation needs at least one message.")
    if unknown := next((one for one in messages if one.role not in ROLES), None):
        raise DataError(
            f"message {messages.index(unknown) + 1} has the role {unknown.role!r:.80}"
            f"{did_you_mean(unknown.role, ROLES)} Available: {', '.join(ROLES)}."
        )
    n_system = 1 if messages[0].role == SYSTEM else 0
    for number, message in enumerate(messages[n_system:], start=n_system):
        expected = (USER, ASSISTANT)[(number - n_system) % 2]
        if message.role != expected:
            raise DataError(
                f"message {number + 1} is of the role {message.role!r}, expected {expected!r}: a system message may "
                "come first and nowhere else, then user and assistant take turns, and the user begins."
            )
    if len(messages) == n_system:
        raise DataError("the conversation has only a system message; a message of the user must follow it.")


def special_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of `<|im_start|>` and `<|im_end|>`; None where the tokenizer lacks one."""
    added = getattr(tokenizer, "added", ())
    if not set(SPECIAL) <= set(added) or not isinstance(tokenizer, AddedTokens):
        return None
    first = tokenizer.base.vocab_size
    return first + added.index(START), first + added.index(END)


def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The conversation as text, as TEMPLATE gives it: with `<|endoftext|>` in front.

    Raises:
        DataError: see `check`.
    """
    check(messages)
    turns = (f"{START}{one.role}\n{one.content.strip()}{END}\n" for one in messages)
    return END_OF_TEXT + "".join(turns) + (f"{START}{ASSISTANT}\n" if add_generation_prompt else "")


def encode(
    messages: Sequence[Message], tokenizer: AddedTokens, *, add_generation_prompt: bool = False
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """The ids (T,) of a conversation, without the `<|endoftext|>` in front, and which of them count in the loss (T,).

    Those of each answer and its `<|im_end|>` count. What looks like a special token in a content is encoded as text,
    so no message can contain the end of its turn.

    Raises:
        DataError: see `check`; or the tokenizer lacks the two special tokens.
    """
    check(messages)
    pieces, counted = zip(*_pieces(messages, tokenizer, add_generation_prompt), strict=True)
    return np.concatenate(pieces, dtype=np.uint16), np.repeat(counted, [len(piece) for piece in pieces])


def prompt_ids(messages: Sequence[Message], tokenizer: AddedTokens) -> list[int]:
    """The ids after which a model writes its answer, `<|endoftext|>` in front: those of `render`'s text.

    Raises:
        DataError: as `encode`.
    """
    ids, _ = encode(messages, tokenizer, add_generation_prompt=True)
    return [tokenizer.start_id, *ids.tolist()]


def _pieces(
    messages: Sequence[Message], tokenizer: AddedTokens, add_generation_prompt: bool
) -> Iterator[tuple[npt.NDArray[np.uint16], bool]]:
    """Ids, and whether they count. The base tokenizer encodes all text: it knows no special tokens."""
    special = special_ids(tokenizer)
    if special is None:
        raise DataError(f"the tokenizer {tokenizer.name!r} has no tokens {' and '.join(SPECIAL)}.")
    start, end = (np.array([token], dtype=np.uint16) for token in special)
    text_ids = tokenizer.base.encode_to_numpy
    for message in messages:
        answers = message.role == ASSISTANT
        yield start, False
        yield text_ids(f"{message.role}\n"), False
        yield text_ids(message.content.strip()), answers
        yield end, answers
        yield text_ids("\n"), False
    if add_generation_prompt:
        yield start, False
        yield text_ids(f"{ASSISTANT}\n"), False
