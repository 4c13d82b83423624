"""What several browsers watch at once. In: a look at files, made again and again; out: server-sent events of changes.

The look is made in one thread of its own, only while somebody watches, and once for all who watch.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

EVERY_S = 1.0
HEARTBEAT_S = 15.0
SHARE = 0.1
"""Of one core: most that all looks together may take, beyond the first of each."""
SAVED_S = 0.5

Part = tuple[str, str]
"""The event's kind, and which one of that kind."""
HEARTBEAT = b": still here\n\n"


class Budget:
    """Time of one core that may be spent. It comes back at a rate of `share`, up to SAVED_S."""

    def __init__(self, share: float = SHARE) -> None:
        self.share = share
        self._left_s = SAVED_S
        self._at = time.monotonic()

    def may_spend(self) -> bool:
        """Is something left?"""
        now = time.monotonic()
        self._left_s, self._at = min(SAVED_S, self._left_s + self.share * (now - self._at)), now
        return self._left_s > 0

    def spend(self, seconds: float) -> None:
        """Take from it; it may be overdrawn, and is then closed for longer."""
        self._left_s -= seconds


class Channel(ABC):
    """Parts by name, each a line of JSON. Each client is sent all of them, then those that change.

    A part that is no more is not sent: another part names those that there are.
    """

    def __init__(self, executor: Executor, budget: Budget) -> None:
        self._executor, self._budget = executor, budget
        self._parts: dict[Part, str] = {}
        self._looking: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self.n_clients = 0

    @abstractmethod
    def look(self, *, spend: bool) -> dict[Part, str]:
        """All parts as they are now; in a thread. `spend`: is there time for what takes long?"""

    def refresh(self) -> dict[Part, str]:
        """Look, and count the time that it took."""
        began_s = time.thread_time()
        parts = self.look(spend=self._budget.may_spend())
        self._budget.spend(time.thread_time() - began_s)
        return parts

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self.n_clients += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on())
            self._looking.add_done_callback(lambda _: self._tell())
        try:
            yield
        finally:
            self.n_clients -= 1
            if not self.n_clients and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look_on(self) -> None:
        while True:
            parts = await asyncio.get_running_loop().run_in_executor(self._executor, self.refresh)
            if parts != self._parts:
                self._parts = parts
                self._tell()
            await asyncio.sleep(EVERY_S)

    def _tell(self) -> None:
        """Wake all clients."""
        self._news.set()
        self._news = asyncio.Event()

    def _require_looks(self) -> None:
        """Raise what ended the looks, if something did: a stream without them would be silent for ever."""
        if self._looking is not None and self._looking.done():
            self._looking.result()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events of one client; endless."""
        sent: dict[Part, str] = {}
        with self._watched():
            while True:
                self._require_looks()
                news, parts = self._news, self._parts
                changes = [_event(kind, data) for (kind, one), data in parts.items() if sent.get((kind, one)) != data]
                sent = parts
                if changes:
                    yield b"".join(changes)
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT_S)
                except TimeoutError:
                    yield HEARTBEAT


class EventStream(Response):
    """The answer that sends a channel's events until the client leaves, or the server cancels it to stop."""

    media_type = "text/event-stream"

    def __init__(self, channel: Channel) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._channel = channel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, and listen for the client to leave: what it is sent after that is lost silently."""
        sending, leaving = asyncio.create_task(self._send(send)), asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events = self._channel.stream()
        try:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            await events.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(kind: str, data: str) -> bytes:
    """A server-sent event; its data must be one line."""
    return f"event: {kind}\ndata: {data}\n\n".encode()
