"""Refusals in OpenAI's form. In: a status and what is wrong; out: the bytes of the answer, as JSON or as an event."""

import json
from dataclasses import dataclass

from starlette.types import Send

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no answer, or no whole one. The message names no path of this machine."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def json(self) -> bytes:
        """`{"error": {...}}`, in one line."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """The same as a server-sent event."""
        return b"data: " + self.json() + b"\n\n"

    def head(self, *, closing: bool = False) -> list[tuple[bytes, bytes]]:
        """The headers of the answer. It ends the connection if it is `closing`, or the request made no sense."""
        ours = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.json()))]
        return [*ours, *self.headers, *([(b"connection", b"close")] if closing or self.status == 400 else [])]


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer with a refusal to a request whose body was read, or that has none."""
    await send({"type": "http.response.start", "status": refusal.status, "headers": refusal.head()})
    await send({"type": "http.response.body", "body": refusal.json()})
