"""Answers of a chat model. In: a loaded model, the messages so far; out: the answer, token by token.

The newest messages that fit are the model's context: a conversation is never refused for its length, only a single
message that leaves no room for an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import SPECIAL, SYSTEM, USER, Message, check, prompt_ids, special_ids
from regpt2.data.tokenizer import StreamDecoder, Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.continue_text import SampleType
from regpt2.sampling.draw import Choice
from regpt2.sampling.generate import generate
from regpt2.sampling.twins.cpu import packed_if_faster

MOST_RESERVED = 256  # tokens kept free for an answer if no number is given; at most a quarter of the context


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a chat model: a line is a message, /help lists the commands. A pipe works as well as a terminal."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a checkpoint, a file or folder of any format; trained on conversations."""
    system: str = ""
    """A system message: what holds for the whole conversation."""
    max_new_tokens: int | None = None
    """Most tokens of an answer. Default: as many as fit."""
    context: int | None = None
    """Most tokens of context, answer included. Default: as many as in training, at most block_size."""
    temperature: float = 1.0
    """Below 1 more predictable, above 1 more random; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0 = from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 42
    """The same seed and messages give the same answers on the same machine."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: SampleType = "fp32"
    """Data type of weights and activations; int8, on a CPU only, applies to the matrix products."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    """Without white space around it, as it is in the next prompt."""
    n_dropped: int
    """Messages that no longer fitted into the context, the oldest."""
    finished: bool
    """False: it was cut at the most tokens allowed, or interrupted."""
    interrupted: bool = False


class Chat:
    """A chat model, ready to answer.

    Raises:
        UsageError: it is no chat model, or an option is out of its range.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: Tokenizer, options: ChatOptions) -> None:
        self.tokenizer, self.options = _chat_tokenizer(loaded, tokenizer), options
        self.context = _context(loaded, options)
        Choice(options.temperature, options.top_k, options.top_p)  # refuses what `answer` would
        self.model = packed_if_faster(loaded.model, self.context, rows=1)  # once, and not for each answer
        self.device = next(loaded.model.parameters()).device
        if not 0 <= options.seed < 2**63:
            raise UsageError(f"seed = {options.seed} must be from 0 to 2**63 - 1.")
        self.generator = torch.Generator(self.device).manual_seed(options.seed)

    def answer(self, messages: Sequence[Message], on_text: Callable[[str], object] = lambda text: None) -> Answer:
        """The answer to a conversation that ends with a message of the user; its text goes to `on_text` as it comes.

        Ctrl-C (KeyboardInterrupt) stops it: what was written by then is the answer.

        Raises:
            UsageError: the last message alone leaves no room, or an option is out of its range.
            DataError: this is no conversation.
            CheckpointError: a weight is not finite.
        """
        check(messages)
        if messages[-1].role != USER:
            raise UsageError("the last message is an answer already; a message of the user must come last.")
        kept, ids = self._fitting(messages)
        room, asked = self.context - len(ids), self.options.max_new_tokens
        writing, interrupted = _Writing(self.tokenizer, on_text), False
        try:
            generate(
                self.model,
                torch.tensor([ids], device=self.device),
                room if asked is None else min(asked, room),
                temperature=self.options.temperature,
                top_k=self.options.top_k,
                top_p=self.options.top_p,
                generator=self.generator,
                stop_id=writing.end,
                never=(*self.tokenizer.textless, writing.start),  # a message cannot begin within an answer
                on_token=writing,
            )
        except _EndOfText:
            pass
        except KeyboardInterrupt:
            interrupted = True
        text = writing.finish()
        return Answer(text.strip(), len(messages) - len(kept), writing.finished, interrupted)

    def _fitting(self, messages: Sequence[Message]) -> tuple[Sequence[Message], list[int]]:
        """What `fitting` gives; a UsageError if that is too long."""
        kept, ids = fitting(messages, self.tokenizer, self.context, self.options.max_new_tokens)
        if len(ids) >= self.context:
            what = "the message and the system message have" if kept[0].role == SYSTEM else "the message has"
            raise UsageError(
                f"{what} {len(ids):,} tokens with the marks of turns, and the context of {self.context:,} "
                "must hold an answer too; write less, or give a larger --context, up to the model's block_size, "
                f"{self.model.config.block_size:,}."
            )
        return kept, ids


def fitting(
    messages: Sequence[Message], tokenizer: AddedTokens, context: int, max_new_tokens: int | None
) -> tuple[Sequence[Message], list[int]]:
    """The system message and the newest turns that leave room for an answer, and the ids of their prompt.

    The last message is kept even if it leaves no room: then there are `context` ids or more.
    """
    most = MOST_RESERVED if max_new_tokens is None else max_new_tokens
    budget = context - min(most, context // 4)
    system, turns = [one for one in messages if one.role == SYSTEM], [one for one in messages if one.role != SYSTEM]
    kept = [*system, turns[-1]]
    ids = prompt_ids(kept, tokenizer)
    for n in range(3, len(turns) + 1, 2):  # with one more question and its answer
        longer = [*system, *turns[-n:]]
        longer_ids = prompt_ids(longer, tokenizer)
        if len(longer_ids) > budget:
            break
        kept, ids = longer, longer_ids
    return kept, ids


def _chat_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer) -> AddedTokens:
    """The tokenizer, if it is a chat model's; a UsageError for any other."""
    if not isinstance(tokenizer, AddedTokens) or special_ids(tokenizer) is None:
        raise UsageError(
            f"{loaded.source} is no chat model: its tokenizer {tokenizer.name!r} lacks the tokens "
            f"{' and '.join(SPECIAL)}, so the model has never seen a conversation. `regpt2 prepare chat` makes data of "
            "conversations, and `regpt2 train chat --init MODEL` trains a model on them. `regpt2 sample` continues a "
            "text with any model."
        )
    return tokenizer


class _EndOfText(Exception):
    """The model drew `<|endoftext|>`: it ends the conversation, and so the answer."""


class _Writing:
    """Takes the ids of an answer as they are drawn, and gives their text on: only whole characters."""

    def __init__(self, tokenizer: AddedTokens, on_text: Callable[[str], object]) -> None:
        special = special_ids(tokenizer)
        assert special is not None, "_chat_tokenizer has checked it"
        self.start, self.end = special
        self.eot, self.on_text, self.decoder = tokenizer.eot, on_text, StreamDecoder(tokenizer)
        self.text, self.finished = "", False

    def __call__(self, new: Tensor) -> None:  # (1,)
        token = int(new)
        self.finished = token in (self.end, self.eot)
        if token == self.eot:
            raise _EndOfText
        if not self.finished:
            self._give(self.decoder.feed(token))

    def finish(self) -> str:
        self._give(self.decoder.end())
        return self.text

    def _give(self, text: str) -> None:
        """Give the text on, without white space at its beginning."""
        text = text if self.text else text.lstrip()
        if text:
            self.text += text
            self.on_text(text)


def _context(loaded: LoadedModel, options: ChatOptions) -> int:
    """The most tokens, prompt and answer together; a UsageError if an option is out of its range."""
    block_size, context = loaded.model.config.block_size, options.context
    if context is not None and not 1 < context <= block_size:
        raise UsageError(f"context = {context} must be from 2 to the model's block_size, {block_size:,}.")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {options.max_new_tokens} must be at least 1.")
    return loaded.model.context_size if context is None else context
