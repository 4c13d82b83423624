"""How much and how long; what an error, a stopped server and every answer look like."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asgi_client import HOST, JSON, Answer, ask, ask_async, scope_of

from regpt2.serving.app import build_app
from regpt2.serving.http import exchange as exchanges
from regpt2.serving.http.access import Access
from regpt2.serving.http.door import Door
from regpt2.serving.http.exchange import Limits, Traffic

POST = [HOST, JSON]
App = Callable[[Any, Any, Any], Any]


def door(app: App, limits: Limits = Limits(), traffic: Traffic | None = None, log: Any = None) -> Door:  # noqa: B008
    return Door(app, Access(), limits, traffic or Traffic(), log)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body."""
    message = await receive()
    assert not message["more_body"], "the door reads the body whole"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def streaming(parts: list[bytes | None], kind: bytes = b"text/event-stream") -> App:
    """Sends these parts; None waits forever."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for part in parts:
            if part is None:
                await asyncio.Event().wait()
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """Never answers."""
    await asyncio.Event().wait()


def events(answer: Answer) -> list[Any]:
    """The data of each event; all of them are whole."""
    assert answer.body.endswith(b"\n\n") or not answer.body
    return [json.loads(line.strip().removeprefix(b"data: ")) for line in answer.body.split(b"\n\n") if line]


def test_a_body_up_to_the_limit_arrives_whole_and_a_byte_more_is_refused() -> None:
    limited = door(echo, Limits(body_bytes=1024))
    assert ask(limited, "POST", "/x", POST, [b"a" * 1000, b"b" * 24]).body == b"a" * 1000 + b"b" * 24
    answer = ask(limited, "POST", "/x", POST, [b"a" * 1000, b"b" * 25])
    assert answer.status == 413 and answer.error["code"] == "body_too_large"
    assert answer.header("connection") == "close"


def test_a_length_that_is_too_large_is_refused_before_the_body_is_asked_for() -> None:
    async def never_asked(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the application was asked")

    limited = door(never_asked, Limits(body_bytes=1024))
    for length in ("1025", "9" * 30):
        assert ask(limited, "POST", "/x", [*POST, ("content-length", length)], [b"a"]).status == 413


def test_the_rest_of_a_refused_body_is_read_before_the_connection_is_closed() -> None:
    """A connection closed with unread data is reset, and the client never sees why."""
    left = [b"a" * 1024] * 20

    async def receive() -> Any:
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    sent = []

    async def send(message: Any) -> None:
        sent.append((message, len(left)))

    asyncio.run(door(echo, Limits(body_bytes=1024))(scope_of("POST", "/x", POST), receive, send))
    assert [n for _, n in sent] == [18, 18, 0], "the answer goes out at once, the end when all was read"
    assert sent[1][0]["more_body"] and not sent[2][0].get("more_body")


@pytest.mark.parametrize("refused_for", ["its size", "its host"])
def test_a_refused_client_that_goes_on_sending_is_cut_off(monkeypatch: pytest.MonkeyPatch, refused_for: str) -> None:
    monkeypatch.setattr(exchanges, "LINGER_S", 0.2)
    hosts = HOST if refused_for == "its size" else ("host", "evil.example")

    async def endless() -> Any:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    limited = door(echo, Limits(body_bytes=10))
    scope = scope_of("POST", "/x", [hosts, JSON, ("transfer-encoding", "chunked")])
    asyncio.run(asyncio.wait_for(limited(scope, endless, send), 2))
    assert sent[0]["status"] == (413 if hosts == HOST else 421) and not sent[-1].get("more_body")


def test_a_body_that_does_not_come_is_refused_in_time() -> None:
    async def slow() -> Answer:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"a", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        await door(echo, Limits(body_s=0.2))(scope_of("POST", "/x", POST), receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges, "LINGER_S", 0.1)
        assert asyncio.run(asyncio.wait_for(slow(), 2)) == (408, "body_timeout")


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten() -> None:
    traffic = Traffic()

    async def gone() -> None:
        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("nobody listens")

        await door(echo, traffic=traffic)(scope_of("POST", "/x", POST), receive, send)

    asyncio.run(gone())
    assert not traffic.under_way


def test_a_request_that_takes_too_long_gets_an_error_or_an_error_event() -> None:
    brief = Limits(request_s=0.1)
    answer = ask(door(silent, brief), "POST", "/x", POST)
    assert answer.status == 408 and answer.error["code"] == "timeout" and answer.whole
    answer = ask(door(streaming([b'data: {"a":1}\n\n', None]), brief), "POST", "/x", POST)
    assert answer.status == 200 and answer.whole
    first, last = events(answer)
    assert first == {"a": 1} and last["error"]["code"] == "timeout"
    answer = ask(door(streaming([b"data: {}\n", None]), brief), "POST", "/x", POST)
    assert events(answer)[-1]["error"]["code"] == "timeout", "an event that was cut does not swallow the error"
    answer = ask(door(streaming([b"half of a file", None], b"text/css"), brief), "GET", "/x")
    assert answer.body == b"half of a file" and not answer.whole, (
        "the connection is closed, not ended as if it was whole"
    )


def test_the_time_of_an_application_that_times_out_itself_is_its_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError

    assert ask(door(app), "GET", "/x").status == 500


def test_what_follows_runs_has_no_time_limit_and_ends_when_the_server_stops() -> None:
    async def watch() -> tuple[float, Answer]:
        traffic = Traffic()
        asking = asyncio.create_task(
            ask_async(door(streaming([b"data: 1\n\n", None]), Limits(request_s=0.1), traffic), "GET", "/runs-events")
        )
        await asyncio.sleep(0.4)
        assert not asking.done()
        began_at = asyncio.get_running_loop().time()
        traffic.drain()
        answer = await asyncio.wait_for(asking, 2)
        return asyncio.get_running_loop().time() - began_at, answer

    elapsed_s, answer = asyncio.run(watch())
    assert elapsed_s < 0.2
    assert answer.whole and answer.body == b"data: 1\n\n", "ended, not cut"


def test_a_stopping_server_lets_answers_finish_and_refuses_new_requests() -> None:
    async def stop() -> tuple[Answer, Answer, Answer]:
        traffic, ready = Traffic(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await ready.wait()
            await echo(scope, receive, send)

        first = asyncio.create_task(ask_async(door(app, traffic=traffic), "POST", "/x", POST, [b"{}"]))
        await asyncio.sleep(0.05)
        traffic.drain()
        second = await ask_async(door(app, traffic=traffic), "POST", "/x", POST, [b"{}"])
        await asyncio.sleep(0.05)
        assert not first.done()
        assert len(traffic.under_way) == 1
        ready.set()
        late = asyncio.create_task(ask_async(door(silent, traffic=traffic), "POST", "/x", POST))
        return await first, second, await late

    first, second, late = asyncio.run(stop())
    assert first.status == 200 and first.body == b"{}"
    assert second.status == late.status == 503 and second.header("retry-after") == "5"
    assert second.error["code"] == "stopping"


def test_answers_that_are_cut_end_in_an_error_of_their_form() -> None:
    async def cut() -> list[Answer]:
        traffic = Traffic()
        apps = [silent, streaming([b"data: {}\n\n", None])]
        asking = [asyncio.create_task(ask_async(door(app, traffic=traffic), "POST", "/x", POST)) for app in apps]
        await asyncio.sleep(0.05)
        traffic.cut()
        traffic.cut()  # as a second signal does
        found = [await asyncio.wait_for(each, 2) for each in asking]
        assert not traffic.under_way
        return found

    whole, stream = asyncio.run(cut())
    assert whole.status == 503 and whole.error["code"] == "stopping"
    assert stream.whole and events(stream)[-1]["error"]["code"] == "stopping"
    assert b"[DONE]" not in stream.body


@pytest.mark.parametrize("began", [False, True])
def test_a_mistake_of_ours_shows_no_traceback_and_no_path(began: bool, capsys: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if began:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ValueError(f"secret of {__file__}\x1b[2J")

    answer = ask(door(app), "POST", "/x", POST)
    assert answer.whole and answer.status == (200 if began else 500)
    assert (events(answer)[-1]["error"] if began else answer.error)["code"] == "internal_error"
    assert b"secret" not in answer.body and b"Traceback" not in answer.body and b"/" not in answer.body
    shown = capsys.readouterr().err
    assert "ValueError: secret of" in shown and "\x1b" not in shown


def test_unknown_paths_and_methods_have_openai_s_form(tmp_path: Path) -> None:
    app = build_app({}, tmp_path)
    missing, wrong = ask(app, "GET", "/nothing"), ask(app, "POST", "/health", POST)
    assert (missing.status, missing.error["code"]) == (404, "not_found")
    assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
    assert wrong.header("allow") in ("GET, HEAD", "HEAD, GET")
    assert ask(app, "GET", "/health/").status == 404, "no redirect to a URL made of Host"


def test_an_error_of_the_application_itself_has_openai_s_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(dict[str, Any]):
        def items(self) -> Any:
            raise ValueError("secret")

    answer = ask(build_app(Broken(), tmp_path), "GET", "/health")
    assert answer.status == 500 and answer.error["code"] == "internal_error"
    assert "secret" in capsys.readouterr().err


def test_every_answer_has_the_headers_that_keep_a_browser_safe(tmp_path: Path) -> None:
    app = build_app({}, tmp_path)
    asked = {
        "page": ask(app, "GET", "/"),
        "health": ask(app, "GET", "/health"),
        "missing": ask(app, "GET", "/nothing"),
        "refused": ask(app, "GET", "/", [("host", "evil.example")]),
        "broken": ask(app, "POST", "/v1/completions", POST, [b"{"]),
    }
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    for name, answer in asked.items():
        assert answer.header("content-security-policy") == policy, name
        assert answer.header("x-content-type-options") == "nosniff", name
        assert answer.header("referrer-policy") == "no-referrer", name
        assert answer.header("cross-origin-opener-policy") == "same-origin", name
        assert answer.header("cross-origin-resource-policy") == "same-origin", name
        assert answer.header("cache-control") in ("no-store", "no-cache"), name
        assert answer.header("access-control-allow-origin") is None, name
        assert answer.header("server") is None, name


def test_health_tells_of_a_stop(tmp_path: Path) -> None:
    traffic = Traffic()
    app = build_app({}, tmp_path, traffic=traffic)
    assert json.loads(ask(app, "GET", "/health").body) == {"status": "ok", "models": {}}
    traffic.drain()
    answer = ask(app, "GET", "/health")
    assert answer.status == 503 and json.loads(answer.body)["status"] == "draining"


def test_the_log_has_a_safe_line_for_each_request_without_keys() -> None:
    lines: list[str] = []
    logged = door(echo, log=lines.append)
    headers = [*POST, ("authorization", "Bearer abc-secret")]
    ask(logged, "POST", "/x\x1b[2J\n\x9b31m?api_key=abc-secret", headers, [b"hello"])
    ask(logged, "GET", "/" + "y" * 5000, [("host", "evil.example")])
    assert len(lines) == 2 and "secret" not in "".join(lines)
    assert " POST /x\\x1b[2J\\n\\x9b31m 200 5 B " in lines[0] and lines[0].isprintable()
    assert " 421 " in lines[1] and len(lines[1]) < 300
