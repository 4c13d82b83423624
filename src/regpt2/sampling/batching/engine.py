"""Requests that come and go, written by one thread. In: requests; out: pieces of text, handed to who asked for them."""

import atexit
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.batching.batch import Batch, Job
from regpt2.sampling.batching.events import (
    EngineClosed,
    Event,
    Failed,
    Load,
    Piece,
    Prompt,
    QueueFull,
    Ticket,
)
from regpt2.sampling.batching.one_by_one import OneByOne
from regpt2.sampling.batching.slots import Slots
from regpt2.sampling.generate import may_differ_in_length
from regpt2.sampling.writing import Request

__all__ = ["Engine", "EngineClosed", "Event", "Failed", "Load", "Piece", "Prompt", "QueueFull", "Ticket"]

T = TypeVar("T")

_LAST_TURN_S = 30.0  # for the turn that runs when the time to drain is over


class Engine:
    """Owns a model: a thread that writes, and a bounded queue of requests. All methods may be called by any thread.

    What a request draws depends on the request alone: continuation `index` draws as a request with n = 1 and the seed
    `seed + index` does, which is what `write` draws for it.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        context: int,
        slots: int = 8,
        most_waiting: int = 32,
        threads: int | None = None,
    ) -> None:
        """Make room for `slots` continuations of at most `context` tokens, at once and for good.

        `threads` are those that torch computes with in the engine's thread, on a CPU; by default as many as elsewhere.

        Raises:
            UsageError: a value is out of its range, or there is not enough memory.
        """
        if slots < 1 or most_waiting < 1:
            raise UsageError(f"slots = {slots} and waiting requests = {most_waiting} must be at least 1.")
        if not 1 <= context <= model.config.block_size:
            raise UsageError(f"context = {context:,} must be from 1 to block_size = {model.config.block_size:,}.")
        self.model, self.tokenizer, self.context, self.slots = model.eval(), tokenizer, context, slots
        self.most_waiting, self.threads = most_waiting, threads
        self.cache_bytes = 0
        """The memory that keys and values take, from the start on."""
        self._batch: Batch | OneByOne
        if may_differ_in_length(model):
            memory = Slots(model, slots, context)
            self.cache_bytes = memory.n_bytes
            self._batch = Batch(memory, tokenizer, self._take_job)
        else:
            self._batch = OneByOne(model, tokenizer, context, self._take_job)
        self._changed = threading.Condition()  # guards what follows
        self._jobs: deque[Job] = deque()
        self._works: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_closed, self._is_over = False, False
        self._n_unfinished = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, 0)  # Python that ends while a step runs would be aborted

    def submit(self, request: Request, on_event: Callable[[Event], None], *, score_prompt: bool = False) -> Ticket:
        """Take a request. Events are handed over in the engine's thread, in order; `on_event` must return quickly.

        Raises:
            UsageError: the prompt is empty, has ids that the model lacks, or is too long to be scored.
            QueueFull: too many wait.
            EngineClosed: it is closing.
        """
        return self._submit(request, on_event, scores_prompt=score_prompt, writes=True)

    def score(self, ids: tuple[int, ...], on_event: Callable[[Event], None], *, logprobs: int = 0) -> Ticket:
        """Write nothing: the only event is the `Prompt`, each token with its `logprobs` likeliest alternatives.

        Raises:
            UsageError, QueueFull, EngineClosed: as `submit` does.
        """
        return self._submit(Request(ids, 1, logprobs=logprobs), on_event, scores_prompt=True, writes=False)

    def between_steps(self, work: Callable[[], T]) -> "Future[T]":
        """Run something else with the model, in the engine's thread, while no step runs."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                future.set_exception(EngineClosed("the server is stopping."))
            else:
                self._works.append((work, future))
                self._changed.notify()
        return future

    def load(self) -> Load:
        """How busy it is."""
        with self._changed:
            waiting = sum(not job.ticket.is_over for job in self._jobs)
        return Load(self.slots, self._batch.n_active, waiting, self._batch.n_drawn)

    def close(self, drain_s: float) -> bool:
        """Take no more requests, finish those taken, cancel what is not done in time. True if all were finished."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(drain_s)
        self._is_over = True
        self._thread.join(_LAST_TURN_S)
        atexit.unregister(self.close)
        return not self._thread.is_alive() and self._n_unfinished == 0

    def _submit(
        self, request: Request, on_event: Callable[[Event], None], *, scores_prompt: bool, writes: bool
    ) -> Ticket:
        self._check(request, scores_prompt=scores_prompt)
        ticket = Ticket(on_event)
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the server is stopping.")
            self._forget_cancelled()
            if len(self._jobs) >= self.most_waiting:
                raise QueueFull(f"{self.most_waiting} requests wait already; try again later.")
            self._jobs.append(Job(request, ticket, self.context, scores_prompt=scores_prompt, writes=writes))
            self._changed.notify()
        return ticket

    def _check(self, request: Request, *, scores_prompt: bool) -> None:
        """What would fail in the engine's thread, or on the device, where an id that is too large ends all work."""
        vocab_size = self.model.config.vocab_size
        if not request.ids:
            raise UsageError("the prompt has no tokens; begin with <|endoftext|>.")
        if not 0 <= min(request.ids) <= max(request.ids) < vocab_size:
            raise UsageError(f"a token id of the prompt is outside the model's vocabulary of {vocab_size:,} tokens.")
        if not 0 <= (request.logprobs or 0) <= vocab_size:
            raise UsageError(f"logprobs = {request.logprobs} must be from 0 to the number of tokens, {vocab_size:,}.")
        if scores_prompt and len(request.ids) > self.context:
            raise UsageError(f"{len(request.ids):,} tokens cannot be scored: the context is {self.context:,}.")

    def _forget_cancelled(self) -> None:
        self._jobs = deque(job for job in self._jobs if not job.ticket.is_over)

    def _take_job(self) -> Job | None:
        with self._changed:
            self._forget_cancelled()
            return self._jobs.popleft() if self._jobs else None

    @torch.no_grad()
    def _run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)  # holds for this thread, and as the default of threads that begin later
        while self._has_work():
            while self._works:
                _do(*self._works.popleft())
            try:
                self._batch.turn()
            except Exception as error:  # a bug of ours fails the requests in the batch; the engine runs on
                self._batch.fail(error)
        self._end()

    def _has_work(self) -> bool:
        """Wait until there is something to do. False: it is time to end."""
        with self._changed:
            while not (self._is_closed or self._works or self._jobs or self._batch.is_busy):
                self._changed.wait()
            return not self._is_over and bool(self._works or self._jobs or self._batch.is_busy)

    def _end(self) -> None:
        closed = EngineClosed("the server stopped before this was done.")
        self._n_unfinished = len(self._jobs) + len(self._works) + self._batch.is_busy
        self._batch.fail(closed)
        with self._changed:
            while self._jobs:
                self._jobs.popleft().ticket.fail(closed)
            while self._works:
                self._works.popleft()[1].set_exception(closed)


def _do(work: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
