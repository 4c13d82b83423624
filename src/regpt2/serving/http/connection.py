"""One connection to a client. In: bytes; out: requests for the application; slow and malformed ones are closed.

uvicorn's own has no time limit for the head of a request, nor for a client that does not read.
"""

import asyncio
import re
import socket
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from regpt2.serving.http.access import MOST_HEADER_BYTES
from regpt2.serving.http.errors import Refusal
from regpt2.serving.http.headers import with_safety

TOO_MANY = Refusal(503, "too many connections are open.", "too_many_connections", headers=((b"retry-after", b"5"),))
TOO_SLOW = Refusal(408, "the head of the request did not arrive in time.", "head_timeout")
TOO_LONG = Refusal(431, "the request has too many headers, or too long ones.", "headers_too_large")
MALFORMED = Refusal(400, "this is not a valid HTTP request.", "bad_http")
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}
_BARE_LF = re.compile(rb"(?<!\r)\n")
_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Patience:
    """How long a client may take, in seconds, and how many there may be."""

    head_s: float = 5.0
    """For the head of a request, from its first byte; for the first also from the connection on."""
    body_s: float = 12.0
    """For a body. The application refuses a late one earlier, with an answer."""
    stalled_s: float = 10.0
    """For reading any of what waits to be sent."""
    most_connections: int = 128
    check_s: float = 1.0


class Connection(H11Protocol):
    """uvicorn's connection with limits."""

    def __init__(self, *arguments: Any, patience: Patience, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.patience = patience
        self._head_at: float | None = None
        self._body_at: float | None = None
        self._waiting: tuple[int, float] = (0, 0.0)
        """Bytes to be sent, and since when they are not fewer."""
        self._seen = b""
        """The last bytes of the head so far."""
        self._check_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_at = self.loop.time()
        self._check_timer = self.loop.call_later(self.patience.check_s, self._check)
        _give_up_on_silent_networks(transport)
        if len(self.connections) > self.patience.most_connections:
            self._refuse(TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check_timer is not None:
            self._check_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._head_at = self._head_at or self.loop.time()
            if self._has_bare_lf(data):
                self._refuse(MALFORMED)
                return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_at, self._seen = None, b""
        reading = self.conn.their_state is h11.SEND_BODY
        self._body_at = (self._body_at or self.loop.time()) if reading else None

    def resume_writing(self) -> None:
        """The client has read some of what waited."""
        self._waiting = (0, 0.0)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP."""
        too_long = len(self.conn.trailing_data[0]) >= MOST_HEADER_BYTES
        self._refuse(TOO_LONG if too_long else MALFORMED)

    def _has_bare_lf(self, data: bytes) -> bool:
        """A line of the head ends with LF alone: servers disagree about where such a head ends."""
        joined = self._seen + data
        end = joined.find(_END)
        found = _BARE_LF.search(joined, len(self._seen), len(joined) if end < 0 else end + len(_END))
        self._seen = joined[-len(_END) :]
        return found is not None

    def _refuse(self, why: Refusal) -> None:
        """Answer without the application, and close; an answer that has begun is cut."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = b"".join(b"%b: %b\r\n" % line for line in with_safety(why.head(closing=True), None))
            reason = REASONS.get(why.status, b"Service Unavailable")
            self.transport.write(b"HTTP/1.1 %d %b\r\n%b\r\n" % (why.status, reason, head) + why.json())
        self.transport.close()

    def _check(self) -> None:
        """Once a second: is the client within its times?"""
        now, waiting = self.loop.time(), self.transport.get_write_buffer_size()
        if waiting < self._waiting[0] or 0 in (waiting, self._waiting[0]):
            self._waiting = (waiting, now)
        stalled = waiting > 0 and now - self._waiting[1] > self.patience.stalled_s
        late_body = self._body_at is not None and now - self._body_at > self.patience.body_s
        late_head = self._head_at is not None and now - self._head_at > self.patience.head_s
        if stalled or late_body:
            self.transport.abort()
        elif late_head and not self.transport.is_closing():
            self._refuse(TOO_SLOW)
        self._check_timer = self.loop.call_later(self.patience.check_s, self._check)


def _give_up_on_silent_networks(transport: asyncio.Transport) -> None:
    """Close a connection whose other side acknowledges nothing for 30 s: it is gone without a word."""
    its_socket = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT") and its_socket is not None:
        its_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
