"""Reading text out of files with bounded memory: planned files in, bytes and pieces of text out.

A long text without documents of its own is cut into pieces of about 32 KiB: piece j begins at the first blank line
after byte j * 32 KiB (else the first line end, else the first whole character), so that any piece can be found
without reading what comes before it.
"""

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from regpt2.base.errors import DataError
from regpt2.data.sources.plan import Document, InputFile, Skipped

WHOLE_BYTES = 64 << 10  # a text up to this size is one document
PIECE_BYTES = 32 << 10
COMPRESSED = (".gz", ".zst")

_BLANK_LINE = re.compile(rb"\n\r?\n")
_BOM = b"\xef\xbb\xbf"


@contextmanager
def open_input(file: InputFile) -> Iterator[io.BufferedReader]:
    """Open a planned file, decompressing .gz and .zst on the way.

    Raises:
        DataError: it is not as it was when the work was planned, or its compressed data is damaged.
    """
    status = os.stat(file.path)
    if (status.st_size, status.st_mtime_ns) != (file.n_bytes, file.mtime_ns):
        raise DataError(
            f"{file.path} was changed while it was being prepared; remove the output folder and run the command again."
        )
    if not file.name.lower().endswith(COMPRESSED):
        with open(file.path, "rb") as plain:
            yield plain
        return
    try:
        with _decompressed(file) as stream:
            yield stream
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the data's
        raise DataError(f"{file.path} cannot be decompressed ({error}); get the file again, or remove it.") from error


def decode(data: bytes, skipped: Skipped) -> str:
    """UTF-8 to text without a byte-order mark. Invalid bytes become U+FFFD, and the document is counted."""
    data = data.removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError:
        skipped.add("documents kept with invalid UTF-8 replaced")
        return data.decode("utf-8", "replace")


def n_pieces(n_bytes: int) -> int:
    """How many pieces a text of this size is cut into."""
    return -(-n_bytes // PIECE_BYTES)


def text_documents(file: IO[bytes], skipped: Skipped) -> Iterator[Document]:
    """A text of unknown size from its beginning: one document if it is short, else its pieces."""
    head = file.read(WHOLE_BYTES + 1)
    if len(head) <= WHOLE_BYTES:
        yield Document(decode(head, skipped))
        return
    yield from _cut(head, file, 0, None, skipped)


def text_pieces(file: IO[bytes], first: int, stop: int | None, skipped: Skipped) -> Iterator[Document]:
    """The pieces [first, stop) of a long text."""
    file.seek(first * PIECE_BYTES)
    yield from _cut(b"", file, first, stop, skipped)


def _cut(head: bytes, file: IO[bytes], first: int, stop: int | None, skipped: Skipped) -> Iterator[Document]:
    """`head` is what has been read of `file` already, from the beginning of the block of piece `first`."""
    blocks = _blocks(head, file)
    block, piece = next(blocks, b""), first
    lead = _bytes_before_cut(block) if piece else 0  # these belong to the piece before
    while block and piece != stop:
        following = next(blocks, b"")
        tail = _bytes_before_cut(following)
        yield Document(decode(block[lead:] + following[:tail], skipped), piece=piece)
        block, lead, piece = following, tail, piece + 1


def _blocks(head: bytes, file: IO[bytes]) -> Iterator[bytes]:
    """`head` and the rest of the file, in blocks of PIECE_BYTES, of which the last is shorter."""
    while block := head[:PIECE_BYTES] + file.read(max(0, PIECE_BYTES - len(head))):
        head = head[PIECE_BYTES:]
        yield block


def _bytes_before_cut(block: bytes) -> int:
    window = block[: PIECE_BYTES // 2]
    if blank := _BLANK_LINE.search(window):
        return blank.end()
    if (line_end := window.find(b"\n")) >= 0:
        return line_end + 1
    return next((n for n, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def _decompressed(file: InputFile) -> io.BufferedReader:
    if file.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(file.path, "rb"))
    import pyarrow  # noqa: PLC0415  (slow to import, needed for .zst and .parquet only)

    # Unlike zstandard's own reader, this one notices a truncated file.
    return io.BufferedReader(pyarrow.input_stream(file.path, compression="zstd"))
