"""Servers in processes of their own. In: a command; out: a port that answers, and what the process holds."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
START_S, STOP_S = 120.0, 20.0


class ServerFailed(Exception):
    """A server ended, or did not answer in time; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    rss_bytes: int
    descriptors: int
    sockets: int
    threads: int


@dataclass(frozen=True)
class Server:
    """A process that serves."""

    port: int
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def lines(self) -> list[str]:
        """What it has written so far."""
        size = self.output.seek(0, os.SEEK_END)
        return os.pread(self.output.fileno(), size, 0).decode(errors="replace").splitlines()

    def held(self) -> Held:
        """What it holds now (Linux)."""
        return held_by(self.process.pid)

    def cpu_s(self) -> float:
        """Processor time that it has used (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def held_by(pid: int) -> Held:
    """What a process holds now (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    rss, threads = (int(re.search(rf"^{key}:\s+(\d+)", status, re.M)[1]) for key in ("VmRSS", "Threads"))  # type: ignore[index]
    return Held(1024 * rss, len(links), sum(link.startswith("socket:") for link in links), threads)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def regpt2_command(model: str, port: int, *options: str) -> list[str]:
    """`regpt2 serve`."""
    return [sys.executable, "-m", "regpt2", "serve", model, "--port", str(port), *options]


def llama_cpp_command(gguf: Path, port: int, *, slots: int, context: int, threads: int) -> list[str]:
    """llama.cpp's server."""
    sizes = (str(n) for n in (port, slots, context, threads))
    return [sys.executable, str(HERE / "llama_server.py"), str(gguf), *sizes]


@contextmanager
def started(command: Sequence[str], port: int) -> Iterator[Server]:
    """The server, once it answers at /health; it is stopped with the block.

    Raises:
        ServerFailed: it ended, or did not answer.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        server = Server(port, process, output)
        try:
            try:
                _wait_until_it_answers(server)
            except ServerFailed:
                raise ServerFailed((server.lines() or ["it wrote nothing"])[-1]) from None
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_answers(server: Server) -> None:
    until = time.perf_counter() + START_S
    while time.perf_counter() < until and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code == 404:  # it serves, but has no such route
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise ServerFailed
