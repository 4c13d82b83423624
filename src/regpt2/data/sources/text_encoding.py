"""The encoding of a text file. In: its first bytes; out: which one it is, and the same text as UTF-8 or as characters.

A byte-order mark says it. Without one a text is UTF-8; one that would then be full of NULs is refused by name.
"""

import codecs
import io
from typing import IO

from regpt2.base.errors import DataError
from regpt2.data.sources.plan import Skipped

HEAD_BYTES = 4096  # looked at to find out what a file is
BLOCK_BYTES = 1 << 16
UTF8_MARK = codecs.BOM_UTF8
MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    UTF8_MARK: "utf-8",
}
_NEVER_IN_TEXT = bytes(range(9))  # NUL and the controls below the tab: the upper bytes of Latin to Arabic in UTF-16
_MOST_CONTROLS = 1 / 3  # of all bytes; in UTF-16 it is about half, in UTF-32 three of four
_NEARLY_ALL = 0.9


def encoding_of(head: bytes, path: str) -> str:
    """The name of the encoding by a file's first HEAD_BYTES: "utf-8", "utf-16-le" and so on.

    Raises:
        DataError: it has no byte-order mark and is full of NULs: UTF-16 or UTF-32, or no text at all.
    """
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:  # in UTF-16 and UTF-32 every space and line end has some
        return "utf-8"
    share = _share_of_controls(head)
    if share < _MOST_CONTROLS:
        return "utf-8"
    what = f"of its first {len(head):,} bytes {share:.0%} are NUL or other control characters"
    if (guess := _unmarked(head)) is None:
        raise DataError(f"{path} is not text: {what}; remove it, or give it another suffix.")
    raise DataError(
        f"{path} looks like {guess[:6]} without a byte-order mark: {what}. Convert it, and others like it, with "
        f"`iconv -f {guess} -t UTF-8 FILE > NEW_FILE`."
    )


class TextBlocks:
    """The characters of a text after its byte-order mark, block by block. Invalid bytes become U+FFFD: the file counts.

    A block that holds them is decoded a second time, so that a text without any costs nothing more.
    """

    def __init__(self, file: IO[bytes], encoding: str, skipped: Skipped) -> None:
        self._file, self._skipped, self._damage = file, skipped, False
        self._name = encoding[:6].upper()
        self._decoder = codecs.getincrementaldecoder(encoding)()
        head = file.read(4)
        mark = next((mark for mark, name in MARKS.items() if name == encoding and head.startswith(mark)), b"")
        self._head = head[len(mark) :]

    def read(self) -> str:
        """Some characters more; "" at the end."""
        text, data = "", b"more"
        while not text and data:
            data = self._head + self._file.read(BLOCK_BYTES)
            self._head = b""
            text = self._decode(data)
        return text

    def _decode(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            self._decoder.errors = "replace"
            text = self._decoder.decode(data, final=not data)
            self._decoder.errors = "strict"
        if not self._damage:
            self._damage = True
            self._skipped.add(f"files kept with invalid {self._name} replaced")
        return text


def as_utf8(file: IO[bytes], encoding: str, skipped: Skipped) -> io.BufferedReader:
    """The same text as a stream of UTF-8, which can only be read forward."""
    return io.BufferedReader(_Transcoded(TextBlocks(file, encoding, skipped)), BLOCK_BYTES)


class _Transcoded(io.RawIOBase):
    def __init__(self, blocks: TextBlocks) -> None:
        self._blocks, self._ready = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        if not self._ready:
            self._ready = memoryview(self._blocks.read().encode())
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def _share_of_controls(data: bytes) -> float:
    return 1 - len(data.translate(None, _NEVER_IN_TEXT)) / len(data) if data else 0.0


def _unmarked(head: bytes) -> str | None:
    """iconv's name of the encoding that would put the control characters where they are; None if none does."""
    full = [_share_of_controls(head[n::4]) >= _NEARLY_ALL for n in range(4)]
    if all(full):
        return None
    if full[2] and full[3]:
        return "UTF-32LE"
    if full[0] and full[1]:
        return "UTF-32BE"
    even, odd = (_share_of_controls(half) * len(half) for half in (head[0::2], head[1::2]))
    if max(even, odd) < _NEARLY_ALL * (even + odd):
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"
