"""Verified, resumable downloads. In: an address, a size, a digest; out: the complete, checked file, or one error.

A file is written to `NAME.part` beside its place and renamed once it is complete, checked and on disk. What a lost
connection or a killed process leaves there is resumed, if there is a digest to check the result.
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
from regpt2.base.net.http_client import Lost, NotSatisfiable, opened, persist, pieces

TRIES = 6  # without progress: about 12 s until the user is told
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def fetch(
    url: str,
    path: Path,
    *,
    n_bytes: int | None = None,
    digest: str = "",
    on_bytes: Callable[[int], object] = lambda count: None,
    tries: int = TRIES,
) -> None:
    """Put the content of `url` at `path`. A correct file there is kept; a second process waits for the first.

    Args:
        digest: of the content: SHA-256 (64 hex digits), or git's blob SHA-1 (40).
        on_bytes: gets the number of new bytes, also of an earlier attempt; negative when some are discarded. The sum
            is the file's size.
        tries: failures in a row, without progress, before it gives up.

    Raises:
        DownloadError: no network, a refusal, or unexpected content, which is not kept.
        OSError: the disk failed. What was downloaded is kept.
    """
    make_dir(path.parent)
    with _alone(path):
        if _is_right(path, n_bytes, digest):
            on_bytes(path.stat().st_size)
            return
        part = _Part(path, n_bytes, digest.lower(), on_bytes)
        try:
            persist(lambda: _attempt(url, part), lambda: part.size, url, tries)
            part.finish(path)
        except _Wrong as wrong:
            part.rewind()
            raise DownloadError(f"{url} {wrong}; nothing was kept.") from None
        finally:
            part.close()


def download(url: str, path: Path, digest: str, *, tries: int = 3) -> None:
    """Fetch `url` to `path`, which appears only if it has the pinned digest. A correct file there is kept.

    Raises:
        DownloadError: no network (`Unreachable`), a refusal, or another digest.
    """
    try:
        fetch(url, path, digest=digest, tries=tries)
    except DownloadError as error:
        raise type(error)(f"{error} Or put the file at {path} by hand ({_kind(digest)} {digest}).") from None


class _Wrong(Exception):
    """The content is not the expected one."""


class _Part:
    """The downloaded part of a file. A later process resumes it if there is a digest; else only this one does."""

    def __init__(self, path: Path, n_bytes: int | None, digest: str, on_bytes: Callable[[int], object]) -> None:
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
        """Discard what was downloaded."""
        self.file.seek(0)
        self.file.truncate()
        self.on_bytes(-self.size)
        self.size, self.hash, self.resumed = 0, _new_hash(self.digest, self.n_bytes), False

    @property
    def is_whole(self) -> bool:
        """Size and digest are the expected ones, as far as they are known."""
        return self.n_bytes in (None, self.size) and self.digest in ("", self.hexdigest())

    def hexdigest(self) -> str:
        """Of what is here so far."""
        if len(self.digest) != 40 or self.n_bytes is not None:
            return str(self.hash.hexdigest())
        self.file.flush()  # git's hash begins with the size, which is known only now
        return hash_of(self.path, self.digest)

    def check(self) -> None:
        if self.is_whole:
            return
        expected = [] if self.n_bytes in (None, self.size) else [f"{self.n_bytes:,} bytes"]
        expected += [self.digest] if self.digest else []
        raise _Wrong(
            f"gave {self.size:,} bytes with {_kind(self.digest)} {self.hexdigest()}, expected {' with '.join(expected)}"
        )

    def finish(self, path: Path) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path, path)
        fsync_dir(path.parent)

    def close(self) -> None:
        """Keep an unfinished part only if it can be resumed."""
        self.file.close()
        if not self.size or not self.digest:
            self.path.unlink(missing_ok=True)


def _attempt(url: str, part: _Part) -> None:
    """One request for the rest of `part`."""
    if part.size and part.digest and part.is_whole:
        return
    too_large = part.n_bytes is not None and part.size >= part.n_bytes
    if part.size and (too_large or not (part.digest or part.etag)):
        part.rewind()
    asked = {"Range": f"bytes={part.size}-"} if part.size else {}
    if part.size and not part.digest:
        asked["If-Range"] = part.etag
    try:
        with opened(url, asked) as reply:
            _expect(reply, part, url)
            for piece in pieces(reply):
                part.add(piece)
        if part.n_bytes is not None and part.size < part.n_bytes:
            raise Lost(f"the answer ended after {part.size:,} of {part.n_bytes:,} bytes")
        part.check()
    except (_Wrong, NotSatisfiable) as wrong:
        if not part.resumed:
            raise
        part.rewind()  # pieces of two versions, or a damaged beginning: start again
        raise Lost(wrong) from None
    finally:
        part.resumed = part.size > 0


def _expect(reply: Any, part: _Part, url: str) -> None:
    """Bring `part` to where this answer begins. An answer that cannot be the file is refused, and the part kept."""
    start, total = 0, reply.headers["Content-Length"] or ""
    if reply.status == 206:
        found = _CONTENT_RANGE.fullmatch(reply.headers["Content-Range"] or "")
        start, total = (int(found[1]), found[2]) if found else (-1, "")
    if part.n_bytes is not None and total.isdigit() and int(total) != part.n_bytes:
        is_page = "html" in (reply.headers["Content-Type"] or "")
        hint = ": a page, not the file; does this network want you to log in?" if is_page else "."
        raise DownloadError(f"{url} has {int(total):,} bytes, expected {part.n_bytes:,}{hint}")
    if start != part.size:
        part.rewind()  # the server has no ranges, or the file has changed
    if start != part.size:
        raise Lost("it answered with another range of the file than requested")
    etag = reply.headers["ETag"] or ""
    part.etag = "" if etag.startswith("W/") else etag


def _kind(digest: str) -> str:
    return "git blob SHA-1" if len(digest) == 40 else "SHA-256"


def _new_hash(digest: str, n_bytes: int | None) -> Any:
    if len(digest) != 40:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % (n_bytes or 0), usedforsecurity=False)


def _is_right(path: Path, n_bytes: int | None, digest: str) -> bool:
    if not path.is_file() or n_bytes not in (None, path.stat().st_size):
        return False
    if not digest:
        return True
    return hash_of(path, digest) == digest.lower()


def hash_of(path: Path, like: str) -> str:
    """The file's hash, of the kind that `like` is: SHA-256, or with 40 digits git's blob SHA-1."""
    with open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: _new_hash(like, n_bytes)).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock `path` for this process: a second waits. The system frees the lock when the process ends."""
    lock = path.with_name(path.name + ".lock")
    while True:
        with open(lock, "a+b") as file:
            if try_lock(file) and os.fstat(file.fileno()).st_nlink:  # 0: its last holder has removed it since
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows does not remove an open file
                        lock.unlink()
                return
        time.sleep(0.1)
