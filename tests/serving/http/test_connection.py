"""Bytes that are no HTTP, and clients that are slow, silent, many: real sockets to a real server."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server_thread import connected, listening, rest, said, seconds_until_closed, status

from regpt2.serving.app import build_app
from regpt2.serving.http.access import Access
from regpt2.serving.http.connection import Patience
from regpt2.serving.http.door import Door
from regpt2.serving.http.exchange import Limits, Traffic

HURRIED = Patience(head_s=0.4, body_s=0.8, stalled_s=0.5, most_connections=8, check_s=0.05)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server without models that soon loses patience."""
    app = build_app({}, tmp_path_factory.mktemp("runs"), limits=Limits(body_bytes=1024, body_s=0.5))
    with listening(app, HURRIED) as found:
        yield found


def request(port: int, *lines: str, method: str = "GET", path: str = "/health", version: str = "HTTP/1.1") -> bytes:
    head = [f"{method} {path} {version}", f"Host: 127.0.0.1:{port}", "Connection: close", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1")


POST = ("Content-Type: application/json",)


def malformed(port: int) -> dict[str, tuple[bytes, int]]:
    """Requests, and the status that each must get."""
    host = b"Host: 127.0.0.1:%d\r\n" % port
    post = b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    return {
        "no request line": (b"\r\n\r\n\r\n\r\n", 400),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n", 400),
        "an unknown version": (b"GET / HTTP/9.9\r\n" + host + b"\r\n", 400),
        "HTTP/0.9": (b"GET /\r\n\r\n", 400),
        "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        "HTTP/1.0 without Host": (b"GET / HTTP/1.0\r\n\r\n", 400),
        "HTTP/1.1 without Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
        "an empty Host": (b"GET / HTTP/1.1\r\nHost: \r\n\r\n", 400),
        "two Hosts": (b"GET / HTTP/1.1\r\n" + host + host + b"\r\n", 400),
        "another Host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 421),
        "a whole URL": (b"GET http://evil.example/ HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 400),
        "our own whole URL": (b"GET http://localhost/ HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 400),
        "no path": (b"OPTIONS * HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 400),
        "CONNECT": (b"CONNECT evil.example:80 HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 400),
        "bare LF everywhere": (b"GET / HTTP/1.1\n" + host.replace(b"\r", b"") + b"\n", 400),
        "one bare LF": (b"GET / HTTP/1.1\r\n" + host + b"X-A: 1\nX-B: 2\r\n\r\n", 400),
        "bare LF at the end": (b"GET / HTTP/1.1\r\n" + host + b"X-A: 1\r\n\n", 400),
        "a bare CR": (b"GET / HTTP/1.1\r\n" + host + b"X-A: 1\rX-B: 2\r\n\r\n", 400),
        "a NUL in a header": (b"GET / HTTP/1.1\r\n" + host + b"X-A: a\x00b\r\n\r\n", 400),
        "a NUL in the path": (b"GET /\x00 HTTP/1.1\r\n" + host + b"\r\n", 400),
        "a space before the colon": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        "a header without a colon": (b"GET / HTTP/1.1\r\n" + host + b"nothing\r\n\r\n", 400),
        "two Content-Lengths": (post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x", 400),
        "a list of Content-Lengths": (post + b"Content-Length: 2, 3\r\n\r\n{}x", 400),
        "a negative Content-Length": (post + b"Content-Length: -2\r\n\r\n{}", 400),
        "a signed Content-Length": (post + b"Content-Length: +2\r\n\r\n{}", 400),
        "a hexadecimal Content-Length": (post + b"Content-Length: 0x2\r\n\r\n{}", 400),
        "Content-Length and chunks": (
            post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
            400,
        ),
        "chunks in HTTP/1.0": (
            post.replace(b"1.1", b"1.0", 1) + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            400,
        ),
        "an unknown coding": (post + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 501),
        "two codings": (post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        "chunked twice": (post + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        "a chunk of no number": (post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
        "a chunk of a huge number": (post + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n", 400),
        "a chunk that is longer than it says": (post + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n", 400),
        "a long header": (b"GET / HTTP/1.1\r\n" + host + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n", 431),
        "a long path": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n" + host + b"\r\n", 431),
        "many headers": (b"GET / HTTP/1.1\r\n" + host + b"Connection: close\r\n" + b"X-A: b\r\n" * 200 + b"\r\n", 431),
        "a body that is too large": (post + b"Content-Length: 99999999\r\n\r\n" + b"a" * 300_000, 413),
        "chunks that are too large": (
            post + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 0x400 + b"\r\n" + b"1\r\na\r\n0\r\n\r\n",
            413,
        ),
    }


@pytest.mark.parametrize("name", malformed(0))
def test_what_is_no_sound_request_is_refused_at_once(port: int, name: str) -> None:
    data, expected = malformed(port)[name]
    began_at = time.monotonic()
    answer = said(port, data)
    assert status(answer) in ((expected, 400) if expected == 501 else (expected,)), answer[:300]
    assert time.monotonic() - began_at < 2
    head, _, body = answer.partition(b"\r\n\r\n")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert b"content-security-policy: default-src 'none'" in head and b"server:" not in head.lower()


def test_a_sound_request_is_answered_in_one_piece_and_byte_by_byte(port: int) -> None:
    assert status(said(port, request(port))) == 200
    with connected(port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request(port):
            client.sendall(bytes([byte]))
        assert status(rest(client)) == 200


def test_lf_in_a_body_is_data_however_the_bytes_arrive(port: int) -> None:
    body = b'{\n"model": 1\n}\n\n'
    data = request(port, *POST, f"Content-Length: {len(body)}", method="POST", path="/v1/completions") + body
    expected = said(port, data)
    assert status(expected) in (400, 404) and b"bad_http" not in expected
    for cut in (*range(len(data) - len(body) - 5, len(data) - len(body) + 5), len(data) - 3):
        with connected(port) as client:
            client.sendall(data[:cut])
            time.sleep(0.005)
            client.sendall(data[cut:])
            assert rest(client).split(b"\r\n\r\n")[1] == expected.split(b"\r\n\r\n")[1], cut


def test_requests_on_one_connection_are_answered_in_order(port: int) -> None:
    first = request(port).replace(b"Connection: close\r\n", b"")
    answer = said(port, first + first + request(port, path="/nothing"))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"404"]


def test_a_refused_body_does_not_become_the_next_request(port: int) -> None:
    """The body of a refused request holds a request: it must not be answered."""
    inner = request(port)
    head = f"POST /x HTTP/1.1\r\nHost: evil.example\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
    assert said(port, head + inner).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("begin", "expected", "within_s"),
    [
        (b"", 408, 0.4),
        (b"G", 408, 0.4),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-", 408, 0.4),
        (
            b"POST / HTTP/1.1\r\nHost: localhost:{}\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
            408,
            0.5,
        ),
    ],
    ids=["nothing", "a byte", "half a head", "half a body"],
)
@pytest.mark.parametrize("trickles", [False, True])
def test_a_slow_request_is_refused_and_its_connection_closed(
    port: int, begin: bytes, expected: int, within_s: float, trickles: bool
) -> None:
    data_sent = begin.replace(b"{}", b"%d" % port)
    with connected(port) as client:
        began_at = time.monotonic()
        client.sendall(data_sent)
        client.settimeout(0.05)
        data = b""
        while time.monotonic() - began_at < 5:
            try:
                if not (more := client.recv(65536)):
                    break
                data += more
            except TimeoutError:
                pass
            except OSError:
                break
            if trickles and not data:
                with contextlib.suppress(OSError):
                    client.sendall(b"a")
        elapsed_s = time.monotonic() - began_at
    # A byte that arrives after the end resets the connection, and the client may lose the answer.
    assert status(data) == expected or (trickles and not data)
    assert within_s <= elapsed_s < 4


def test_an_idle_connection_may_wait_longer_than_a_slow_one(port: int) -> None:
    with connected(port) as client:
        client.sendall(request(port).replace(b"Connection: close\r\n", b""))
        time.sleep(0.8)  # twice the time of a head
        client.sendall(request(port))
        assert rest(client).count(b"HTTP/1.1 200") == 2


def test_a_client_that_has_its_answer_but_trickles_its_body_is_closed(port: int) -> None:
    """The route does not exist, so the answer comes before the body is whole."""
    head = request(port, "Content-Length: 100000", method="DELETE", path="/nothing")
    with connected(port) as client:
        client.sendall(head.replace(b"Connection: close\r\n", b""))
        began_at = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began_at < 4:
                client.sendall(b"a")
                time.sleep(0.05)
                assert client.fileno() > 0
        assert time.monotonic() - began_at < 4


def test_a_client_that_leaves_half_open_is_closed_at_once(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET / HT")
        client.shutdown(socket.SHUT_WR)
        assert seconds_until_closed(client) < 0.3


async def gushing(scope: Any, receive: Any, send: Any) -> None:
    """Far more than the kernel buffers."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for _ in range(400):
        await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_a_client_that_does_not_read_is_closed_and_one_that_reads_slowly_is_not() -> None:
    traffic = Traffic()
    with listening(Door(gushing, Access(), Limits(), traffic), HURRIED) as port, ExitStack() as stack:
        stalled, slow = (stack.enter_context(connected(port)) for _ in range(2))
        for client in (stalled, slow):
            client.sendall(request(port, path="/x"))
        began_at, n_read = time.monotonic(), 0
        while time.monotonic() - began_at < 1.5:
            n_read += len(slow.recv(65536))
            time.sleep(0.01)
        assert len(traffic.under_way) == 1, "the other one is still there"
        slow_rest = rest(slow)
        assert n_read + len(slow_rest) > 400 * 65536
        assert len(rest(stalled)) < 400 * 65536


def test_too_many_connections_are_refused_and_those_that_are_open_stay(port: int) -> None:
    with ExitStack() as stack:
        kept = [stack.enter_context(connected(port)) for _ in range(HURRIED.most_connections)]
        kept[0].sendall(request(port).replace(b"Connection: close\r\n", b""))
        assert status(kept[0].recv(65536)) == 200
        assert status(said(port, b"")) == 503
        kept[1].sendall(request(port))
        assert status(rest(kept[1])) == 200
    deadline = time.monotonic() + 5
    while status(said(port, request(port))) != 200:
        assert time.monotonic() < deadline


def test_one_who_waits_to_be_asked_for_the_body_is_asked_only_if_it_may_send_it(port: int) -> None:
    def asking(length: int, host: str) -> bytes:
        lines = (*POST, f"Content-Length: {length}", "Expect: 100-continue")
        return request(port, *lines, method="POST", path="/nothing").replace(
            f"127.0.0.1:{port}".encode(), host.encode()
        )

    with connected(port) as client:
        client.sendall(asking(2, f"localhost:{port}"))
        assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"{}")
        assert status(rest(client)) == 404
    assert status(said(port, asking(2, "evil.example"))) == 421
    assert status(said(port, asking(2000, f"localhost:{port}"))) == 413


def test_an_upgrade_to_a_websocket_is_no_way_around_the_door(port: int) -> None:
    lines = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    asking = request(port, *lines, path="/nothing").replace(b"close", b"Upgrade")
    for data, expected in ((asking, 404), (asking.replace(b"127.0.0.1", b"evil.example"), 421)):
        with connected(port) as client:
            client.sendall(data)
            assert status(client.recv(65536)) == expected


def test_a_client_that_leaves_is_told_to_the_application(tmp_path: Path) -> None:
    left: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        left.append(time.monotonic())

    with listening(Door(app, Access(), Limits(), Traffic()), HURRIED) as port:
        with connected(port) as client:
            client.sendall(request(port))
            time.sleep(0.1)
        gone_at = time.monotonic()
        while not left and time.monotonic() - gone_at < 2:
            time.sleep(0.005)
    assert left and left[0] - gone_at < 0.2
