"""A record followed as it grows. In: a run folder, looked at again and again; out: its `Record` so far."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from io import RawIOBase
from itertools import islice
from pathlib import Path

from regpt2.base.files import CHUNK_BYTES, SMALL_BYTES
from regpt2.base.record.metrics import event_of
from regpt2.pages.record import GrowingRecord, Record

TAIL_BYTES = 64
"""What must still be in front of the place where reading goes on, or the file is another one."""
TRAIN = b'{"event":"train",'


@dataclass(frozen=True)
class _File:
    """The file that is being read, up to `read_bytes`, in front of which it has these bytes."""

    inode: tuple[int, int] = (0, 0)
    read_bytes: int = 0
    tail: bytes = b""


class Follower:
    """Reads `metrics.jsonl` once, then only what is appended to it.

    A last line that is half written waits. A file that was cut back or replaced is read anew, one that is missing is
    waited for. A line that is no event is left out and counted. Not for two threads at once.
    """

    def __init__(self, run: Path, *, newest: int | None = None) -> None:
        """`newest`: keep only the last N updates of each piece read, which is enough for one line about the run."""
        self.run, self.newest = run, newest
        self.n_damaged = 0
        self.n_restarts = 0
        """How many times the file was another one."""
        self.changed_at = 0.0
        """When the file was last written, in seconds since 1970; 0 without a file."""
        self._file = _File()
        self._growing = GrowingRecord()
        self._shown: Record | None = None

    @property
    def exists(self) -> bool:
        """Is there a record, with something in it?"""
        return self._file.read_bytes > 0

    @property
    def record(self) -> Record:
        """All that is recorded so far; the same object until something is added."""
        if self._shown is None:
            self._shown = self._growing.record(self.run)
        return self._shown

    def look(self) -> bool:
        """Read what was appended. True if that changed the record."""
        try:
            with open(self.run / "metrics.jsonl", "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return self._start_anew(_File())
                self.changed_at = status.st_mtime
                inode = (status.st_dev, status.st_ino)
                anew = self._is_another(file, inode, status.st_size)
                changed = self._start_anew(_File(inode)) if anew else False
                return self._read(file) or changed
        except OSError:
            return self._start_anew(_File())

    def _is_another(self, file: RawIOBase, inode: tuple[int, int], size_bytes: int) -> bool:
        known = self._file
        if inode != known.inode or size_bytes < known.read_bytes:
            return True
        file.seek(known.read_bytes - len(known.tail))
        return file.read(len(known.tail)) != known.tail

    def _start_anew(self, file: _File) -> bool:
        """Forget all; True if there was something."""
        had_some, self._file = self.exists, file
        if file.inode == (0, 0):
            self.changed_at = 0.0
        if had_some:
            self._growing, self._shown, self.n_damaged = GrowingRecord(), None, 0
            self.n_restarts += 1
        return had_some

    def _read(self, file: RawIOBase) -> bool:
        """Read whole lines to the end of the file, in pieces."""
        before = self._file.read_bytes
        piece_bytes = CHUNK_BYTES
        while piece := self._piece(file, piece_bytes):
            if (end := piece.rfind(b"\n") + 1) or len(piece) >= SMALL_BYTES:  # a longer line is no event
                self._take(piece[: end or len(piece)])
            elif len(piece) == piece_bytes:
                piece_bytes *= 2
            else:
                self._take_if_whole(piece)
                break
        if self._file.read_bytes == before:
            return False
        self._shown = None
        return True

    def _piece(self, file: RawIOBase, n_bytes: int) -> bytes:
        file.seek(self._file.read_bytes)
        return file.read(n_bytes) or b""

    def _take(self, lines: bytes) -> None:
        self._advance(lines)
        for line in self._chosen(lines.split(b"\n")):
            if not line.strip():
                continue
            try:
                self._growing.add(event_of(line.decode(errors="replace")))
            except ValueError:
                self.n_damaged += 1

    def _take_if_whole(self, line: bytes) -> None:
        """The last line, if only its end of line is missing: half of an event is never one."""
        try:
            event = event_of(line.decode(errors="replace"))
        except ValueError:
            return
        self._advance(line)
        self._growing.add(event)

    def _advance(self, read: bytes) -> None:
        tail = (self._file.tail + read)[-TAIL_BYTES:]
        self._file = _File(self._file.inode, self._file.read_bytes + len(read), tail)

    def _chosen(self, lines: list[bytes]) -> Iterable[bytes]:
        """All lines; with `newest` without the older updates, which need not even be parsed."""
        if self.newest is None:
            return lines
        updates = (at for at in range(len(lines) - 1, -1, -1) if lines[at].startswith(TRAIN))
        kept = set(islice(updates, self.newest))
        return [line for at, line in enumerate(lines) if at in kept or not line.startswith(TRAIN)]
