"""The server process: what it prints, a port in use, signals. One real `regpt2 serve`, and its server in a thread."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from asgi_client import HOST
from server_thread import connected, listening, rest, said, status, until_started

from regpt2.base.errors import Problem
from regpt2.serving.http.access import Access
from regpt2.serving.http.door import Door
from regpt2.serving.http.exchange import Limits, Traffic
from regpt2.serving.http.server import Server, bound, serve
from regpt2.serving.options import ServeOptions

KEY = "0123456789abcdef-secret"


@contextmanager
def process(folder: Path, *arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """`regpt2 serve` in a process of its own, its port, and what it printed until it was ready."""
    command = [sys.executable, "-m", "regpt2", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    serving = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert serving.stdout is not None
        shown = ""
        while "Stop with Ctrl-C" not in shown:
            line = serving.stdout.readline()
            assert line, f"it ended: {shown}{serving.communicate()[1]}"
            shown += line
        yield serving, int(re.findall(r"http://127.0.0.1:(\d+)/\n", shown)[0]), shown
    finally:
        serving.kill()
        serving.communicate()


@contextmanager
def asked(port: int, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        given = {"Content-Type": "application/json", "Connection": "close", **headers}
        connection.request(method, path, None if body is None else json.dumps(body), given)
        with connection.getresponse() as answer:
            yield answer


LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 200, "stream": True, "temperature": 0}


@pytest.mark.seconds
def test_serve_prints_where_it_is_asks_for_its_key_and_ends_with_0_when_it_is_stopped(
    model_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    options = (*model_folders, "--slots", 2, "--log-requests")
    with process(tmp_path, *options, REGPT2_API_KEY=KEY) as (serving, port, shown):
        assert re.search(
            r"\n  tiny       [\d.]+k parameters, 256 tokens of context, 2 slots in [\d.]+ MB of cache\n", shown
        )
        for line in (
            f"page       http://127.0.0.1:{port}/\n",
            f"API        http://127.0.0.1:{port}/v1  (",
            "/runs  (runs)\n",
        ):
            assert line in shown
        assert "tiny-chat" in shown and KEY not in shown and str(tmp_path) not in shown
        with asked(port, "GET", "/health") as answer:
            assert answer.status == 200 and answer.headers["Server"] is None and answer.headers["Date"]
            assert json.load(answer)["models"]["tiny"] == {"slots": 2, "active": 0, "waiting": 0, "tokens": 0}
        with asked(port, "POST", "/v1/completions", LONG) as answer:
            assert answer.status == 401
        with asked(port, "POST", "/v1/completions", LONG, Authorization=f"Bearer {KEY}") as answer:
            assert answer.status == 200 and answer.readline().startswith(b"data: ")
            serving.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n"), "what is under way is finished"
        out, err = serving.communicate(timeout=20)
        assert serving.returncode == 0 and err == ""
        assert out.splitlines()[-1] == "Stopped."
        logged = [line for line in out.splitlines() if " /v1/completions " in line]
        assert [line.split()[4] for line in logged] == ["401", "200"] and KEY not in out


def test_a_port_in_use_is_found_before_a_model_is_read(regpt2: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = regpt2("serve", "no-model", "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"regpt2: cannot listen at 127.0.0.1:{port}: Address already in use. "
        "Stop the program that uses it, or take another: --port 0 finds a free one.\n"
    )


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("198.51.100.1", 0, "cannot listen at 198.51.100.1:0: Cannot assign requested address. --host"),
        ("no-such-name.invalid", 0, "--host no-such-name.invalid: this name has no address here"),
    ],
)
def test_an_address_that_is_not_here_is_named(host: str, port: int, message: str) -> None:
    with pytest.raises(Problem, match=re.escape(message)), bound(host, port):
        pass


def test_a_model_that_cannot_be_read_is_one_line_and_frees_the_port(regpt2: Any, unused_port: int) -> None:
    done = regpt2("serve", "no-model", "--port", unused_port)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "no-model" in done.stderr
    with bound("127.0.0.1", unused_port):
        pass


def test_a_page_is_opened_when_clients_can_connect(
    model_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from regpt2.serving.http import server as module

    opened: list[str] = []

    def connect(url: str) -> bool:
        port = int(url.rstrip("/").rpartition(":")[2])
        with connected(port):
            opened.append(url)
        return True

    monkeypatch.setattr(module, "open_browser", connect)
    monkeypatch.setattr(Server, "run", lambda self, sockets: None)
    assert serve(ServeOptions((str(model_folders[0]),), port=0, device="cpu", open=True)) == 0
    assert f"page  {opened[0]}\n" in capsys.readouterr().out


def slow_stream(traffic: Traffic, n: int, every_s: float) -> Any:
    """Sends n events, then the end."""
    import asyncio

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(n):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(every_s)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return Door(app, Access(), Limits(), traffic)


def post(port: int) -> bytes:
    lines = (
        "POST /x HTTP/1.1",
        f"Host: localhost:{port}",
        "Content-Type: application/json",
        "Content-Length: 2",
        "",
        "{}",
    )
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(("drain_s", "finishes"), [(5.0, True), (0.2, False)])
def test_a_stop_lets_a_stream_finish_in_its_time_or_ends_it_by_an_error(drain_s: float, finishes: bool) -> None:
    traffic = Traffic()
    began_at = time.monotonic()
    with connected_server(slow_stream(traffic, 10, 0.06), drain_s) as (server, port), connected(port) as client:
        client.sendall(post(port))
        assert client.recv(65536)
        server.stop()
        time.sleep(0.15)
        if finishes:
            assert status(said(port, f"GET / HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n".encode())) == 503
            assert status(said(port, f"GET /health HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n".encode())) == 200
        data = rest(client)
    assert data.endswith(b"0\r\n\r\n"), "the last chunk: the answer is complete, not cut"
    assert (b"[DONE]" in data) == finishes and (b'"code": "stopping"' in data) == (not finishes)
    assert time.monotonic() - began_at < 4


@contextmanager
def connected_server(app: Door, drain_s: float) -> Iterator[tuple[Server, int]]:
    """As `listening`, and the server itself."""
    with bound("127.0.0.1", 0) as listener:
        listener.listen(16)
        server = Server(app, app.traffic, drain_s=drain_s)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until_started(server)
        yield server, listener.getsockname()[1]
        server.stop()
        thread.join(8)
        assert not thread.is_alive()


def test_a_second_ctrl_c_ends_at_once_and_another_sigterm_does_not() -> None:
    traffic = Traffic()
    with connected_server(slow_stream(traffic, 1000, 0.05), 60.0) as (server, port), connected(port) as client:
        client.sendall(post(port))
        assert client.recv(65536)
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        assert traffic.under_way and not server.hurried
        began_at = time.monotonic()
        server.handle_exit(signal.SIGINT, None)
        assert b'"code": "stopping"' in rest(client)
        assert time.monotonic() - began_at < 1
    assert server.hurried


def test_a_client_that_neither_reads_nor_leaves_does_not_hold_the_stop() -> None:
    async def gushing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})

    traffic = Traffic()
    began_at = time.monotonic()
    with connected_server(Door(gushing, Access(), Limits(), traffic), 0.1) as (server, port), connected(port) as client:
        client.sendall(f"GET /x HTTP/1.1\r\n{HOST[0]}: localhost:{port}\r\n\r\n".encode())
        time.sleep(0.3)
        server.stop()
    assert time.monotonic() - began_at < 5


def test_a_server_without_requests_stops_at_once() -> None:
    with listening(slow_stream(Traffic(), 1, 0.0), drain_s=60.0) as port, connected(port) as client:
        client.sendall(b"GET / HT")
        time.sleep(0.2)
        began_at = time.monotonic()
    assert time.monotonic() - began_at < 2
