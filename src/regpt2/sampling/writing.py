"""Texts written side by side. In: a model, its tokenizer, prompts and how to continue each; out: rows that grow.

Prompts may differ in length and in every option. What is drawn for one of them depends on its seed, on itself and on
how many continuations it gets, not on the others: each prompt has a generator of its own.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import StreamDecoder, Tokenizer
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.draw import Choice, candidates, drawn, penalized, without
from regpt2.sampling.generate import Rows, banned_ids, require_finite, require_some

# B rows, V = vocab_size, K candidates, N ids with their log-probability

FinishReason = Literal["stop", "length", "end_of_text", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it.

    Raises:
        UsageError: a value is out of its range.
    """

    ids: tuple[int, ...]
    """The prompt."""
    max_new_tokens: int
    """Most tokens to draw."""
    n: int = 1
    """Continuations, drawn together."""
    choice: Choice = field(default_factory=Choice)
    """How a token is drawn."""
    seed: int = 42
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """A text that holds one of these ends before it."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a text, as end of text does."""
    never: tuple[int, ...] = ()
    """Ids that are not drawn, as those without text."""
    logprobs: int | None = None
    """Keep each token's log-probability, and those of the N likeliest; None: none."""

    def __post_init__(self) -> None:
        require_some(self.max_new_tokens)
        if self.n < 1:
            raise UsageError(f"n = {self.n} must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed = {self.seed} must be from 0 to 2**63 - 1.")
        if "" in self.stop:
            raise UsageError("stop = '' is in every text; give at least one character, or leave it out.")


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability in the model's own distribution, before any option changes it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, likeliest first."""


class Row:
    """One continuation while it is written."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text, self.new = "", ""
        """All text so far, and what the last step added to it: whole characters, never a part of a stop text."""
        self.tokens: list[int] = []
        """Every id drawn, with that of end of text, or those of the stop text."""
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._eot, self._decoder, self._held = tokenizer.eot, StreamDecoder(tokenizer), ""

    def cancel(self) -> None:
        """Write no more of it."""
        self.finish_reason = self.finish_reason or "cancelled"

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """The next id. A row that has ended takes none."""
        self.new = ""
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.request.stop_ids:
            self.finish_reason = "stop"
        elif token == self._eot:
            self.finish_reason = "end_of_text"
        elif self._show(self._decoder.feed(token)):
            self.finish_reason = "stop"
            return
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._show(self._decoder.end(), last=True):
            self.finish_reason = "stop"

    def _show(self, piece: str, *, last: bool = False) -> bool:
        """Add text up to what may become a stop text. True if there is a stop text: the row ends before it."""
        held = self._held + piece
        found = [at for stop in self.request.stop if (at := held.find(stop)) >= 0]
        n_held = 0 if last else max((_overlap(held, stop) for stop in self.request.stop), default=0)
        end = min(found, default=len(held) - n_held)
        self.new, self.text, self._held = self.new + held[:end], self.text + held[:end], held[end:]
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@torch.no_grad()
def write(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[Request], *, context: int
) -> Generator[list[Row], None, None]:
    """Continue all prompts in one batch: after each token of theirs the rows, n of each request, in order.

    Each step is the caller's `next`; closing the generator ends all, and `Row.cancel` one. The model's mode is kept.

    Args:
        context: the most ids that a token is drawn after, at most the model's block_size; see `Rows` for longer texts.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    device = next(model.parameters()).device
    written = [Row(request, tokenizer) for request in requests for _ in range(request.n)]
    prompts = [torch.tensor(row.request.ids, device=device) for row in written]
    n_new = max(request.max_new_tokens for request in requests)
    rows = Rows(model, prompts, n_new, context=context)
    pen = _Pen(requests, prompts, model.config.vocab_size, tokenizer.textless)
    most = max((request.logprobs for request in requests if request.logprobs is not None), default=None)
    was_training = model.training
    model.eval()
    try:
        for n in range(n_new):
            logits = rows.logits()  # (B, V)
            if n == 0:
                require_finite(logits)
            new = pen.draw(logits)  # (B,)
            kept = [None] * len(written) if most is None else logprobs_of(logits, new, most)
            rows.append(new)
            for number, (row, token, logprob) in enumerate(zip(written, new.tolist(), kept, strict=True)):
                was_on = row.finish_reason is None
                row.take(token, logprob)
                if was_on and row.finish_reason is not None:
                    rows.end(number)
            yield written
            if all(row.finish_reason is not None for row in written):
                return
    finally:
        model.train(was_training)


class _Pen:
    """Draws the next id of each row, by its own request."""

    def __init__(self, requests: Sequence[Request], prompts: Sequence[Tensor], vocab_size: int, never: Sequence[int]):
        device = prompts[0].device
        self.banned = banned_ids(vocab_size, never, device) if never else None  # (V,)
        ends = accumulate(request.n for request in requests)
        self.parts = [
            (slice(end - request.n, end), request.choice, torch.Generator(device).manual_seed(request.seed))
            for request, end in zip(requests, ends, strict=True)
        ]
        self.barred = [(part[0], one.never) for part, one in zip(self.parts, requests, strict=True) if one.never]
        self.are_alike = len({request.choice for request in requests}) == 1
        self.seen: Tensor | None = None  # (B, V), ids of the prompt or drawn, if a penalty asks for them
        if any(request.choice.repetition_penalty != 1 for request in requests):
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in zip(self.seen, prompts, strict=True):
                row[ids] = True

    def draw(self, logits: Tensor) -> Tensor:  # (B, V) -> (B,)
        logits = without(logits, self.banned, self.barred)
        if self.are_alike:  # the candidates of all rows at once
            p, ids = self._candidates(logits, slice(None), self.parts[0][1])
            new = [drawn(p[rows], None if ids is None else ids[rows], random) for rows, _, random in self.parts]
        else:
            new = [drawn(*self._candidates(logits, rows, choice), random) for rows, choice, random in self.parts]
        drawn_ids = torch.cat(new) if len(new) > 1 else new[0]
        if self.seen is not None:
            self.seen.scatter_(1, drawn_ids[:, None], True)
        return drawn_ids

    def _candidates(self, logits: Tensor, rows: slice, choice: Choice) -> tuple[Tensor, Tensor | None]:
        logits = logits[rows]
        if self.seen is not None and choice.repetition_penalty != 1:
            logits = penalized(logits.float(), self.seen[rows], choice.repetition_penalty)
        return candidates(logits, choice)


def logprobs_of(logits: Tensor, new: Tensor, most: int) -> list[TokenLogprob]:
    """What each row keeps of its new id: from logits (B, V) and ids (B,)."""
    log_p = logits.float().log_softmax(dim=1)  # (B, V)
    top = log_p.topk(most, dim=1)  # two of (B, N)
    rows = zip(new.tolist(), log_p.gather(1, new[:, None])[:, 0].tolist(), *(x.tolist() for x in top), strict=True)
    return [TokenLogprob(token, p, tuple(zip(ids, ps, strict=True))) for token, p, ps, ids in rows]
