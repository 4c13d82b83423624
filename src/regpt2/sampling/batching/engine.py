"""Requests that come and go, written by one thread. In: requests; out: pieces of text, handed to who asked for them.

A seam for now: one request at a time. The rows of several requests are to share the running batch.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from regpt2.base.errors import Problem
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.language_model import LanguageModel
from regpt2.sampling.writing import FinishReason, Request, TokenLogprob, write

T = TypeVar("T")


class QueueFull(Problem):
    """As many requests wait as may wait."""


class EngineClosed(Problem):
    """The engine takes no new requests: it is about to end."""


@dataclass(frozen=True)
class Piece:
    """What one step added to one continuation of a request."""

    index: int
    """Which of the request's n."""
    text: str
    """New text; may be empty."""
    tokens: tuple[int, ...]
    """The ids drawn."""
    logprobs: tuple[TokenLogprob, ...]
    """For each of `tokens`, if asked for."""
    finish_reason: FinishReason | None
    """Not None: this was the last piece of this continuation."""


@dataclass(frozen=True)
class Prompt:
    """The log-probabilities of the prompt's own tokens, the first None; comes before all pieces if asked for."""

    logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True)
class Failed:
    """The request ended with this error. Nothing follows."""

    error: Exception


Event = Piece | Prompt | Failed


@dataclass(frozen=True)
class Load:
    """What the engine does now."""

    slots: int
    active: int
    """Continuations in the batch."""
    waiting: int
    """Requests in the queue."""
    tokens: int
    """Drawn since the start, over all requests."""


class Ticket:
    """A request that was taken."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Write no more of it: its slots are free within a token. Its listener gets nothing more. From any thread."""
        self.cancelled.set()


class Engine:
    """Owns a model: a thread that writes, and a bounded queue of requests. All methods may be called by any thread."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, window: int, slots: int = 8, most_waiting: int = 32
    ) -> None:
        self.model, self.tokenizer, self.window, self.slots = model, tokenizer, window, slots
        self._queue: queue.Queue[tuple[Request, Callable[[Event], None], Ticket] | None] = queue.Queue(most_waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None], *, score_prompt: bool = False) -> Ticket:
        """Take a request. Events are handed over in the engine's thread, in order; `on_event` must return quickly.

        Raises:
            QueueFull: too many wait.
            EngineClosed: it is closing.
        """
        if self._closed:
            raise EngineClosed("the server is stopping.")
        ticket = Ticket()
        try:
            self._queue.put_nowait((request, on_event, ticket))
        except queue.Full:
            raise QueueFull(f"{self._queue.maxsize} requests wait already.") from None
        return ticket

    def between_steps(self, work: Callable[[], T]) -> "Future[T]":
        """Run something else with the model, in the engine's thread, while no step runs."""
        done: Future[T] = Future()
        try:
            done.set_result(work())  # to be handed to the thread
        except Exception as error:
            done.set_exception(error)
        return done

    def load(self) -> Load:
        """How busy it is."""
        return Load(self.slots, 0, self._queue.qsize(), 0)

    def close(self, drain_s: float) -> bool:
        """Take no more requests, finish those taken, cancel what is not done in time. True if all were finished."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(drain_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (taken := self._queue.get()) is not None:
            request, on_event, ticket = taken
            seen = [0] * request.n
            for rows in write(self.model, self.tokenizer, [request], window=self.window):
                for index, row in enumerate(rows):
                    new = tuple(row.tokens[seen[index] :])
                    if new and not ticket.cancelled.is_set():
                        kept = tuple(row.logprobs[seen[index] :])
                        on_event(Piece(index, row.new, new, kept, row.finish_reason))
                    seen[index] = len(row.tokens)
                    if ticket.cancelled.is_set():
                        row.cancel()
