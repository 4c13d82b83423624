"""From the engine's thread to asyncio. In: requests of one client; out: their events, until the client leaves.

What a stream has to send is bounded: if a client does not read, and `MOST_UNREAD` events wait, the writing is cancelled
and the stream ends in an error.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from regpt2.sampling.batching.engine import Engine, Event, Failed, Piece, Prompt, QueueFull, Ticket
from regpt2.sampling.writing import Request
from regpt2.serving.api.errors import ApiError

MOST_UNREAD = 2048  # events of a stream: about 1 kB each, with many log-probabilities 4 kB
RETRY_S = 0.05


class Writing:
    """Requests that are written for one client. Made in the event loop; `close` it at the end.

    The first is submitted at once, others as slots of ours end: one client takes no more slots than there are.

    Raises:
        QueueFull, EngineClosed: see `Engine.submit`.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        *,
        score_prompts: bool = False,
        only_score: bool = False,
        most_unread: float = math.inf,
    ) -> None:
        self.engine, self.requests = engine, requests
        self.score_prompts, self.only_score = score_prompts, only_score
        self._inbox = _Inbox(self._cancel, most_unread)
        self._tickets: dict[int, Ticket] = {}  # of requests that are not done
        self._unfinished: dict[int, int] = {}  # continuations
        self._next = 0
        self._submit_next()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events with the number of their request, up to the last one of all requests.

        Raises:
            Exception: what the engine failed with.
            ApiError: the client reads too slowly.
        """
        while self._tickets or self._next < len(self.requests):
            self._submit_more()
            if not self._tickets:  # others fill the queue
                await asyncio.sleep(RETRY_S)
                continue
            number, event = await self._inbox.get()
            if isinstance(event, Failed):
                raise event.error
            if number not in self._tickets:
                continue
            yield number, event
            if isinstance(event, Piece) and event.finish_reason is not None:
                self._unfinished[number] -= 1
            if self._unfinished[number] == 0 or (self.only_score and isinstance(event, Prompt)):
                self._tickets.pop(number).cancel()

    def close(self) -> None:
        """Cancel what is not done."""
        self._next = len(self.requests)
        self._cancel()
        self._tickets.clear()

    def _cancel(self) -> None:
        """From any thread."""
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def _submit_more(self) -> None:
        most = max(1, self.engine.slots // self.requests[0].n)
        while self._next < len(self.requests) and len(self._tickets) < most:
            try:
                self._submit_next()
            except QueueFull:
                return

    def _submit_next(self) -> None:
        number = self._next
        request, put = self.requests[number], partial(self._inbox.put, number)
        if self.only_score:
            ticket = self.engine.score(request.ids, put, logprobs=request.logprobs or 0)
        else:
            ticket = self.engine.submit(request, put, score_prompt=self.score_prompts)
        self._tickets[number], self._unfinished[number] = ticket, request.n
        self._next += 1


class _Inbox:
    """Events on their way from another thread to the event loop that this is made in."""

    def __init__(self, when_full: Callable[[], None], most: float) -> None:
        self._when_full, self._most = when_full, most
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._events = deque[tuple[int, Event]]()
        self._full, self._is_called = False, False

    def put(self, number: int, event: Event) -> None:
        """From any thread."""
        if self._full:
            return
        if len(self._events) >= self._most:
            self._full = True
            self._when_full()
            event = Failed(ApiError(408, f"The client reads too slowly: {self._most:,} tokens wait.", code="too_slow"))
        self._events.append((number, event))
        if self._is_called:  # the loop is busy; it will find this event too
            return
        self._is_called = True
        try:
            self._loop.call_soon_threadsafe(self._called)
        except RuntimeError:  # the loop is closed: nobody listens
            self._full = True

    def _called(self) -> None:
        self._is_called = False
        self._ready.set()

    async def get(self) -> tuple[int, Event]:
        while not self._events:
            self._ready.clear()
            if not self._events:  # one may have come before `clear`
                await self._ready.wait()
        return self._events.popleft()
