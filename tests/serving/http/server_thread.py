"""A real server in a thread, and raw sockets to it. In: an application; out: its port; bytes in, bytes out."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regpt2.serving.http.connection import Patience
from regpt2.serving.http.server import Server, bound


@contextmanager
def listening(
    app: Any, patience: Patience | None = None, *, traffic: Any = None, drain_s: float = 0.0
) -> Iterator[int]:
    """The port of a server that runs until the end of the block."""
    traffic = app.traffic if traffic is None else traffic
    with bound("127.0.0.1", 0) as listener:
        listener.listen(256)
        server = Server(app, traffic, drain_s=drain_s, patience=patience)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until_started(server)
        try:
            yield listener.getsockname()[1]
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"


def until_started(server: Server) -> None:
    """asyncio leaves a socket open that it accepts while it stops to listen."""
    end_at = time.monotonic() + 10
    while not server.started and time.monotonic() < end_at:
        time.sleep(0.01)


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A client's socket; whatever it waits for fails after 5 s."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        yield client


def rest(client: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    data = []
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(65536):
            data.append(more)
    return b"".join(data)


def said(port: int, request: bytes) -> bytes:
    """What the server answers to these bytes, up to the end of the connection."""
    with connected(port) as client:
        client.sendall(request)
        return rest(client)


def status(answer: bytes) -> int:
    """Of the first answer; 0 for none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def seconds_until_closed(client: socket.socket) -> float:
    """How long the server keeps this connection from now on."""
    began_at = time.monotonic()
    rest(client)
    return time.monotonic() - began_at
