"""A real `regpt2 serve` in a process of its own, and its clients. In: a bench; out: a port; requests, streams, figures.

Everything listens at and connects to 127.0.0.1 only.
"""

import json
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zygote
from suite import Bench

from regpt2 import cli
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native

ANSWER_S = 2.0
"""Within this time everything must be answered that waits for no token and for no slow client."""
READY = "Stop with Ctrl-C"
BLOCK_SIZE = 1024


@dataclass(frozen=True)
class Server:
    """One that runs."""

    trial: zygote.Trial
    port: int

    def health(self) -> dict[str, Any]:
        """The load of its only model."""
        _, body = self.ask("GET", "/health")
        return dict(json.loads(body)["models"]["model"])

    def ask(self, method: str, path: str, body: Any = None, *lines: str) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 if there is none in time."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.say(request(self.port, method, path, data, *lines))

    def say(self, data: bytes, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """Send these bytes and read until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as client:
            with suppress(OSError):  # it may refuse before it has read all
                client.sendall(data)
            answer = rest(client)
        head, _, body = answer.partition(b"\r\n\r\n")
        return status(head), body

    @contextmanager
    def stream(self, **fields: Any) -> "Iterator[Stream]":
        """A completion that is streamed."""
        body = {"prompt": "a", "temperature": 0, "stream": True, "max_tokens": 1000, **fields}
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(request(self.port, "POST", "/v1/completions", json.dumps(body).encode()))
            yield Stream(client)

    def memory_bytes(self) -> int:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.trial.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def processor_s(self) -> tuple[float, float]:
        """How long its threads have run, and how long they waited for a core while they could have run."""
        counts = [path.read_text().split() for path in Path(f"/proc/{self.trial.pid}/task").glob("*/schedstat")]
        return sum(int(each[0]) for each in counts) / 1e9, sum(int(each[1]) for each in counts) / 1e9


class Stream:
    """The events of one completion, read one by one."""

    def __init__(self, client: socket.socket) -> None:
        self.client, self.data = client, b""

    def read(self, n_events: int) -> int:
        """Read until N events have come; return how many have."""
        while self.data.count(b"data: ") < n_events and (more := self.client.recv(65536)):
            self.data += more
        return self.data.count(b"data: ")

    def read_all(self) -> bytes:
        """Up to the end of the connection."""
        self.data += rest(self.client)
        return self.data

    def leave(self, *, by_reset: bool) -> None:
        """Close, with a reset as of a process that was killed with data unread, or in order."""
        if by_reset:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()


def wrong_end(data: bytes, *, finished: bool) -> str:
    """What is wrong with a stream that ended: a cut line, no last chunk, no error where it did not finish."""
    head, _, chunks = data.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        return f"it began with {head[:40]!r}"
    if not chunks.endswith(b"0\r\n\r\n"):
        return f"the connection was cut: it ends in {chunks[-60:]!r}"
    events = [event for event in _unchunked(chunks).split(b"\n\n") if event]
    for event in events:
        try:
            content = event.removeprefix(b"data: ")
            last = None if content == b"[DONE]" else json.loads(content)
        except ValueError:
            return f"no whole event: {event[-60:]!r}"
    if finished:
        return "" if last is None else f"it ended without [DONE], in {events[-1][-100:]!r}"
    return "" if last is not None and last["error"]["code"] == "stopping" else f"no error event: {events[-1][-100:]!r}"


def _unchunked(chunks: bytes) -> bytes:
    data = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        n = int(size, 16)
        data, chunks = data + chunks[:n], chunks[n + 2 :]
    return data


def request(port: int, method: str, path: str, body: bytes = b"", *lines: str) -> bytes:
    """The bytes of a sound request; `lines` are more headers."""
    head = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close", *lines]
    if method == "POST":
        head += [f"Content-Length: {len(body)}"]
        head += (
            [] if any(line.lower().startswith("content-type") for line in lines) else ["Content-Type: application/json"]
        )
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def rest(client: socket.socket) -> bytes:
    """All bytes until the server closes the connection, or the socket's time is over."""
    parts = []
    with suppress(OSError):
        while more := client.recv(65536):
            parts.append(more)
    return b"".join(parts)


def status(answer: bytes) -> int:
    """The status of an answer; 0 for none."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def percentile(values: list[float], share: float) -> float:
    """The smallest value that this share of them does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


@contextmanager
def serving(bench: Bench, *options: object) -> Iterator[Server]:
    """`regpt2 serve` with a small model of random weights, in a fork; it is killed at the end if it still runs."""
    folder = bench.shared / "served" / "model"
    with bench.alone():
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            assert bench.fork(lambda: _write_model(folder)).wait() == 0, "the model could not be written"
    arguments = ["serve", folder, "--port", 0, "--device", "cpu", "--runs", folder.parent, *options]
    trial = bench.fork(lambda: cli.main([*map(str, arguments)]))
    try:
        assert trial.until(lambda: READY in trial.said), f"the server ended: {trial.said[-2000:]}"
        yield Server(trial, int(re.findall(r"http://127\.0\.0\.1:(\d+)/\n", trial.said)[0]))
    finally:
        trial.send(signal.SIGKILL)
        trial.wait(10)


@torch.no_grad()
def _write_model(folder: Path) -> int:
    """Random weights, but the rows of the end and of the padding are zero: greedy text never ends by itself."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=BLOCK_SIZE, vocab_size=257))
    model.wte.weight.mul_(5.0)
    model.wte.weight[256:] = 0.0
    native.write(model, folder, Vocabulary("bytes", load_tokenizer("bytes").fingerprint))
    return 0
