"""One request and its answer. In: an application and a request; out: an answer that is whole, or ends in an error.

`Traffic` knows all that are under way, to end them when the server stops.
"""

import asyncio
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Scope, Send

from regpt2.serving.http.errors import Refusal, refuse

STOPPING = Refusal(503, "the server is stopping.", "stopping", headers=((b"retry-after", b"5"),))
TIMED_OUT = Refusal(408, "the request took longer than this server allows.", "timeout")
BROKEN = Refusal(500, "the server failed at this request; its own log says why.", "internal_error")
LINGER_S, LINGER_BYTES = 2.0, 4 * 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How much a request may ask for."""

    body_bytes: int = 256 * 1024
    body_s: float = 10.0
    """Time to send the whole body."""
    request_s: float = 300.0
    """Time to be answered in full."""


class Exchange:
    """An answer as it is sent: how far it is, and how to end it early without half an event."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status = 0
        self.n_bytes = 0
        self.complete = False
        self.why: Refusal | None = None
        """Why it is ended early."""
        self.timeout: asyncio.Timeout | None = None
        """Of the application while it answers."""
        self._streams_events = False
        self._ends_an_event = True

    @property
    def endless(self) -> bool:
        """A GET that is answered by events follows something and ends with the server, not by itself."""
        return self._streams_events and self._scope["method"] == "GET"

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._streams_events = any(kind.startswith(b"text/event-stream") for kind in kinds)
            if self.endless:
                self._end_at(0 if self.why else None)
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self.n_bytes += len(body)
            self._ends_an_event = body.endswith(b"\n\n") if body else self._ends_an_event
            self.complete = not message.get("more_body", False)
        await self._send(message)
        if not self.complete:
            await asyncio.sleep(0)  # one that has much to send lets others be answered, and can be ended

    def stop(self, why: Refusal) -> None:
        """Let the application be cancelled; `end` then completes the answer."""
        self.why = self.why or why
        self._end_at(0)

    def _end_at(self, loop_time: float | None) -> None:
        """When to cancel the application: 0 is now, None never."""
        if self.timeout is not None and not self.timeout.expired():
            self.timeout.reschedule(loop_time)

    async def end(self, why: Refusal) -> None:
        """Complete an answer that the application left: an error, an error event, or a closed connection."""
        if self.complete:
            return
        if not self.status:
            await refuse(self.send, why)
        elif self._streams_events:
            last = b"" if self.endless else why.event()
            await self.send({"type": "http.response.body", "body": last if self._ends_an_event else b"\n\n" + last})


@dataclass
class Traffic:
    """The requests under way."""

    draining: bool = False
    """New requests are refused: the server is about to stop."""
    under_way: set[Exchange] = field(default_factory=set)

    def drain(self) -> None:
        """Take no more requests. Those that follow something end now, the others may finish."""
        self.draining = True
        for exchange in self.under_way:
            if exchange.endless:
                exchange.stop(STOPPING)

    def cut(self) -> None:
        """End all."""
        self.draining = True
        for exchange in self.under_way:
            exchange.stop(STOPPING)


class Incoming:
    """What a client sends, for one request."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.whole = False
        """Has all of the body come?"""

    async def __call__(self) -> Message:
        message = await self._receive()
        self.whole = not message.get("more_body", False)
        return message


async def read_body(limits: Limits, scope: Scope, receive: Incoming) -> bytes | Refusal | None:
    """The whole body, or why it is refused; None: the client has left. Chunks are counted as they arrive."""
    too_large = Refusal(413, f"the body is larger than {limits.body_bytes // 1024} KiB.", "body_too_large")
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > limits.body_bytes:
        return too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    return too_large
                if receive.whole:
                    return bytes(body)
    except TimeoutError:
        return Refusal(408, f"the body did not arrive within {limits.body_s:.0f} s.", "body_timeout")


def again(body: bytes, receive: Receive) -> Receive:
    """`receive` for the application: first the body that was read, then what the client does."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_part() -> Message:
        return parts.pop() if parts else await receive()

    return next_part


async def refuse_unread(exchange: Exchange, receive: Incoming, why: Refusal) -> None:
    """Refuse a request whose body was not read, and close its connection a little later.

    A connection that is closed while data arrives is reset, and the client may lose the answer: read on for a moment.
    """
    head = {"type": "http.response.start", "status": why.status, "headers": why.head(closing=True)}
    await exchange.send(head)
    await exchange.send({"type": "http.response.body", "body": why.json(), "more_body": True})
    n_bytes = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while n_bytes < LINGER_BYTES and not receive.whole:
                n_bytes += len((await receive()).get("body", b""))
    except TimeoutError:
        pass
    await exchange.send({"type": "http.response.body", "body": b""})
