"""The door of the server. In: any request; out: an answer of the application or a refusal, with safe headers."""

import asyncio
import sys
import time
import traceback
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regpt2.base.console import safe_text
from regpt2.serving.http.access import Access, allowed_origin, is_preflight, refusal
from regpt2.serving.http.errors import refuse
from regpt2.serving.http.exchange import (
    BROKEN,
    STOPPING,
    TIMED_OUT,
    Exchange,
    Incoming,
    Limits,
    Traffic,
    again,
    read_body,
    refuse_unread,
)
from regpt2.serving.http.headers import preflight, with_safety

MOST_SHOWN = 200  # characters of a path in the log


class Door:
    """An ASGI application around another: who may ask, how much, how long, and what an error looks like."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: Limits,
        traffic: Traffic,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.app, self.access, self.limits, self.traffic, self.log = app, access, limits, traffic, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets; nothing to do at start and end
            return
        origin, started_at = allowed_origin(self.access, scope), time.monotonic()

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": with_safety(message.get("headers", []), origin)}
            await send(message)

        exchange = Exchange(scope, send_safely)
        try:
            await self._answer(exchange, scope, Incoming(receive))
        except Exception:
            sys.stderr.write(safe_text(traceback.format_exc()))
            await exchange.end(BROKEN)
        if self.log is not None:
            self.log(_line(scope, exchange, time.monotonic() - started_at))

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Incoming) -> None:
        why = refusal(self.access, scope)
        if why is None and self.traffic.draining and scope["path"] != "/health":
            why = STOPPING
        if why is not None:
            await (refuse_unread(exchange, receive, why) if _has_body(scope) else refuse(exchange.send, why))
        elif is_preflight(self.access, scope):
            await _answer_preflight(exchange, scope)
        elif scope["path"] == "/health":
            await self.app(scope, receive, exchange.send)
        else:
            await self._pass_on(exchange, scope, receive)

    async def _pass_on(self, exchange: Exchange, scope: Scope, receive: Incoming) -> None:
        """Let the application answer within its time, or until the server stops."""
        self.traffic.under_way.add(exchange)
        try:
            body = await read_body(self.limits, scope, receive)
            if body is None:
                return
            if not isinstance(body, bytes):
                await refuse_unread(exchange, receive, body)
                return
            async with asyncio.timeout(0 if exchange.why else self.limits.request_s) as exchange.timeout:
                await self.app(scope, again(body, receive), exchange.send)
        except TimeoutError:
            if exchange.timeout is None or not exchange.timeout.expired():
                raise
            await exchange.end(exchange.why or TIMED_OUT)
        finally:
            self.traffic.under_way.discard(exchange)


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


async def _answer_preflight(exchange: Exchange, scope: Scope) -> None:
    asked = next((value for name, value in scope["headers"] if name == b"access-control-request-headers"), b"")
    await exchange.send({"type": "http.response.start", "status": 204, "headers": preflight(asked)})
    await exchange.send({"type": "http.response.body", "body": b""})


def _line(scope: Scope, exchange: Exchange, elapsed_s: float) -> str:
    """What the log shows of a request: no query and no header, where a key could be; no control character."""
    path = safe_text((scope.get("raw_path") or scope["path"].encode()).decode("latin-1"))
    path = path.replace("\n", "\\n").replace("\t", "\\t")[:MOST_SHOWN]
    client = (scope.get("client") or ("-",))[0]
    clock = time.strftime("%H:%M:%S")
    return (
        f"{clock} {client} {scope['method']} {path} {exchange.status or '-'} {exchange.n_bytes:,} B {elapsed_s:.3f} s"
    )
