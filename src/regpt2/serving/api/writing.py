"""From the engine's thread to asyncio. In: requests of one client; out: their events, until the client leaves.

What a stream has to send is bounded: if a client does not read, and `MOST_UNREAD` events wait, the writing is cancelled
and the stream ends in an error.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum
from functools import partial

from regpt2.sampling.batching.engine import Engine, Event, Failed, Piece, Prompt, QueueFull, Ticket
from regpt2.sampling.writing import Request
from regpt2.serving.api.errors import ApiError

MOST_UNREAD = 2048  # events of a stream: about 1 kB each, with many log-probabilities 4 kB
RETRY_S = 0.05
STREAM_PACE_S = 0.02  # fifty times a second is smooth; tokens of a small model come faster, then several at once


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
        pace_s: float = STREAM_PACE_S,
    ) -> None:
        self.engine, self.requests = engine, requests
        self.score_prompts, self.only_score = score_prompts, only_score
        self._inbox = _Inbox(self._cancel, most_unread, pace_s)
        self._tickets: dict[int, Ticket] = {}  # of requests that are not done
        self._unfinished: dict[int, int] = {}  # continuations
        self._next = 0
        self._submit_next()

    @property
    def has_more(self) -> bool:
        """Are there events that can be had without waiting?"""
        return len(self._inbox) > 0

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


class _Wakes(Enum):
    """What ends the sleep of the event loop."""

    FOR_NOTHING = 0
    FOR_AN_END = 1
    FOR_ANY = 2


class _Inbox:
    """Events on their way from another thread to the event loop that this is made in.

    The loop wakes for the first event, then at most every `pace_s`, and at once when something ends. Each waking
    takes Python's lock from the engine's thread: with a wake for each token a small model wrote half as fast.
    """

    def __init__(self, when_full: Callable[[], None], most: float, pace_s: float) -> None:
        self._when_full, self._most, self._pace_s = when_full, most, pace_s
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._events = deque[tuple[int, Event]]()
        self._full, self._wakes, self._next_at = False, _Wakes.FOR_NOTHING, 0.0

    def __len__(self) -> int:
        return len(self._events)

    def put(self, number: int, event: Event) -> None:
        """From any thread."""
        if self._full:
            return
        if len(self._events) >= self._most:
            self._full = True
            self._when_full()
            event = Failed(ApiError(408, f"The client reads too slowly: {self._most:,} tokens wait.", code="too_slow"))
        self._events.append((number, event))
        is_end = not isinstance(event, Piece) or event.finish_reason is not None
        if self._wakes is _Wakes.FOR_ANY or (is_end and self._wakes is _Wakes.FOR_AN_END):
            self._wakes = _Wakes.FOR_NOTHING
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop is closed: nobody listens
                self._full = True

    async def get(self) -> tuple[int, Event]:
        """The next one, in order."""
        if not self._events:
            if self._next_at > self._loop.time():
                await self._sleep(_Wakes.FOR_AN_END)
            while not self._events:
                await self._sleep(_Wakes.FOR_ANY)
            self._next_at = self._loop.time() + self._pace_s
        return self._events.popleft()

    async def _sleep(self, wakes: _Wakes) -> None:
        self._ready.clear()
        self._wakes = wakes
        if self._events:  # one may have come before the line above
            return
        timer = self._loop.call_at(self._next_at, self._ready.set) if wakes is _Wakes.FOR_AN_END else None
        try:
            await self._ready.wait()
        finally:
            self._wakes = _Wakes.FOR_NOTHING
            if timer is not None:
                timer.cancel()
