"""What clients do to a server (24 to 27). In: a bench; out: refused, served, drained, as promised?"""

import json
import random
import re
import selectors
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

from serving_process import (
    ANSWER_S,
    BLOCK_SIZE,
    Server,
    percentile,
    request,
    rest,
    serving,
    status,
    wrong_end,
)
from suite import Bench, Fault, Outcome

# 24: requests

NONSENSE: tuple[Any, ...] = (
    *(None, True, [], {}, "", "x" * 20_000, "\ud800", "\x00\x1b[2J", -1, 0, 1e308, -1e308, 10**400, 1.5, [[]] * 100),
    *({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}}, [None] * 5000, "../../etc/passwd", "<script>", [1e9]),
)
FIELDS = ("prompt", "model", "max_tokens", "n", "temperature", "top_p", "stop", "seed", "logprobs", "stream", "echo")
FIELDS += ("best_of", "logit_bias", "stream_options", "suffix", "user", "no_such_field", "messages", "text", "ids")
PLACES = ("/v1/completions", "/v1/completions", "/v1/chat/completions", "/attention")
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"NaN",
    b'{"a":1,"a":2}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"n":Infinity}',
    b"{}x",
)
PATHS = (
    "/v1/models/x",
    "/v1/models/%00",
    "/v1/models/..%2f..%2fetc",
    "/../etc/passwd",
    "/static/../app.py",
    "/runs/..%2f..",
)
PATHS += (
    "/static/%2e%2e/x",
    "/runs/%ff",
    "//",
    "/%",
    "/v1",
    "/health/",
    "/runs//events",
    "/runs/model/events/x",
    "/?" + "a" * 3000,
)
HEADS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("Host: evil.example",), 400),  # a second one
    (("Origin: https://evil.example",), 403),
    (("Origin: null",), 403),
    (("Origin: http://127.0.0.1:1",), 403),
    (("Sec-Fetch-Site: cross-site",), 403),
    (("Content-Type: text/plain",), 415),
    (("Content-Type: application/x-www-form-urlencoded",), 415),
    (("Content-Type: application/json", "Content-Type: text/plain"), 415),
    (("Transfer-Encoding: chunked",), 400),
    (("Content-Length: 1",), 400),
    (("X-A: " + "b" * 20_000,), 431),
    (tuple(f"X-{n}: b" for n in range(120)), 431),
)
HOSTS = {"": 400, "evil.example": 421, "localhost": 421, "127.0.0.1:1": 421, "[::1": 400, "localhost:": 400, "a b": 400}


def requests(bench: Bench) -> Outcome:
    """Bodies, paths, heads and bytes that make no sense: refused within 2 s, never by 5xx; the server goes on."""
    outcome, slowest = Outcome(), 0.0
    with serving(bench) as server:
        good = {"prompt": "a", "max_tokens": 8, "temperature": 0}
        before = server.ask("POST", "/v1/completions", good)
        for number in range(bench.planned):
            what, data, expected = _bad_request(bench.rng, number, server.port)
            began_at = time.monotonic()
            got, body = _said(server, data)
            elapsed_s = time.monotonic() - began_at
            slowest = max(slowest, elapsed_s)
            wrong = _wrong_answer(got, body, expected)
            wrong += [f"answered after {elapsed_s:.1f} s"] if elapsed_s > ANSWER_S else []
            outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
        after = server.ask("POST", "/v1/completions", good)
        if before[0] != 200 or _text(before[1]) != _text(after[1]):
            outcome.failures.append(f"afterwards a good request is answered by {after}, before by {before}")
        if "Traceback" in server.trial.said:
            outcome.failures.append(f"the server wrote {server.trial.said[-500:]}")
    outcome.remark = f"the slowest answer took {slowest:.2f} s"
    return outcome


def _text(body: bytes) -> Any:
    with suppress(ValueError, KeyError):
        return json.loads(body)["choices"][0]["text"]


def _bad_request(rng: random.Random, number: int, port: int) -> tuple[str, bytes, tuple[int, ...]]:
    """What is wrong with it, its bytes, and the statuses that are right; none given: any below 500, or no answer."""
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
    kind = number % 5
    if kind == 0:
        name, value = rng.choice(FIELDS), rng.choice(NONSENSE)
        place = rng.choice(PLACES)
        data = request(port, "POST", place, json.dumps(body | {name: value}).encode())
        return f"{place} with {name} = {value!r:.40}", data, tuple(range(200, 500))
    if kind == 1:
        data, path = rng.choice(BODIES), rng.choice(PLACES)
        return f"{path} with {data[:20]!r}", request(port, "POST", path, data), tuple(range(400, 500))
    if kind == 2:
        path, method = rng.choice(PATHS), rng.choice(("GET", "HEAD", "POST", "DELETE", "OPTIONS", "TRACE"))
        return f"{method} {path[:40]}", request(port, method, path, b"{}"), tuple(range(200, 500))
    if kind == 3:
        lines, expected = rng.choice(HEADS)
        if rng.random() < 0.5:
            host, expected = rng.choice(list(HOSTS.items()))
            data = request(port, "POST", "/v1/completions", b"{}").replace(b"127.0.0.1:%d" % port, host.encode(), 1)
            return f"Host: {host!r}", data, (expected,)
        return f"{lines[0][:40]!r}", request(port, "POST", "/v1/completions", b"{}", *lines), (expected,)
    good = request(port, "POST", "/v1/completions", json.dumps(body).encode())
    mutated = bytearray(good)
    for _ in range(rng.choice((1, 2, 5))):
        mutated[rng.randrange(good.index(b"\r\n\r\n"))] = rng.choice(b"\x00\n\r\x7f\xff :;,/?%AZaz09")
    return f"{bytes(mutated)!r}", bytes(mutated), ()


def _said(server: Server, data: bytes) -> tuple[int, bytes]:
    """The answer. The request may be incomplete: then the client closes its side, and the server must let it go."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S / 4) as client:
        with suppress(OSError):
            client.sendall(data)
        answer = b""
        with suppress(TimeoutError, ConnectionResetError):
            while more := client.recv(65536):
                answer += more
        if not answer:
            with suppress(OSError):
                client.shutdown(socket.SHUT_WR)
            client.settimeout(ANSWER_S)
            answer = rest(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    return status(head), body


def _wrong_answer(got: int, body: bytes, expected: tuple[int, ...]) -> list[str]:
    wrong = []
    if (got not in expected) if expected else got >= 500:
        wrong.append(f"status {got}, {body[:100]!r}")
    is_page = body.startswith(b"<!DOCTYPE html>")  # a run that is not there
    if got >= 400 and body and not is_page:
        with suppress(ValueError, KeyError, TypeError):
            return wrong + ([] if json.loads(body)["error"]["message"] else ["an error without a message"])
        wrong.append(f"an error that is not of OpenAI's form: {body[:100]!r}")
    return wrong


# 25: slow clients and those that leave

SLOW_CLOSED_S = 15.0
LEFT_S = 0.2
NOISE_S = 0.25  # of a machine that others use too; what a slow client could hold up is held for seconds
BEGINNINGS = (b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ", None)
"""Where a slow client is when it becomes slow; None: in the body."""


def slow_clients(bench: Bench) -> Outcome:
    """Sockets of 1 byte/s are closed within 15 s, others are served, and who leaves frees its slot at once."""
    outcome = Outcome()
    n_leaving = min(8, max(1, bench.planned // 12))
    with serving(bench, "--slots", 4) as server:
        _completions(server, 10)
        quiet_s = percentile(_completions(server, 40), 0.99)
        with ExitStack() as stack:
            slow = _open_slow(server.port, bench.planned - n_leaving, stack)
            trickle = threading.Thread(target=_trickle, args=(slow,), daemon=True)
            trickle.start()
            busy_s = percentile(_completions(server, 40), 0.99)
            for number in range(n_leaving):
                wrong = _leave(server, quiet_s, by_reset=number % 2 == 0, streams=number % 4 < 2)
                outcome.fired(not wrong, f"client {number} that leaves: {wrong}")
            trickle.join(SLOW_CLOSED_S + 10)
            longest = max(each.closed_s or 99.0 for each in slow)
            for number, each in enumerate(slow):
                in_time = each.closed_s is not None and each.closed_s <= SLOW_CLOSED_S
                outcome.fired(in_time, f"slow client {number} of {each.kind!r}: closed after {each.closed_s} s")
        if busy_s > 2 * quiet_s + NOISE_S:
            outcome.failures.append(f"p99 of others is {busy_s * 1000:.0f} ms, without slow ones {quiet_s * 1000:.0f}")
        if (load := server.health())["active"] or load["waiting"]:
            outcome.failures.append(f"afterwards the load is {load}")
    outcome.remark = f"p99 of others {busy_s * 1000:.0f} ms ({quiet_s * 1000:.0f}), slow ones closed in {longest:.1f} s"
    return outcome


def _completions(server: Server, n: int) -> list[float]:
    """Seconds of each of N short completions, one after the other."""
    times = []
    for _ in range(n):
        began_at = time.monotonic()
        got, body = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4, "temperature": 0})
        assert got == 200, body
        times.append(time.monotonic() - began_at)
    return times


class _Slow:
    """A client that sends a byte each second."""

    def __init__(self, port: int, kind: bytes | None, stack: ExitStack) -> None:
        self.kind = kind
        self.client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        head = request(port, "POST", "/v1/completions", b"{" * 1000)[:-999]
        self.client.sendall(head if kind is None else kind)
        self.client.setblocking(False)
        self.began_at = time.monotonic()
        self.closed_s: float | None = None

    def is_open(self) -> bool:
        """Has the server closed it? Sends nothing."""
        try:
            while self.client.recv(65536):
                pass
        except BlockingIOError:
            return True
        except OSError:
            pass
        self.closed_s = time.monotonic() - self.began_at
        return False


def _open_slow(port: int, n: int, stack: ExitStack) -> list[_Slow]:
    return [_Slow(port, BEGINNINGS[number % len(BEGINNINGS)], stack) for number in range(n)]


def _trickle(slow: list[_Slow]) -> None:
    """One byte a second for each, until all are closed."""
    still, sent_at, end_at = list(slow), 0.0, time.monotonic() + SLOW_CLOSED_S + 2
    while still and time.monotonic() < end_at:
        still = [each for each in still if each.is_open()]
        if time.monotonic() - sent_at >= 1.0:
            sent_at = time.monotonic()
            for each in still:
                if each.kind != b"":  # half open: a connection, and nothing else
                    with suppress(OSError):
                        each.client.send(b"a")
        time.sleep(0.1)


def _leave(server: Server, quiet_s: float, *, by_reset: bool, streams: bool) -> str:
    """Leave in mid-answer. Slots are free within a token and 0.2 s; what is measured ends with an answer of /health."""
    with server.stream(stream=streams) as stream:
        if streams:
            began_at = time.monotonic()
            stream.read(10)
            token_s = (time.monotonic() - began_at) / 10
        else:
            if not _seen(lambda: server.health()["active"] == 1, 5):
                return "it was never active"
            token_s = 0.05
        left_at = time.monotonic()
        stream.leave(by_reset=by_reset)
        asked_at = left_at
        while (load := server.health())["active"] and asked_at - left_at < 5:
            asked_at = time.monotonic()
    if load["active"] or asked_at - left_at > LEFT_S + token_s + quiet_s:
        return f"active still {asked_at - left_at:.2f} s later"
    time.sleep(0.05)
    return "" if server.health()["tokens"] == load["tokens"] else "its text is still written"


def _seen(what: Any, within_s: float) -> bool:
    end_at = time.monotonic() + within_s
    while not what():
        if time.monotonic() > end_at:
            return False
    return True


# 26: load

CONNECTIONS, PER_S, GOAL_S = 32, 500.0, 0.05
MOST_GROWTH_BYTES = 20_000_000


def load(bench: Bench) -> Outcome:
    """/health over 32 connections while 8 clients generate on 2 slots: quick, flat in memory, 200 or 429."""
    outcome = Outcome()
    with serving(bench, "--slots", 2, "--queue", 2) as server:
        alone = bench.ask(lambda: _hammer(server.port, min(1000, bench.planned)))
        stop, codes = threading.Event(), list[int]()
        clients = [threading.Thread(target=_generate, args=(server, stop, codes), daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        warm = bench.ask(lambda: _hammer(server.port, min(1000, bench.planned)))
        before, (ran_before_s, waited_before_s) = server.memory_bytes(), server.processor_s()
        found = bench.ask(lambda: _hammer(server.port, bench.planned))
        ran_s, waited_s = server.processor_s()
        growth = server.memory_bytes() - before
        stop.set()
        for client in clients:
            client.join(30)
        left = server.health()
    for got in found["codes"]:
        outcome.fired(got == 200, f"/health was answered by {got}")
    p99_s, alone_s = _calmest(found["times"]), _calmest(alone["times"])
    # On a machine that others use, the thread that answers waits for a core, and then for the thread that has the
    # interpreter's lock and waits for a core itself: hence the square. With cores for both it is 1.
    busy = 1 + (waited_s - waited_before_s) / max(1e-3, ran_s - ran_before_s)
    if p99_s > GOAL_S * busy**2:
        outcome.failures.append(f"p99 of /health is {p99_s * 1000:.0f} ms; alone {alone_s * 1000:.0f} ms")
    if growth > MOST_GROWTH_BYTES:
        outcome.failures.append(f"memory grew by {growth / 1e6:.0f} MB in {bench.planned} requests")
    if set(codes) != {200, 429}:
        outcome.failures.append(f"clients that generate were answered by {sorted(set(codes))}, not by 200 and 429")
    if left["active"] or left["waiting"] or set(warm["codes"]) != {200}:
        outcome.failures.append(f"afterwards the load is {left}")
    outcome.remark = (
        f"p99 {p99_s * 1000:.0f} ms ({alone_s * 1000:.0f} alone; {busy:.1f} x slowed), +{growth / 1e6:.1f} MB, "
        f"{codes.count(200)} written, {codes.count(429)} x 429"
    )
    return outcome


def _generate(server: Server, stop: threading.Event, codes: list[int]) -> None:
    """Ask for completions until told to stop; who is refused asks again after a moment."""
    while not stop.is_set():
        got, _ = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 64, "temperature": 0})
        codes.append(got)
        if got != 200:
            stop.wait(0.05)


def _hammer(port: int, n: int) -> dict[str, list[Any]]:
    """/health n times over kept connections, at a steady pace: status, and seconds since it was due."""
    data = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    times, codes, due, answers = list[float](), list[int](), dict[Any, float](), dict[Any, bytes | None]()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        free = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(CONNECTIONS)
        ]
        for client in free:
            selector.register(client, selectors.EVENT_READ)
            answers[client] = b""
        began_at, sent, end_at = time.monotonic(), 0, time.monotonic() + n / PER_S + 30
        while len(codes) < n and time.monotonic() < end_at:
            while sent < n and free and began_at + sent / PER_S <= time.monotonic():
                client = free.pop(0)
                client.sendall(data)
                due[client], sent = began_at + sent / PER_S, sent + 1
            for key, _ in selector.select(0.002):
                _take(key.fileobj, selector, answers)
                if (answer := answers[key.fileobj]) is not None and _is_whole(answer):
                    times.append(time.monotonic() - due[key.fileobj])
                    codes.append(status(answer))
                    answers[key.fileobj] = b""
                    free.append(key.fileobj)
    return {"times": times, "codes": codes + [0] * (n - len(codes))}


def _calmest(times: list[float]) -> float:
    """The p99 of the calmest quarter: what the server does is in every quarter, what else the machine does is not."""
    n = max(1, len(times) // 4)
    return min(percentile(times[begin : begin + n], 0.99) for begin in range(0, 4 * n, n) if times[begin : begin + n])


def _take(client: Any, selector: selectors.BaseSelector, answers: dict[Any, bytes | None]) -> None:
    """Read what has come; None for a connection that was closed, whose answer is lost."""
    data = client.recv(65536)
    if not data:
        selector.unregister(client)
    answers[client] = (answers[client] or b"") + data if data else None


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) == int(length[1])


# 27: SIGTERM

DRAINED_S = 10.0


def sigterm(bench: Bench) -> Outcome:
    """SIGTERM while texts are streamed: they finish, or end in an error event once the time is over; exit code 0."""
    outcome, slowest = Outcome(), 0.0
    cases: list[tuple[int, int, float, signal.Signals]] = [
        # streams, tokens of each, seconds to drain
        (1, 300, 10.0, signal.SIGTERM),
        (8, BLOCK_SIZE - 10, 0.3, signal.SIGTERM),
        (8, 100, 10.0, signal.SIGINT),
        (3, 300, 10.0, signal.SIGTERM),
        (3, BLOCK_SIZE - 10, 0.0, signal.SIGTERM),
        (0, 0, 10.0, signal.SIGTERM),
    ]
    for n, n_tokens, drain_s, number in cases[: bench.planned]:
        with serving(bench, "--drain-s", drain_s) as server, ExitStack() as stack:
            streams = [stack.enter_context(server.stream(max_tokens=n_tokens)) for _ in range(n)]
            for stream in streams:
                stream.read(5)
            stopped_at = time.monotonic()
            server.trial.send(number)
            for stream in streams:
                stream.read_all()
            code, elapsed_s = server.trial.wait(30), time.monotonic() - stopped_at
        finished = n_tokens < BLOCK_SIZE // 2
        wrong = {wrong_end(stream.data, finished=finished) for stream in streams} - {""}
        wrong |= {f"exit code {code}"} if code else set()
        wrong |= {f"after {elapsed_s:.1f} s"} if elapsed_s > DRAINED_S else set()
        outcome.fired(not wrong, f"{n} streams, {number.name}, {drain_s} s: {'; '.join(wrong)}")
        slowest = max(slowest, elapsed_s)
    if bench.planned > len(cases):
        wrong_code = _real_command(bench)
        outcome.fired(not wrong_code, wrong_code)
    outcome.remark = f"it ended within {slowest:.1f} s"
    return outcome


def _real_command(bench: Bench) -> str:
    """The same by `python -m regpt2 serve`, signaled by another process."""
    folder = bench.shared / "served" / "model"
    process = bench.start("serve", folder, "--port", 0, "--device", "cpu")
    assert process.stdout is not None
    try:
        while "Stop with Ctrl-C" not in (line := process.stdout.readline()):
            assert line, "it ended before it was ready"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        return "the command did not end"
    finally:
        process.kill()
        process.communicate()
    return "" if process.returncode == 0 and not err else f"exit code {process.returncode}: {out}{err}"


FAULTS = [
    Fault(24, "requests to a server", (300, 1000), requests),
    Fault(25, "slow clients", (108, 108), slow_clients),
    Fault(26, "load on a server", (2000, 5000), load),
    Fault(27, "SIGTERM to a server", (3, 7), sigterm),
]
