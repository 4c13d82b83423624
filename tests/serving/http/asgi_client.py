"""Ask an ASGI application without a server. In: a method, a path, headers, a body; out: status, headers, body."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PORT = 8000
HOST = ("host", f"127.0.0.1:{PORT}")
JSON = ("content-type", "application/json")
Pairs = Sequence[tuple[str, str]]


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    whole: bool = False
    """Did the application say that nothing follows?"""

    def header(self, name: str) -> str | None:
        """The only value of a header."""
        found = [value for key, value in self.headers if key == name]
        assert len(found) <= 1, f"{name} is there {len(found)} times"
        return found[0] if found else None

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has OpenAI's form."""
        assert self.header("content-type") == "application/json"
        assert int(self.header("content-length") or -1) == len(self.body)
        content = json.loads(self.body)
        assert list(content) == ["error"]
        assert set(content["error"]) == {"message", "type", "param", "code"}
        assert content["error"]["message"].endswith(".")
        return dict(content["error"])


def scope_of(method: str, path: str, headers: Pairs, address: str = "127.0.0.1") -> dict[str, Any]:
    """As uvicorn makes it."""
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("latin-1"),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "server": (address, PORT),
        "client": ("127.0.0.1", 50000),
        "state": {},
    }


async def ask_async(
    app: Any,
    method: str = "GET",
    path: str = "/",
    headers: Pairs = (HOST,),
    body: Sequence[bytes] = (b"",),
    *,
    address: str = "127.0.0.1",
    then: Callable[[], Awaitable[None]] | None = None,
) -> Answer:
    """One request. The parts of its body arrive one by one; after them the client leaves when `then` has returned."""
    parts, answer = list(body), Answer()

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await (then() if then is not None else asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        assert not answer.whole, "something follows the end"
        if message["type"] == "http.response.start":
            assert not answer.status, "the answer begins twice"
            answer.status = message["status"]
            answer.headers = [(name.decode(), value.decode("latin-1")) for name, value in message["headers"]]
        else:
            answer.body += message.get("body", b"")
            answer.whole = not message.get("more_body", False)

    await app(scope_of(method, path, headers, address), receive, send)
    return answer


def ask(*arguments: Any, **options: Any) -> Answer:
    """The same, in an event loop of its own."""
    return asyncio.run(ask_async(*arguments, **options))
