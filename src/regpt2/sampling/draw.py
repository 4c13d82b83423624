"""Logits to the next id. In: logits (B, V) and how to choose; out: the candidates, and one of them for each row.

The order is that of transformers: the repetition penalty on the logits, then temperature, top-k, top-p and min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regpt2.base.errors import UsageError

# B sequences, V = vocab_size, K candidates

_SMALL = 1e-3  # logits are below 1e35
_LEAST = torch.finfo(torch.float32).tiny  # a smaller divisor may be zero on the device


@dataclass(frozen=True)
class Choice:
    """How an id is chosen among all.

    Raises:
        UsageError: a value is out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0, or a value near 0, takes the likeliest id."""
    top_k: int = 50
    """Only the k likeliest ids; 0 = all."""
    top_p: float = 1.0
    """Of those, the fewest that together have this probability (nucleus), at least one; above 0, 1 = all."""
    min_p: float = 0.0
    """Of those, the ids with at least this part of the likeliest one's probability (arXiv:2407.01082); 0 = all."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of ids that a row has already, multiplies those below (arXiv:1909.05858); 1 = off."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature = {self.temperature} must be 0 (always the likeliest token) or more; 1 is usual."
            )
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} must be 0 (all tokens) or more; 50 is usual.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be above 0 and at most 1 (all tokens).")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p = {self.min_p} must be from 0 (all tokens) to 1; 0.05 to 0.1 is usual.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(
                f"repetition_penalty = {self.repetition_penalty} must be above 0; 1 is none, 1.1 to 1.3 is usual."
            )


def without(logits: Tensor, banned: Tensor | None, barred: Sequence[tuple[int | slice, Sequence[int]]]) -> Tensor:
    """Logits (B, V) with -inf for ids that are drawn for no row, `banned` (V,), and those `barred` for some rows.

    The given logits stay as they are: log-probabilities are those of the model.
    """
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    if barred:
        logits = logits.clone()
    for rows, never in barred:
        logits[rows, list(never)] = -torch.inf
    return logits


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V), lower for `seen` ids (B, V) if the penalty is above 1 (CTRL, arXiv:1909.05858, section 4.1).

    A logit below 0 is multiplied, as in transformers; divided, as in CTRL's formula, it would rise.
    """
    return logits.where(~seen, torch.where(logits < 0, logits * penalty, logits / penalty))


def candidates(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor | None]:
    """Weights (B, K) to draw by, and the ids (B, K) that they belong to, or None for all ids in their order.

    The weights need not sum to one. A temperature of 0 gives one candidate, whose weight has no meaning.
    """
    logits = logits.float()  # in bf16 torch's argmax takes four times as long on a CPU
    temperature, top_k = choice.temperature, choice.top_k
    if temperature == 0 or top_k == 1:
        ids = logits.argmax(dim=1, keepdim=True)  # (B, 1)
        return ids, ids
    if temperature < _SMALL:  # quotients may be infinite: 0 for the likeliest and -inf for others give no NaN
        logits, temperature = logits - logits.amax(dim=1, keepdim=True), max(temperature, _LEAST)
    logits = logits / temperature
    if top_k == 0 and choice.top_p == 1 and choice.min_p == 0:
        return logits.softmax(dim=1), None
    logits, ids = logits.topk(min(top_k, logits.shape[1]) or logits.shape[1], dim=1)  # two of (B, K), likeliest first
    p = logits.softmax(dim=1)  # (B, K)
    if choice.top_p < 1:
        likelier = p.cumsum(dim=1) - p  # the probability of all that come before
        p = p.masked_fill(likelier >= choice.top_p, 0.0)  # the first has none before it, so it stays
    if choice.min_p > 0:
        p = p.masked_fill(p < choice.min_p * p[:, :1], 0.0)
    return p, ids


def drawn(p: Tensor, ids: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """One of the ids for each row: (B, K), (B, K) -> (B,). A single candidate takes no random number."""
    if p.shape[1] == 1 and ids is not None:
        return ids[:, 0]
    choice = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


def next_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one id for each row: logits (B, V) -> ids (B,); see `Choice`. The generator is torch's own if None."""
    return drawn(*candidates(logits, Choice(temperature, top_k, top_p)), generator)
