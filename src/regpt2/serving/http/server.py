"""The server process. In: options; out: an exit code, when it was stopped."""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from regpt2.base.console import say
from regpt2.base.errors import Problem, UsageError
from regpt2.base.net.api_key import VARIABLE, read_api_key
from regpt2.base.net.browser import open_browser
from regpt2.serving.app import build_app
from regpt2.serving.http.access import MOST_HEADER_BYTES, Access
from regpt2.serving.http.connection import Connection, Patience
from regpt2.serving.http.exchange import Limits, Traffic
from regpt2.serving.http.opening import announce
from regpt2.serving.models import serving
from regpt2.serving.options import ServeOptions

MENDS = {
    errno.EADDRINUSE: "Stop the program that uses it, or take another: --port 0 finds a free one.",
    errno.EACCES: "Ports below 1024 belong to the system: take one above, as --port 8000.",
    errno.EADDRNOTAVAIL: "--host must be an address of this machine, as 127.0.0.1.",
}
KEEP_ALIVE_S = 15
BACKLOG = 256
# What the kernel keeps for a client that reads slowly. By default it grows to megabytes, and whether the client reads
# at all is seen only when a third of that is free again.
SEND_BUFFER_BYTES = 256 * 1024


def serve(options: ServeOptions) -> int:
    """Serve until a signal ends it: 0 after the requests under way have finished or were cut, 130 if that was hurried.

    Raises:
        UsageError: an option makes no sense.
        Problem: the port is in use, a model cannot be read.
    """
    options.check()
    access = access_of(options)
    with bound(options.host, options.port) as listener, serving(options) as models:
        url = f"http://{_in_url(options.host)}:{listener.getsockname()[1]}"
        traffic = Traffic()
        limits = Limits(body_bytes=options.body_kb * 1024, request_s=options.timeout_s)
        log = say if options.log_requests else None
        app = build_app(models, options.runs, access=access, limits=limits, traffic=traffic, log=log)
        server = Server(app, traffic, drain_s=options.drain_s, patience=Patience(most_connections=options.connections))
        gc.collect()
        gc.freeze()  # what models and libraries hold is for good: a full collection would stop all requests for it
        with _naming(options):
            listener.listen(BACKLOG)  # from here on a client can connect
        with server.capture_signals():  # whoever reads that it is ready may stop it at once
            announce(models, options, url, needs_key=access.key is not None)
            if options.open:
                open_browser(f"{url}/")
            server.run(sockets=[listener])
        say("Stopped.")
    return 130 if server.hurried else 0


def access_of(options: ServeOptions) -> Access:
    """Who may ask, by these options and the API key.

    Raises:
        UsageError: others than this machine can connect, and there is no key.
    """
    key = read_api_key(options.api_key_file)
    if key is None and not options.is_local:
        raise UsageError(
            f"--host {options.host} lets other machines in, so it needs an API key: --api-key-file FILE, or {VARIABLE}."
        )
    own_name = () if options.is_local else (socket.gethostname().lower(),)
    return Access(options.host.lower(), (*options.allow_host, *own_name), options.allow_origin, key)


class Server(uvicorn.Server):
    """uvicorn's server, which on its first signal takes no more requests and lets those under way finish."""

    def __init__(self, app: Any, traffic: Traffic, *, drain_s: float, patience: Patience | None = None) -> None:
        protocol: Any = partial(Connection, patience=patience or Patience())
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.CRITICAL,  # the door reports what goes wrong
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        )
        super().__init__(config)
        self.traffic, self.drain_s = traffic, drain_s
        self.hurried = False
        self._stopping_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one drains, Ctrl-C after it ends at once."""
        if self._stopping_at is None:
            self.stop()
        elif sig == signal.SIGINT:
            self.hurried = True

    def stop(self) -> None:
        """As the first signal. From any thread."""
        self._stopping_at = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it time to end?"""
        await super().on_tick(counter)
        if self._stopping_at is None:
            return False
        if not self.traffic.draining:
            self.traffic.drain()
            await asyncio.sleep(0)  # those that follow something end
            if n := len(self.traffic.under_way):
                say(f"Stopping: {n} request{'s' * (n != 1)} may finish within {self.drain_s:g} s.")
        late = self.hurried or time.monotonic() - self._stopping_at >= self.drain_s
        if self.traffic.under_way and not late:
            return False
        self.traffic.cut()
        self.force_exit = self.hurried
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all; clients that read nothing of what waits for them are cut off."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to this address, not yet listening: a port in use is found before models are loaded.

    Raises:
        Problem: the address is unknown or in use, or not ours to take.
    """
    with _naming_address(host, port):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    with listener:
        with _naming_address(host, port):
            if os.name == "posix":  # elsewhere it would share the port with another program
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
            listener.bind(address)
        yield listener


def _naming(options: ServeOptions) -> Any:
    return _naming_address(options.host, options.port)


@contextmanager
def _naming_address(host: str, port: int) -> Iterator[None]:
    """An error about an address becomes one that names it, and what to do."""
    try:
        yield
    except socket.gaierror as error:
        raise Problem(f"--host {host}: this name has no address here ({error.strerror}).") from None
    except OSError as error:
        mend = MENDS.get(error.errno or 0, "")
        raise Problem(f"cannot listen at {_in_url(host)}:{port}: {os.strerror(error.errno or 0)}. {mend}") from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
