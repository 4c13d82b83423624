"""What an engine hands over. In: tokens drawn and scored; out: events for who asked, in order, until they cancel."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from regpt2.base.console import warn
from regpt2.base.errors import Problem
from regpt2.sampling.writing import FinishReason, TokenLogprob


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

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self.is_over = False
        """Cancelled or failed: no more of it is written."""
        self._on_event = on_event
        self._lock = threading.RLock()  # a listener may cancel

    def cancel(self) -> None:
        """Write no more of it: its slots are free within a token. Its listener gets nothing more. From any thread."""
        with self._lock:
            self.is_over = True

    def tell(self, event: Event) -> None:
        """Hand over an event. A listener that raises loses its request; the others go on."""
        with self._lock:
            if self.is_over:
                return
            try:
                self._on_event(event)
            except Exception as error:
                self.is_over = True
                warn(f"a request was dropped, because what listens to it failed: {type(error).__name__}: {error}")

    def fail(self, error: Exception) -> None:
        """The last event."""
        with self._lock:
            self.tell(Failed(error))
            self.is_over = True
