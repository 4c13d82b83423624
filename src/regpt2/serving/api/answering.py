"""Answers over HTTP. In: what to write; out: one JSON object, or a stream of server-sent events.

The choices of both are made from the same parts, so a stream's parts are those of the whole answer.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from regpt2.sampling.batching.engine import Event, Piece
from regpt2.serving.api.asking import Ask
from regpt2.serving.api.errors import JSON, as_api_error, to_json
from regpt2.serving.api.writing import MOST_UNREAD, STREAM_PACE_S, Writing

END = b"\n\n"  # of an event
KEEP_ALIVE_S = 10.0  # a stream without an event for so long sends a comment, so that no proxy ends it

WHOLE_PACE_S = 0.5  # nothing is sent before the end, which comes at once
MOST_AT_ONCE = 32 * 1024  # bytes

EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx buffers otherwise

T = TypeVar("T")
Choice = dict[str, Any]


class Form(Protocol):
    """What an API writes: /v1/completions or /v1/chat/completions."""

    ask: Ask
    prefix: str
    whole_object: str
    part_object: str
    """Of a stream."""

    def first(self) -> Iterable[Choice]:
        """Parts of choices that come before all tokens."""

    def of(self, number: int, event: Event) -> Iterable[Choice]:
        """Parts of choices from an event of a request."""

    def merged(self, choices: list[Choice]) -> list[Choice]:
        """Whole choices from all parts."""


class Answer:
    """One answer while it is written. Nothing is submitted before it is made; `close` it at the end.

    Raises:
        QueueFull, EngineClosed: see `Engine.submit`.
    """

    def __init__(self, form: Form) -> None:
        self.form, self.ask = form, form.ask
        self.head = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.part_object if self.ask.stream else form.whole_object,
            "created": int(time.time()),
            "model": self.ask.served.name,
            "system_fingerprint": self.ask.served.fingerprint,
        }
        self.n_drawn = 0
        needs_model = not self.ask.only_score or self.ask.score_prompts
        self.writing = None
        if needs_model:
            self.writing = Writing(
                self.ask.served.engine,
                self.ask.requests,
                score_prompts=self.ask.score_prompts,
                only_score=self.ask.only_score,
                most_unread=MOST_UNREAD if self.ask.stream else math.inf,
                pace_s=STREAM_PACE_S if self.ask.stream else WHOLE_PACE_S,
            )

    async def parts(self) -> AsyncIterator[Choice]:
        """Parts of choices as they are written."""
        for part in self.form.first():
            yield part
        if self.writing is not None:
            async for number, event in self.writing.events():
                if isinstance(event, Piece):
                    if self.ask.only_score:
                        continue
                    self.n_drawn += len(event.tokens)
                for part in self.form.of(number, event):
                    yield part

    @property
    def has_more(self) -> bool:
        """Are there parts that can be had without waiting?"""
        return self.writing is not None and self.writing.has_more

    def close(self) -> None:
        """Write no more."""
        if self.writing is not None:
            self.writing.close()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        n_prompt = sum(len(request.ids) for request in self.ask.requests)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self.n_drawn,
            "total_tokens": n_prompt + self.n_drawn,
        }


class WholeAnswer(Response):
    """Waits for all of it. A client that leaves meanwhile ends the writing."""

    def __init__(self, form: Form) -> None:
        self.answer = Answer(form)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await _unless_left(self._written(), receive, self.answer)
        if response is not None:
            await response(scope, receive, send)

    async def _written(self) -> Response:
        try:
            parts = [part async for part in self.answer.parts()]
        except Exception as error:
            found = as_api_error(error)
            return JSON(found.body(), found.status, headers=dict(found.headers))
        return JSON({**self.answer.head, "choices": self.answer.form.merged(parts), "usage": self.answer.usage})


class Stream(Response):
    """Server-sent events: one for each token, `[DONE]` at the end. A client that leaves ends the writing."""

    def __init__(self, form: Form) -> None:
        self.answer = Answer(form)
        self._n_sent = 0
        super().__init__(headers=EVENT_HEADERS, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_left(self._send_all(send), receive, self.answer)

    async def _send_all(self, send: Send) -> None:
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        keeping_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            data = b""
            async for event in self._events():
                data += event
                if self.answer.has_more and len(data) < MOST_AT_ONCE:
                    continue  # tokens that were drawn meanwhile go out together
                self._n_sent += 1
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = b""
        finally:
            keeping_alive.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever there was no event for a while, as before a slot is free."""
        while True:
            n_before = self._n_sent
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._n_sent == n_before:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def _events(self) -> AsyncIterator[bytes]:
        answer, with_usage = self.answer, self.answer.ask.include_usage
        before = b"data: " + to_json(answer.head)[:-1] + b',"choices":['  # alike in all events: written once
        after = (b'],"usage":null}' if with_usage else b"]}") + END
        try:
            async for part in answer.parts():
                yield before + to_json(part) + after
        except Exception as error:
            yield b"data: " + to_json(as_api_error(error).body()) + END
            return
        if with_usage:
            yield before + b'],"usage":' + to_json(answer.usage) + b"}" + END
        yield b"data: [DONE]" + END


async def _unless_left(work: Coroutine[object, object, T], receive: Receive, answer: Answer) -> T | None:
    """What `work` gives; None if the client leaves first. In any case nothing is written afterwards."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        answer.close()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
