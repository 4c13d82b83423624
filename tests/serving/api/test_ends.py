"""Requests that end before their time: the client leaves or does not read, the model fails, the server stops.

`held` stops an engine between two of its steps, so that nothing here depends on how fast it writes.
"""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from regpt2.model.files.load import load_model
from regpt2.model.weights import native
from regpt2.sampling.batching.engine import Engine, Piece
from regpt2.sampling.writing import Request
from regpt2.serving.api.errors import ApiError, as_api_error
from regpt2.serving.api.writing import Writing
from serving.tiny_server import TEXT_MODEL, Running, server_of, write_tiny

WAIT_S = 20
LONG: dict[str, Any] = {"model": TEXT_MODEL, "prompt": "a", "max_tokens": 250, "temperature": 0}


@pytest.fixture
def engine(server: Running) -> Engine:
    return server.models[TEXT_MODEL].engine


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine makes no step."""
    begun, may_end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        may_end.wait(WAIT_S)

    engine.between_steps(wait)
    assert begun.wait(WAIT_S)
    try:
        yield
    finally:
        may_end.set()


def until(holds: Callable[[], bool]) -> None:
    end_at = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end_at
        time.sleep(0.002)


def sent(server: Running, **body: Any) -> socket.socket:
    """A request on a socket of its own; the caller closes it."""
    data = json.dumps({**LONG, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nContent-Length: {}"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    client.sendall((head.format(server.port, len(data)) + "\r\n\r\n").encode() + data)
    return client


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("body", [{}, {"n": 3}, {"prompt": ["a"] * 9}], ids=["one", "n", "many prompts"])
def test_a_client_that_leaves_frees_its_slots_within_a_token(
    server: Running, engine: Engine, stream: bool, body: dict[str, Any]
) -> None:
    before = engine.load()
    assert (before.active, before.waiting) == (0, 0)
    client = sent(server, stream=stream, **body)
    until(lambda: engine.load().tokens > before.tokens)
    with held(engine):
        n_written = engine.load().tokens
        n_rows = engine.load().active
        client.close()
        time.sleep(0.2)  # for the server to see it
    until(lambda: engine.load().active == 0)
    assert engine.load().waiting == 0
    assert engine.load().tokens - n_written <= n_rows
    assert n_written - before.tokens < 250 * body.get("n", 1) * len(body.get("prompt", "a")), "it was still written"


def test_a_client_that_waits_in_the_queue_can_leave_it(server: Running, engine: Engine) -> None:
    with held(engine):
        client = sent(server)
        until(lambda: engine.load().waiting == 1)
        client.close()
        until(lambda: engine.load().waiting == 0)


def test_a_full_queue_is_an_error_of_the_rate_and_says_when_to_ask_again(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    with server_of(tmp_path / "a", slots=1, queue=1) as server, server.client() as client:
        engine = server.models["a"].engine
        with held(engine):
            first = sent(server, model="a")
            until(lambda: engine.load().waiting == 1)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.completions.create(model="a", prompt="b", stream=stream)
                assert caught.value.response.headers["retry-after"] == "1"
                assert caught.value.code == "rate_limit_exceeded"
        first.close()
        many = client.completions.create(model="a", prompt=["b"] * 5, max_tokens=2)  # more than may wait: in turn
        assert len(many.choices) == 5
        assert engine.close(drain_s=WAIT_S)
        with pytest.raises(openai.InternalServerError) as stopping:
            client.completions.create(model="a", prompt="b")
        assert (
            stopping.value.status_code == 503 and stopping.value.message.endswith("The server is stopping.'}") is False
        )


def broken(folder: Path, change: Callable[[Any], None]) -> Path:
    """A model of which some weights are NaN."""
    write_tiny(folder)
    loaded = load_model(str(folder))
    with torch.no_grad():
        change(loaded.model)
    assert loaded.tokenizer is not None
    native.write(loaded.model, folder, loaded.tokenizer)
    return folder


def test_a_failing_model_is_an_error_of_the_server_without_its_inside(tmp_path: Path, capsys: Any) -> None:
    whole = broken(tmp_path / "whole", lambda model: model.wte.weight.fill_(torch.nan))
    later = broken(tmp_path / "later", lambda model: model.wpe.weight[20:].fill_(torch.nan))
    with server_of(whole, later) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="whole", prompt="a")
        assert caught.value.status_code == 500 and "hold NaN or infinity" in caught.value.message
        assert str(tmp_path) not in str(caught.value.body) and caught.value.type == "server_error"
        parts = []
        stream = client.completions.create(model="later", prompt="a", max_tokens=50, stream=True)
        with stream, pytest.raises(openai.APIError, match="hold NaN or infinity") as midway:
            parts.extend(part.choices[0].text for part in stream)
        assert 15 <= len(parts) <= 20 and midway.value.type == "server_error"
        assert client.completions.create(model="later", prompt="a", max_tokens=5).choices  # it still serves
    assert "a request failed" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_not_shown(capsys: Any) -> None:
    found = as_api_error(RuntimeError("out of memory in /home/someone"))
    assert (found.status, found.body()) == (
        500,
        {
            "error": {
                "message": "The model failed. The server's log has the details.",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
        },
    )
    assert "RuntimeError: out of memory in /home/someone" in capsys.readouterr().err


def test_what_a_client_does_not_read_is_bounded(engine: Engine) -> None:
    before = engine.load().tokens
    found: list[Any] = []

    async def read_late() -> None:
        slow = Writing(engine, [Request((97,), 200)], most_unread=5)
        try:
            await asyncio.to_thread(until, lambda: engine.load().active == 0 and engine.load().tokens > before)
            async for _, event in slow.events():
                found.append(event)
        finally:
            slow.close()

    with pytest.raises(ApiError, match="reads too slowly"):
        asyncio.run(read_late())
    assert len(found) == 5 and all(isinstance(event, Piece) for event in found)
    assert engine.load().tokens - before <= 5 + 2  # it is not written on


def test_a_long_text_is_refused_before_it_is_tokenized_and_others_are_answered_meanwhile(server: Running) -> None:
    class Slow:
        def encode(self, text: str) -> list[int]:
            time.sleep(0.6)
            return [97]

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    served = server.models[TEXT_MODEL]
    tokenizer = served.tokenizer
    object.__setattr__(served, "tokenizer", Slow())
    try:
        client = sent(server, max_tokens=1)
        other = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_S)
        begun_at = time.monotonic()
        other.request("GET", "/v1/models")
        assert other.getresponse().status == 200 and time.monotonic() - begun_at < 0.5
        other.close()
        too_long = sent(server, prompt="a" * 200_000)
        assert b" 400 " in too_long.recv(100) and time.monotonic() - begun_at < 0.5
        too_long.close()
        assert b" 200 " in client.recv(100)
        client.close()
    finally:
        object.__setattr__(served, "tokenizer", tokenizer)
