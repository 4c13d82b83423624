"""Requests one after another. In: requests to a model whose rows must be of equal length; out: their events.

Such a model has parts that are not ours, which need not mind the cache's mask (`may_differ_in_length`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from regpt2.data.tokenizer import Tokenizer
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.batching.batch import Job
from regpt2.sampling.batching.events import Piece, Prompt
from regpt2.sampling.generate import require_finite
from regpt2.sampling.writing import Row, TokenLogprob, logprobs_of, write

_CHUNK = 128  # tokens whose logits exist at once


class OneByOne:
    """One request at a time, as `write` does it; a token of each of its continuations at each turn."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, context: int, take_job: Callable[[], Job | None]
    ) -> None:
        self.model, self.tokenizer, self.context, self.take_job = model, tokenizer, context, take_job
        self.n_drawn = 0
        self.job: Job | None = None
        self.steps: Iterator[list[Row]] = iter(())
        self.n_seen: list[int] = []

    @property
    def n_active(self) -> int:
        """Continuations that are written now."""
        return 0 if self.job is None else self.job.request.n

    @property
    def is_busy(self) -> bool:
        """Is there anything to compute, but for what waits in the queue?"""
        return self.job is not None

    def turn(self) -> None:
        """Begin the next request, or write one more token of each continuation."""
        if self.job is None:
            self.job = self.take_job()
            if self.job is None:
                return
        try:
            is_done = self._advance(self.job)
        except Exception as error:  # no memory, or a broken model
            self.fail(error)
            return
        if is_done or self.job.ticket.is_over:
            self.job, self.steps = None, iter(())

    def fail(self, error: Exception) -> None:
        """End what is written with this error."""
        if self.job is not None:
            self.job.ticket.fail(error)
        self.job, self.steps = None, iter(())

    def _advance(self, job: Job) -> bool:
        """The prompt, or one token; True if it was the last one."""
        if job.scores_prompt:
            job.ticket.tell(Prompt(self._scores(job)))
            job.scores_prompt = False
            return job.n_left == 0
        if job.n_left:
            request = job.request
            each = [replace(request, n=1, seed=request.seed + index) for index in range(request.n)]
            self.steps, self.n_seen = write(self.model, self.tokenizer, each, context=self.context), [0] * request.n
            job.n_left = 0
        rows = next(self.steps, None)
        if rows is None:
            return True
        for index, row in enumerate(rows):
            if len(row.tokens) > self.n_seen[index]:
                kept = tuple(row.logprobs[self.n_seen[index] :])
                job.ticket.tell(Piece(index, row.new, tuple(row.tokens[self.n_seen[index] :]), kept, row.finish_reason))
                self.n_drawn += 1
            self.n_seen[index] = len(row.tokens)
        return all(row.finish_reason is not None for row in rows)

    def _scores(self, job: Job) -> tuple[TokenLogprob | None, ...]:
        ids = torch.tensor(job.ids, device=next(self.model.parameters()).device)  # (T,)
        x = self.model.hidden(ids[None])[0, :-1]  # (T - 1, C)
        kept: list[TokenLogprob | None] = [None]
        for start in range(0, len(x), _CHUNK):
            logits = self.model.head(x[start : start + _CHUNK])  # (at most _CHUNK, V)
            require_finite(logits)
            kept += logprobs_of(logits, ids[1:][start : start + _CHUNK], job.request.logprobs or 0)
        return tuple(kept)
