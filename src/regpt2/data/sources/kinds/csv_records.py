"""Rows of a .csv or .tsv file. In: the file and the name of a column in its first row; out: a document for each row."""

import csv
import io
from collections.abc import Iterator
from typing import IO

from regpt2.data.sources.plan import Document, Skipped
from regpt2.data.sources.text_encoding import as_utf8

CELL_CHARACTERS = 64 << 20  # a longer one ends the file: perhaps its quotation mark was never closed
DELIMITERS = (",", ";", "\t")
_MOST_NAMES = 8  # of the columns that a message lists


def row_documents(file: IO[bytes], encoding: str, field: str, skipped: Skipped) -> Iterator[Document]:
    """Of the rows after the first, which names the columns. Without the column the file is left out, and counted."""
    text = io.TextIOWrapper(as_utf8(file, encoding, skipped), "utf-8", newline="")
    lines = iter(lambda: text.readline(CELL_CHARACTERS + 1), "")
    csv.field_size_limit(CELL_CHARACTERS)
    head, delimiter, line = next(lines, ""), "", 1
    try:
        names = {delimiter: next(csv.reader([head], delimiter=delimiter), []) for delimiter in DELIMITERS}
        delimiter = next((one for one in DELIMITERS if field in names[one]), "")
        if not delimiter:
            skipped.add(f"files without a column {field!r}", _place(max(names.values(), key=len), skipped.file))
            return
        column = names[delimiter].index(field)
        for line, row in enumerate(csv.reader(lines, delimiter=delimiter), 2):  # noqa: B007  (for the message)
            if len(row) > column:
                yield Document(row[column])
            elif row:
                skipped.add(f"rows without a column {field!r}")
    except csv.Error as error:
        skipped.add("files read only up to a damaged row", f"{skipped.file}, after row {line} ({error})")


def _place(names: list[str], file: str) -> str:
    shown = ", ".join(name[:40] for name in names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
    return f"{file}, where --field can be {shown}" if names else file
