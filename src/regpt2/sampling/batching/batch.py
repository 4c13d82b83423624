"""A running batch. In: requests, first come first served; out: their events, a token of every row at each turn.

A turn computes a few ids of prompts, then one token for each row. So a long prompt stops nobody for long.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.data.tokenizer import Tokenizer
from regpt2.sampling.batching.events import Piece, Prompt, Ticket
from regpt2.sampling.batching.pens import Pen, Pens
from regpt2.sampling.batching.slots import Slots
from regpt2.sampling.generate import banned_ids, kept_of, require_finite
from regpt2.sampling.writing import Request, Row, TokenLogprob, logprobs_of

# B rows, T tokens, C = n_embd, V = vocab_size

# Ids of prompts in a turn. On a CPU prompts of a 124M model are computed at their full speed from 64 on, and the rows
# wait for two steps' time; with 128 they wait twice as long. A GPU takes more at once: 512 was vLLM's first choice.
CHUNK = {"cpu": 64}
_CHUNK_ELSEWHERE = 512
_CHUNKS_IF_NONE_RUNS = 4  # so requests that come together begin together; without a mask a step takes 15 % less


class Job:
    """A request that was taken, and how far it is."""

    def __init__(
        self, request: Request, ticket: Ticket, context: int, *, scores_prompt: bool = False, writes: bool = True
    ) -> None:
        self.request, self.ticket = request, ticket
        self.ids = request.ids[-context:]
        self.scores_prompt = scores_prompt
        self.n_left = request.n if writes else 0  # continuations that are yet to begin
        self.logits: Tensor | None = None  # (1, V) after the prompt, once it is computed

    @property
    def is_begun(self) -> bool:
        """Nothing of it is left to begin."""
        return self.n_left == 0 or self.ticket.is_over


class Growing:
    """A continuation while it is written."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer, pen: Pen) -> None:
        self.job, self.index, self.pen = job, index, pen
        self.row = Row(job.request, tokenizer)
        self.n_cached = len(job.ids)  # tokens whose keys its slot has: all but the last
        self.is_of_prompt = True  # its slot began with the whole prompt

    @property
    def is_over(self) -> bool:
        """Complete, or nobody wants it."""
        return self.row.finish_reason is not None or self.job.ticket.is_over

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """The next id; its listener gets the piece."""
        self.row.take(token, logprob)
        kept = () if logprob is None else (logprob,)
        self.job.ticket.tell(Piece(self.index, self.row.new, (token,), kept, self.row.finish_reason))

    def last_ids(self, n: int) -> list[int]:
        """The last of prompt and continuation."""
        return [*self.job.ids, *self.row.tokens][-n:]


@dataclass
class Preparation:
    """Ids that are computed part by part, for a new request or for a continuation whose context was full."""

    ids: Tensor  # (T,)
    owner: Job | Growing
    scored: list[TokenLogprob | None] | None
    n_done: int = 0

    @property
    def ticket(self) -> Ticket:
        return self.owner.ticket if isinstance(self.owner, Job) else self.owner.job.ticket


class Batch:
    """The rows that are written now, and the prompts that are to join them. For one thread."""

    def __init__(self, slots: Slots, tokenizer: Tokenizer, take_job: Callable[[], Job | None]) -> None:
        self.slots, self.tokenizer, self.take_job = slots, tokenizer, take_job
        self.n_drawn = 0
        self.rows: list[Growing] = []  # in the order of their slots
        self.full: deque[Growing] = deque()  # their contexts are to be computed again; each has the right to a slot
        self.preparation: Preparation | None = None
        self.job: Job | None = None  # whose continuations begin as slots become free
        self.chunk = CHUNK.get(slots.device.type, _CHUNK_ELSEWHERE)
        never, vocab_size = tokenizer.textless, slots.vocab_size
        self.banned = banned_ids(vocab_size, never, slots.device) if never else None  # (V,)
        self._pens: Pens | None = None

    @property
    def n_active(self) -> int:
        """Slots that are taken."""
        return len(self.rows) + len(self.full) + (self.preparation is not None)

    @property
    def is_busy(self) -> bool:
        """Is there anything to compute, but for what waits in the queue?"""
        return self.n_active > 0 or (self.job is not None and not self.job.is_begun)

    def turn(self) -> None:
        """Compute prompts, then one token of each row."""
        self._drop()
        self._prepare()
        if self.rows:
            self._step()

    def fail(self, error: Exception) -> None:
        """End everything with this error."""
        tickets = [row.job.ticket for row in (*self.rows, *self.full)]
        tickets += [part.ticket for part in (self.preparation, self.job) if part is not None]
        for ticket in tickets:
            ticket.fail(error)
        self.rows, self.preparation, self.job, self._pens = [], None, None, None
        self.full.clear()

    def _drop(self) -> None:
        """Take out what is complete or cancelled. The last rows move into the slots that become free."""
        self.full = deque(row for row in self.full if not row.is_over)
        if self.preparation is not None and self.preparation.ticket.is_over:
            self.preparation = None
        if self.job is not None and self.job.is_begun:
            self.job = None
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].is_over:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        last = self.rows.pop()
        if slot < len(self.rows):
            self.slots.copy(len(self.rows), slot, last.n_cached)
            self.rows[slot] = last
        self._pens = None

    def _prepare(self) -> None:
        budget = self.chunk if self.rows else self.chunk * _CHUNKS_IF_NONE_RUNS
        while budget > 0:
            if self.preparation is None or self.preparation.ticket.is_over:
                self.preparation = self._next_preparation()
            part = self.preparation
            if part is None:
                return
            try:
                budget -= self._compute(part, min(budget, self.chunk))
            except Exception as error:  # no memory, or a broken model
                part.ticket.fail(error)
                self.preparation = None
                self.slots.clear(slice(self.slots.n - 1, self.slots.n))

    def _next_preparation(self) -> Preparation | None:
        """What is to be computed next, if there is a slot for it. Continuations of a known prompt begin here."""
        self.preparation = None
        if self.full:
            row = self.full.popleft()
            return Preparation(self._tensor(row.last_ids(kept_of(self.slots.context))), row, None)
        while self.n_active < self.slots.n:
            if self.job is None or self.job.is_begun:
                self.job = self.take_job()
            job = self.job
            if job is None:
                return None
            sibling = next((slot for slot, row in enumerate(self.rows) if self._has_prompt(row, job)), None)
            if job.logits is None or sibling is None:
                return Preparation(self._tensor(job.ids), job, [None] if self._is_to_score(job) else None)
            self._begin(job, job.logits, sibling)
        return None

    def _has_prompt(self, row: Growing, job: Job) -> bool:
        """Does its slot have the keys of this whole prompt? In a model's window they are overwritten one by one."""
        return row.job is job and row.is_of_prompt and row.n_cached <= self.slots.cache.capacity

    def _is_to_score(self, job: Job) -> bool:
        return job.scores_prompt and job.logits is None

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self.slots.device)

    def _compute(self, part: Preparation, most: int) -> int:
        """Compute its next ids, up to `most`; return how many. After the last one its rows join."""
        ids = part.ids[part.n_done : part.n_done + most]
        x = self.slots.prepare(ids, part.n_done)  # (T, C)
        if part.scored is not None:
            self._score(part, x)
        part.n_done += len(ids)
        if part.n_done < len(part.ids):
            return len(ids)
        logits = self.slots.decoder.head(x[-1:])  # (1, V)
        require_finite(logits)
        self.preparation = None
        if isinstance(part.owner, Growing):
            part.owner.n_cached, part.owner.is_of_prompt = len(part.ids), False
            self._join([part.owner], logits, self.slots.n - 1)
            return len(ids)
        job = part.owner
        if part.scored is not None:
            job.ticket.tell(Prompt(tuple(part.scored)))
        job.logits = logits
        if job.n_left:
            self._begin(job, logits, self.slots.n - 1)
        return len(ids)

    def _score(self, part: Preparation, x: Tensor) -> None:
        """What each id of a prompt had as its probability after those before it; x (T, C)."""
        assert isinstance(part.owner, Job) and part.scored is not None
        following = part.ids[part.n_done + 1 : part.n_done + 1 + len(x)]
        if len(following):
            logits = self.slots.decoder.head(x[: len(following)])  # (T, V)
            part.scored += logprobs_of(logits, following, part.owner.request.logprobs or 0)

    def _begin(self, job: Job, logits: Tensor, source: int) -> None:
        """As many continuations of a prompt as there are slots for; its keys are in the slot `source`."""
        n = min(job.n_left, self.slots.n - self.n_active)
        first = job.request.n - job.n_left
        job.n_left -= n
        vocab_size = self.slots.vocab_size
        pens = [Pen(job.request, first + i, vocab_size, self.slots.device) for i in range(n)]
        self._join([Growing(job, first + i, self.tokenizer, pen) for i, pen in enumerate(pens)], logits, source)

    def _join(self, rows: Sequence[Growing], logits: Tensor, source: int) -> None:
        """Draw a token of each after logits (1, V), and give a slot with what `source` has to those that continue."""
        logits = logits.expand(len(rows), -1)
        self._write(rows, logits, Pens([row.pen for row in rows], self.banned, logits.device))
        for row in rows:
            if row.is_over:
                continue
            if row.n_cached == self.slots.context:
                self.full.append(row)
                continue
            self.slots.copy(source, len(self.rows), row.n_cached)
            source = len(self.rows)  # the last slot may be given away too
            self.rows.append(row)
            self._pens = None

    def _step(self) -> None:
        """One token of each row."""
        try:
            logits = self.slots.step([row.row.tokens[-1] for row in self.rows], [row.n_cached for row in self.rows])
            if not math.isfinite(logits.sum(dtype=torch.float32)):
                logits = self._without_broken(logits)
            self._pens = self._pens or Pens([row.pen for row in self.rows], self.banned, logits.device)
            for row in self.rows:
                row.n_cached += 1
            self._write(self.rows, logits, self._pens)
        except Exception as error:  # no memory: which row asked for too much cannot be known
            for row in self.rows:
                row.job.ticket.fail(error)
            self.slots.clear(slice(0, len(self.rows)))
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.is_over or row.n_cached == self.slots.context:
                self._leave(slot)
                if not row.is_over:
                    self.full.append(row)

    def _without_broken(self, logits: Tensor) -> Tensor:  # (B, V) -> (B, V)
        """End the requests whose logits are not finite. The others go on."""
        for slot, row in enumerate(self.rows):
            try:
                require_finite(logits[slot])
            except CheckpointError as error:
                row.job.ticket.fail(error)
                self.slots.clear(slice(slot, slot + 1))
        return logits.nan_to_num(0.0, 0.0, 0.0)

    def _write(self, rows: Sequence[Growing], logits: Tensor, pens: Pens) -> None:
        """Draw the next id of each row from logits (B, V)."""
        new = pens.draw(logits)
        for row, token, logprob in zip(rows, new, pens.logprobs(logits, new), strict=True):
            row.take(token, logprob)
        self.n_drawn += len(new)
