"""One request over a raw socket. In: a body; out: the answer, with the moment at which each event of it came.

Clients share the machine with the server that they measure, so this does little while an answer arrives: it keeps the
pieces with their times. They are taken apart when the answer is complete.
"""

import asyncio
import json
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
NO_ANSWER = 0  # in the place of a status
EVENT = b"data: "
DONE = "[DONE]"


@dataclass
class Answer:
    """What came back."""

    status: int = NO_ANSWER
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False
    """It ended as its own framing says."""
    sent_at: float = 0.0
    ended_at: float = 0.0
    events: list[tuple[float, str]] = field(default_factory=list)
    """Of a stream: when each event came, and its data."""

    @property
    def json(self) -> Any:
        """The body as JSON; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class _Exchange(asyncio.Protocol):
    """Sends, then keeps what comes."""

    def __init__(self, request: bytes, leave_after: int | None) -> None:
        self.request, self.leave_after = request, leave_after
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pieces: list[tuple[float, bytes]] = []
        self.n_events, self.sent_at = 0, 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.sent_at = transport, time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if self.leave_after is not None:
            self.n_events += data.count(EVENT)
            if self.n_events >= self.leave_after and self.transport is not None:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def ask(
    port: int,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    *,
    leave_after: int | None = None,
    leave_after_s: float | None = None,
    content_type: str = "application/json",
    timeout_s: float = 120.0,
) -> Answer:
    """POST a body, or GET without one; returns when the connection has ended.

    Args:
        leave_after: leave without a word after this many events.
        leave_after_s: leave after this time.
    """
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = [f"{'GET' if content is None else 'POST'} {path} HTTP/1.1", f"Host: {HOST}:{port}", "Connection: close"]
    if content is not None:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(content)}"]
    request = "\r\n".join([*lines, "", ""]).encode() + (content or b"")
    began_at = time.perf_counter()
    loop = asyncio.get_running_loop()
    try:
        transport, exchange = await loop.create_connection(lambda: _Exchange(request, leave_after), HOST, port)
    except OSError:
        return Answer(sent_at=began_at, ended_at=time.perf_counter())
    try:
        await asyncio.wait_for(exchange.ended, leave_after_s if leave_after_s is not None else timeout_s)
    except TimeoutError:
        pass
    finally:
        transport.abort()
    answer = parsed(exchange.pieces)
    answer.sent_at, answer.ended_at = exchange.sent_at, time.perf_counter()
    return answer


def parsed(pieces: list[tuple[float, bytes]]) -> Answer:
    """An answer from what arrived."""
    raw = b"".join(data for _, data in pieces)
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        return Answer()
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    start = len(raw) - len(rest)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body, spans, is_whole = _dechunked(raw, start)
    else:
        body, spans = rest, [(len(rest), start)]
        is_whole = len(rest) == int(headers.get("content-length", len(rest)))
    answer = Answer(int(first.split()[1]), headers, body, is_whole)
    if headers.get("content-type", "").startswith("text/event-stream"):
        answer.events = _events(body, spans, pieces)
    return answer


def _dechunked(raw: bytes, at: int) -> tuple[bytes, list[tuple[int, int]], bool]:
    """The content; of each chunk its end in the content, and what to add to a place in it for the place in `raw`."""
    content, spans = bytearray(), []
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].partition(b";")[0], 16)
        at = line_end + 2
        if size == 0:
            return bytes(content), spans, raw.startswith(b"\r\n", at)
        shift = at - len(content)
        content += raw[at : at + size]
        spans.append((len(content), shift))
        at += size + 2
    return bytes(content), spans, False


def _events(body: bytes, spans: list[tuple[int, int]], pieces: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """The events that are complete, each with the arrival of its last byte."""
    ends, total = [], 0
    for _, data in pieces:
        total += len(data)
        ends.append(total)
    found, at = [], 0
    while (end := body.find(b"\n\n", at)) >= 0:
        if body.startswith(EVENT, at):
            _, shift = spans[bisect_left(spans, (end + 2, 0))]
            came_at = pieces[bisect_left(ends, end + 2 + shift)][0]
            found.append((came_at, body[at + len(EVENT) : end].decode(errors="replace")))
        at = end + 2
    return found
