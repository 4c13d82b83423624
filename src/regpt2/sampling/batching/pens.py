"""The next id of each row of a batch. In: logits (B, V) and how each row chooses; out: ids (B,), and log-probabilities.

Rows that choose alike share the work. Each row draws with a generator of its own, so its ids depend on its seed alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regpt2.sampling.draw import Choice, candidates, drawn, penalized, without
from regpt2.sampling.writing import Request, TokenLogprob, logprobs_of

# B rows, R rows that choose alike, V = vocab_size, K candidates


class Pen:
    """Draws for one row: continuation `index` of a request draws what its first one would with `seed + index`."""

    def __init__(self, request: Request, index: int, vocab_size: int, device: torch.device) -> None:
        self.choice = _as_it_acts(request.choice)
        self.logprobs, self.never = request.logprobs, request.never
        self.random = torch.Generator(device).manual_seed(request.seed + index)
        self.seen: Tensor | None = None  # (V,), ids of the prompt or drawn, if a penalty asks for them
        if self.choice.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[list(request.ids)] = True


def _as_it_acts(choice: Choice) -> Choice:
    """All greedy choices are one, whatever else they ask for."""
    if choice.temperature == 0 or choice.top_k == 1:
        return Choice(temperature=0, repetition_penalty=choice.repetition_penalty)
    return choice


class Pens:
    """The pens of a batch's rows, in groups that choose alike. Made anew when a row joins, leaves or moves."""

    def __init__(self, pens: Sequence[Pen], banned: Tensor | None, device: torch.device) -> None:
        self.pens, self.banned = pens, banned  # banned: (V,), ids that are never drawn
        alike: dict[Choice, list[int]] = {}
        for row, pen in enumerate(pens):
            alike.setdefault(pen.choice, []).append(row)
        self.groups = [(rows, torch.tensor(rows, device=device)) for rows in alike.values()]
        self.barred = [(row, pen.never) for row, pen in enumerate(pens) if pen.never]
        self.scored = [row for row, pen in enumerate(pens) if pen.logprobs is not None]

    def draw(self, logits: Tensor) -> list[int]:  # (B, V) -> B ids
        logits = without(logits, self.banned, self.barred)
        if len(self.groups) == 1:
            new = self._drawn(logits, self.groups[0][0])
        else:
            new = logits.new_empty(len(self.pens), dtype=torch.int64)  # (B,)
            for rows, index in self.groups:
                new[index] = self._drawn(logits[index], rows)
        ids: list[int] = new.tolist()
        for token, pen in zip(ids, self.pens, strict=True):
            if pen.seen is not None:
                pen.seen[token] = True
        return ids

    def _drawn(self, logits: Tensor, rows: Sequence[int]) -> Tensor:  # (R, V) -> (R,)
        pens = [self.pens[row] for row in rows]
        seen = [pen.seen for pen in pens if pen.seen is not None]
        if seen:
            logits = penalized(logits.float(), torch.stack(seen), pens[0].choice.repetition_penalty)
        p, ids = candidates(logits, pens[0].choice)  # (R, K), and (R, K) or None for all
        if p.shape[1] == 1 and ids is not None:
            return ids[:, 0]
        each = range(len(pens))
        new = [drawn(p[i : i + 1], None if ids is None else ids[i : i + 1], pens[i].random) for i in each]
        return torch.cat(new)

    def logprobs(self, logits: Tensor, new: Sequence[int]) -> list[TokenLogprob | None]:
        """What each row keeps of its new id: from logits (B, V) and B ids."""
        kept: list[TokenLogprob | None] = [None] * len(self.pens)
        if self.scored:
            wanted = [self.pens[row].logprobs or 0 for row in self.scored]
            some = logits[torch.tensor(self.scored, device=logits.device)]  # (R, V)
            ids = torch.tensor([new[row] for row in self.scored], device=logits.device)  # (R,)
            for row, most, one in zip(self.scored, wanted, logprobs_of(some, ids, max(wanted)), strict=True):
                kept[row] = replace(one, top=one.top[:most])
        return kept
