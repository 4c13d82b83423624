"""Downloads that end well. In: an address and what its content must be; out: the whole, checked file, or one message.

A file is written to `NAME.part` beside its place and appears under its name when it is whole, right and on disk. What
a lost connection or a killed process leaves there is continued, if there is a digest to tell whether that went well.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from regpt2.base.errors import DownloadError
from regpt2.base.files import CHUNK_BYTES, fsync_dir, make_dir, try_lock
from regpt2.base.net.http_client import PAUSE_S, TIMEOUT_S, Lost, NotSatisfiable, opened, persist, pieces

TRIES = 6  # without progress: about 12 s, then the user should know
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def fetch(
    url: str,
    path: Path,
    *,
    n_bytes: int | None = None,
    digest: str = "",
    on_bytes: Callable[[int], object] = lambda count: None,
    tries: int = TRIES,
    timeout_s: float = TIMEOUT_S,
    pause_s: float = PAUSE_S,
) -> None:
    """Put the content of `url` at `path`. A right file that is there is kept; a second process waits for the first.

    Args:
        digest: what the content must have: SHA-256 (64 hex digits), or git's blob SHA-1 (40; then with `n_bytes`).
        on_bytes: told how many bytes came, also from a former attempt; negative when some are thrown away. In sum the
            file's size.
        tries: so many failures in a row, none of which brought the file further, end it.
        timeout_s: a connection that is silent for so long is lost.

    Raises:
        DownloadError: no network, a refusal, or other content than expected. Nothing wrong is kept.
        OSError: the disk's fault. What has come is kept.
    """
    make_dir(path.parent)
    with _alone(path):
        if _is_right(path, n_bytes, digest):
            on_bytes(path.stat().st_size)
            return
        part = _Part(path, n_bytes, digest.lower(), on_bytes)
        try:
            persist(lambda: _attempt(url, part, timeout_s), lambda: part.size, url, tries, pause_s)
            part.finish(path)
        except _Wrong as wrong:
            part.rewind()
            raise DownloadError(f"{url} {wrong}; nothing was kept.") from None
        finally:
            part.close()


def download(url: str, path: Path, sha256: str, *, tries: int = 3, timeout_s: float = TIMEOUT_S) -> None:
    """Fetch `url` to `path`, which appears only when its SHA-256 is as pinned. An existing right file is kept.

    Raises:
        DownloadError: no network, a refusal, or other content than pinned.
    """
    try:
        fetch(url, path, digest=sha256, tries=tries, timeout_s=timeout_s)
    except DownloadError as error:
        raise DownloadError(f"{error} Or put the file at {path} by hand (SHA-256 {sha256}).") from None


class _Wrong(Exception):
    """What came is not what was asked for."""


class _Part:
    """What has come of a file. With a digest, it is continued by a later process; else only by this one."""

    def __init__(self, path: Path, n_bytes: int | None, digest: str, on_bytes: Callable[[int], object]) -> None:
        assert len(digest) != 40 or n_bytes is not None, "git's blob SHA-1 begins with the size"
        self.n_bytes, self.digest, self.on_bytes = n_bytes, digest, on_bytes
        self.path = path.with_name(path.name + ".part")
        self.file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115  (closed by `close`)
        self.etag = ""
        self.size, self.hash = 0, _new_hash(digest, n_bytes)
        self.file.seek(0)
        while piece := self.file.read(CHUNK_BYTES):
            self._count(piece)
        self.resumed = self.size > 0

    def _count(self, piece: bytes) -> None:
        self.hash.update(piece)
        self.size += len(piece)
        self.on_bytes(len(piece))

    def add(self, piece: bytes) -> None:
        self.file.write(piece)
        self._count(piece)
        if self.n_bytes is not None and self.size > self.n_bytes:
            raise _Wrong(f"gave more than the {self.n_bytes:,} bytes that were expected")

    def rewind(self) -> None:
        """Throw away what has come."""
        self.file.seek(0)
        self.file.truncate()
        self.on_bytes(-self.size)
        self.size, self.hash, self.resumed = 0, _new_hash(self.digest, self.n_bytes), False

    @property
    def is_whole(self) -> bool:
        """All that was asked for has come, as far as that can be known."""
        return self.n_bytes in (None, self.size) and self.digest in ("", self.hash.hexdigest())

    def check(self) -> None:
        if self.is_whole:
            return
        kind = "git blob SHA-1" if len(self.digest) == 40 else "SHA-256"
        expected = [] if self.n_bytes in (None, self.size) else [f"{self.n_bytes:,} bytes"]
        expected += [self.digest] if self.digest else []
        raise _Wrong(
            f"gave {self.size:,} bytes with {kind} {self.hash.hexdigest()}, expected {' with '.join(expected)}"
        )

    def finish(self, path: Path) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path, path)
        fsync_dir(path.parent)

    def close(self) -> None:
        """Keep what can be continued, if it is not finished."""
        self.file.close()
        if not self.size or not self.digest:
            self.path.unlink(missing_ok=True)


def _attempt(url: str, part: _Part, timeout_s: float) -> None:
    """One request that brings the rest of `part`, or some of it."""
    if part.size and part.digest and part.is_whole:
        return
    if part.size and not _can_go_on(part):
        part.rewind()
    asked = {"Range": f"bytes={part.size}-"} if part.size else {}
    if part.size and not part.digest:
        asked["If-Range"] = part.etag
    try:
        with opened(url, asked, timeout_s) as reply:
            _expect(reply, part, url)
            for piece in pieces(reply):
                part.add(piece)
        if part.n_bytes is not None and part.size < part.n_bytes:
            raise Lost(f"the answer ended after {part.size:,} of {part.n_bytes:,} bytes")
        part.check()
    except (_Wrong, NotSatisfiable) as wrong:
        if not part.resumed:
            raise
        part.rewind()  # pieces of two versions, or a damaged beginning: once more, from zero
        raise Lost(wrong) from None
    finally:
        part.resumed = part.size > 0


def _can_go_on(part: _Part) -> bool:
    if part.n_bytes is not None and part.size >= part.n_bytes:
        return False
    return bool(part.digest or part.etag)


def _expect(reply: Any, part: _Part, url: str) -> None:
    """Bring `part` to where this answer begins; refuse an answer that cannot be the file, and keep what has come."""
    start, total = 0, reply.headers["Content-Length"] or ""
    if reply.status == 206:
        found = _CONTENT_RANGE.fullmatch(reply.headers["Content-Range"] or "")
        start, total = (int(found[1]), found[2]) if found else (-1, "")
    if part.n_bytes is not None and total.isdigit() and int(total) != part.n_bytes:
        is_page = "html" in (reply.headers["Content-Type"] or "")
        hint = ": a page, not the file; does this network want you to log in?" if is_page else "."
        raise DownloadError(f"{url} has {int(total):,} bytes, expected {part.n_bytes:,}{hint}")
    if start != part.size:
        part.rewind()  # it does not know ranges, or the file has changed
    if start != part.size:
        raise Lost("it answered with another stretch of the file than asked for")
    etag = reply.headers["ETag"] or ""
    part.etag = "" if etag.startswith("W/") else etag


def _new_hash(digest: str, n_bytes: int | None) -> Any:
    if len(digest) != 40:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % (n_bytes or 0), usedforsecurity=False)


def _is_right(path: Path, n_bytes: int | None, digest: str) -> bool:
    if not path.is_file() or n_bytes not in (None, path.stat().st_size):
        return False
    if not digest:
        return True
    found = _new_hash(digest, n_bytes)
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            found.update(piece)
    return bool(found.hexdigest() == digest.lower())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold `path` for this process: a second waits. The system frees it when the process ends, however it ends."""
    lock = path.with_name(path.name + ".lock")
    while True:
        with open(lock, "a+b") as file:
            if try_lock(file) and _is_same(file, lock):
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows removes no open file: there it stays
                        lock.unlink()
                return
        time.sleep(0.1)


def _is_same(file: IO[bytes], path: Path) -> bool:
    """Whether `path` is still the open file, not one that was made after this was removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
