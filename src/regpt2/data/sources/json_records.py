"""Records of JSON: lines that are one each, or one array of them over the whole file, in; their documents out.

An array is read element by element, so memory holds one of them at a time.
"""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from regpt2.base.errors import DataError
from regpt2.data.sources.plan import TEXT, Document, Skipped, Slice, Wanted
from regpt2.data.sources.text_encoding import TextBlocks
from regpt2.data.sources.text_stream import decode

LINE_BYTES = 64 << 20  # a longer line is left out: one document must fit in memory
ELEMENT_CHARACTERS = 64 << 20  # the same for an array's element

_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
_AFTER_NUMBER = re.compile(r"[ \t\r\n,\]]")
_SPACES = re.compile(r"[ \t\r\n]*")
_MOST_NAMES, _MOST_LEVELS = 8, 4  # of the fields that a message lists
_MISSING = object()


def is_array(head: bytes) -> bool:
    """Whether a file that begins like this is an array of records, instead of one record per line."""
    return _ARRAY.match(head) is not None


def line_documents(
    file: IO[bytes], piece: Slice, field: str, skipped: Skipped, wanted: Wanted = TEXT
) -> Iterator[Document]:
    """Of the lines that begin within [start, stop)."""
    position = piece.start
    if position:  # a line that begins before `start` belongs to the slice before
        file.seek(position - 1)
        position += _skip_line(file) - 1
    while piece.stop is None or position < piece.stop:
        line = file.readline(LINE_BYTES)
        if not line:
            return
        position += len(line)
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            position += _skip_line(file)
            skipped.add(f"lines longer than {LINE_BYTES >> 20} MiB")
        elif line.strip() and (document := _of_line(line, field, skipped, wanted)) is not None:
            yield document


def array_documents(
    file: IO[bytes], path: str, field: str, skipped: Skipped, wanted: Wanted = TEXT
) -> Iterator[Document]:
    """Of the elements of an array, or of several one after another.

    Raises:
        DataError: it is not whole, or not JSON.
    """
    values = _Values(TextBlocks(file, "utf-8", skipped), path)
    while (character := values.next_character()) == "[":
        values.skip()
        while (character := values.next_character()) != "]":
            if (document := _of_record(values.read(), "elements", field, skipped, wanted)) is not None:
                yield document
            if (character := values.next_character()) == ",":
                values.skip()
            elif character != "]":
                raise values.wrong(
                    f"expected a comma or the end of the array, got {character or 'the end of the file'!r}"
                )
        values.skip()
    if character:
        raise values.wrong(f"the array has ended, but {character!r} follows")


def _skip_line(file: IO[bytes]) -> int:
    """Read past the end of the line; the number of bytes."""
    count = 0
    while line := file.readline(LINE_BYTES):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def _of_line(line: bytes, field: str, skipped: Skipped, wanted: Wanted) -> Document | None:
    try:
        record = json.loads(decode(line, skipped))
    except (ValueError, RecursionError):
        is_first_line = line.strip() == b"{"
        hint = f"{skipped.file}, an object over several lines: `jq -c .` makes it one" if is_first_line else ""
        skipped.add("lines that are not JSON", hint)
        return None
    return _of_record(record, "lines", field, skipped, wanted)


def _of_record(record: Any, what: str, field: str, skipped: Skipped, wanted: Wanted) -> Document | None:
    """The document of a record; None if it has none. `what` says in the count what such records are."""
    value = _value(record, field)
    if isinstance(value, wanted.kind):
        document = wanted.read(value)
        if isinstance(document, Document):
            return document
        skipped.add(f"{what} whose field {field!r} {document}")
        return None
    missing = value is _MISSING
    reason = f"{what} without a field {field!r}" if missing else f"{what} whose field {field!r} is not {wanted.what}"
    skipped.add(reason, "" if reason in skipped.first else _place(record, skipped.file, wanted.kind))
    return None


def _value(record: Any, field: str) -> Any:
    """What a record has under this name, else under the names in it, one within the other: `meta.text`."""
    if not isinstance(record, dict):
        return _MISSING
    if field in record or "." not in field:
        return record.get(field, _MISSING)
    for name in field.split("."):
        if not isinstance(record, dict) or name not in record:
            return _MISSING
        record = record[name]
    return record


def _place(record: Any, file: str, kind: type) -> str:
    """The file, and the fields of the kind that this record of it has."""
    names = list(_fields(record, "", _MOST_LEVELS, kind))
    if not names:
        return file
    shown = ", ".join(name[:40] for name in names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
    return f"{file}, where --field can be {shown}"


def _fields(record: Any, within: str, levels: int, kind: type) -> Iterator[str]:
    """The names of the values of a kind in a record, as `--field` takes them."""
    for name, value in record.items() if isinstance(record, dict) and levels else ():
        if isinstance(value, kind):
            yield f"{within}{name}"
        else:
            yield from _fields(value, f"{within}{name}.", levels - 1, kind)


class _Values:
    """JSON values out of text that comes block by block."""

    def __init__(self, blocks: TextBlocks, path: str) -> None:
        self._blocks, self._path = blocks, path
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._dropped = 0  # characters before `_text`

    def next_character(self) -> str:
        """The next one that is no space, which stays; "" at the end."""
        while True:
            spaces = _SPACES.match(self._text, self._at)
            self._at = spaces.end() if spaces else self._at
            if self._at < len(self._text) or not self._read_more(1):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def read(self) -> Any:
        is_whole = False
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except ValueError as error:
                fault = getattr(error, "msg", str(error))
            except RecursionError:
                raise self.wrong("it is nested too deeply") from None
            else:
                # Of a number that ends here the next block may hold more: `0` and `.5`.
                if is_whole or not isinstance(value, int | float) or _AFTER_NUMBER.match(self._text, end):
                    self._at = end
                    return value
                fault = "it does not end"
            n_read = len(self._text) - self._at
            if is_whole or n_read > ELEMENT_CHARACTERS:
                raise self.wrong(f"an element of {n_read:,} characters or more: {fault}")
            is_whole = not self._read_more(max(1, n_read))  # as much again: a long one is tried few times

    def wrong(self, fault: str) -> DataError:
        return DataError(
            f"{self._path}: its JSON array cannot be read at character {self._dropped + self._at:,}: {fault:.200}; "
            "mend the file, or make a record a line of it: `jq -c '.[]' FILE > NEW_FILE.jsonl`."
        )

    def _read_more(self, n_characters: int) -> bool:
        """Read until `n_characters` more are there; False if the text ends before."""
        blocks, n_new = [self._text[self._at :]], 0
        self._dropped, self._at = self._dropped + self._at, 0
        while n_new < n_characters and (block := self._blocks.read()):
            blocks.append(block)
            n_new += len(block)
        self._text = "".join(blocks)
        return n_new >= n_characters
