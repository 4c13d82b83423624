"""Failed output must not stop the work. In: the process's standard streams; out: which of them failed, and why.

A stream fails when its reader exits (`| head`), its terminal is closed, the disk of a log is full, or it was closed
before the process started (`>&-`).
"""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

from regpt2.base.errors import Problem

STREAMS = {"stdout": "standard output", "stderr": "standard error"}
_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EAGAIN") if hasattr(errno, name))


class WatchedStream(io.RawIOBase):
    """The lowest layer of a standard stream. Unless it is `strict`, a failed write is recorded instead of raised."""

    def __init__(self, raw: io.RawIOBase, title: str) -> None:
        self._raw, self.title = raw, title
        self.name = f"<{title}>"
        self.strict = False
        self.lost: OSError | None = None
        """The first failure; its `filename` is the title."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: "memoryview | bytes") -> int:  # type: ignore[override]
        """Write the data or a part of it. A failed write counts as done, or raises OSError if the stream is strict."""
        try:
            if (n_bytes := self._raw.write(data)) is not None:
                return n_bytes
            error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # a non-blocking pipe that is full
        except OSError as failure:
            error = failure
        self._lose(OSError(error.errno, error.strerror, self.title))
        return memoryview(data).nbytes

    def _lose(self, reason: OSError) -> None:
        first, self.lost = self.lost is None, self.lost or reason
        if self.strict:
            raise reason
        if reason.errno not in _FULL:  # permanent, also for C code and child processes
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
        if first and self.title != STREAMS["stderr"]:
            sys.stderr.write(f"warning: {self.title} cannot be written ({reason.strerror}); the work continues.\n")
            sys.stderr.flush()


def open_closed_streams() -> None:
    """Replace each closed standard stream by the null device. Call it before any file is opened.

    Otherwise that file would get the free number, and what a library prints would be written into it.
    """
    names = ("stdin", *STREAMS)
    for number in range(len(names)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number: this one
    for name in names:
        if getattr(sys, name) is None:
            setattr(sys, name, _null(name))


def _null(name: str) -> io.TextIOWrapper:
    """The replacement of a closed standard stream."""
    raw = io.FileIO(os.devnull, "r" if name == "stdin" else "w")
    if name == "stdin":
        return io.TextIOWrapper(io.BufferedReader(raw), "utf-8")
    watch: Any = WatchedStream(raw, STREAMS[name])
    watch.lost = OSError(errno.EBADF, "it is closed", watch.title)
    return io.TextIOWrapper(io.BufferedWriter(watch), "utf-8", "backslashreplace")


def watch_streams(*, strict: bool = False) -> None:
    """Record the failure of a standard stream instead of raising it; `strict`: standard output raises.

    A stream that the caller has replaced is left alone. Text that a stream cannot encode is escaped.
    """
    for name, title in STREAMS.items():
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, watched(stream, title))
        elif isinstance(stream, io.TextIOWrapper) and _watch_of(name) is None:
            stream.reconfigure(errors="backslashreplace")
        if (watch := _watch_of(name)) is not None:
            watch.strict = strict and name == "stdout"


def watched(stream: io.TextIOWrapper, title: str) -> io.TextIOWrapper:
    """The same stream with a `WatchedStream` below its buffer. `python -u` has no buffer."""
    with suppress(OSError):
        stream.flush()
    raw: Any = getattr(stream.buffer, "raw", stream.buffer)
    watch = WatchedStream(raw, title)
    buffer: Any = watch if raw is stream.buffer else io.BufferedWriter(watch)
    lines, through = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines, write_through=through)


def _watch_of(name: str) -> WatchedStream | None:
    buffer = getattr(getattr(sys, name), "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, WatchedStream) else None


def lost_streams() -> list[OSError]:
    """The first failure of each standard stream that has failed."""
    watches = [watch for name in STREAMS if (watch := _watch_of(name)) is not None]
    return [watch.lost for watch in watches if watch.lost is not None]


def require_output() -> None:
    """Fail if standard output, the only place of a command's results, could not be written.

    Raises:
        Problem: it was closed before the process started.
        OSError: it failed later.
    """
    watch = _watch_of("stdout")
    if watch is None or watch.lost is None:
        return
    if watch.lost.errno == errno.EBADF:
        raise Problem(f"{watch.title} is closed; redirect it to a file, or to {os.devnull}.")
    raise watch.lost
