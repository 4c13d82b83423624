"""What files of text hold: a planned file or a stretch of it in, its documents out; also how a file can be cut.

One record of a .jsonl, .json, .parquet, .csv or .tsv is a document. The text of an HTML or PDF file, or any other file,
is one up to 64 KiB; a longer one is cut into pieces at blank lines (data/sources/text_stream.py). What is left
out, and what had to be repaired, is counted with its reason.
"""

import io
from collections.abc import Iterator
from pathlib import Path

from regpt2.base.errors import DataError
from regpt2.data.sources import json_records, parquet_records
from regpt2.data.sources.kinds import csv_records, html_text, pdf_text
from regpt2.data.sources.plan import PART_BYTES, Document, InputFile, Part, Skipped, Slice, Wanted
from regpt2.data.sources.plan import TEXT as AS_TEXT
from regpt2.data.sources.text_encoding import HEAD_BYTES, as_utf8, encoding_of
from regpt2.data.sources.text_stream import (
    COMPRESSED,
    PIECE_BYTES,
    WHOLE_BYTES,
    n_pieces,
    open_input,
    text_documents,
    text_pieces,
)
from regpt2.data.tokenizer import valid_text

TEXT, JSONL, PARQUET = (".txt", ".md", ".rst", ".tex"), (".jsonl", ".json"), (".parquet",)
CSV, HTML, PDF = (".csv", ".tsv"), (".html", ".htm", ".xhtml"), (".pdf",)
_OF_DOCUMENTS = {**dict.fromkeys(HTML, html_text), **dict.fromkeys(PDF, pdf_text)}  # whose library is an extra
COMPRESSED_RATIO = 3  # bytes of text per compressed byte, a guess for progress and disk space
PARQUET_RATIO = 2  # the same for .parquet: OpenWebText has 1.6


def kind_of(name: str) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def missing_extra(kind: str) -> str:
    """How to install what reads files of this kind; "" if nothing is missing."""
    reader = _OF_DOCUMENTS.get(kind)
    return "" if reader is None or reader.is_installed() else "pip install 'regpt2[documents]'"


def documents(part: Part, skipped: Skipped, wanted: Wanted = AS_TEXT) -> Iterator[Document]:
    """The documents of a part, each made from what its record has in `part.field`."""
    for piece in part.slices:
        skipped.file = piece.file.name
        kind = kind_of(piece.file.name)
        if kind in PARQUET:
            with open_input(piece.file) as file:
                yield from parquet_records.documents(file, piece, part.field, skipped, wanted)
        elif kind in _OF_DOCUMENTS:
            yield from _of_document(piece, kind, skipped)
        else:
            yield from _text_or_json(piece, part.field, skipped, wanted)


def slices(file: InputFile, field: str, wanted: Wanted = AS_TEXT) -> Iterator[tuple[Slice, int]]:
    """The stretches of a file on this machine that can be read on their own, each with its bytes of text.

    Raises:
        DataError: its beginning, or a parquet file's end, shows that it cannot be read.
    """
    kind = kind_of(file.name)
    if _is_compressed(file.name):
        yield Slice(file), file.n_bytes * COMPRESSED_RATIO
    elif kind in CSV or kind in _OF_DOCUMENTS:
        yield Slice(file), file.n_bytes
    elif kind in PARQUET:
        yield from parquet_records.row_groups(file, field, wanted)
    elif _can_be_cut(file) and (kind in JSONL or file.n_bytes > WHOLE_BYTES):
        unit = 1 if kind in JSONL else PIECE_BYTES
        end = file.n_bytes if kind in JSONL else n_pieces(file.n_bytes)
        for start in range(0, end, PART_BYTES // unit):
            stop = min(end, start + PART_BYTES // unit)
            yield Slice(file, start, stop), (stop - start) * unit
    else:
        yield Slice(file), file.n_bytes


def text_bytes(file: InputFile) -> int:
    """The bytes of text in a file, estimated from its size and name alone."""
    if _is_compressed(file.name):
        return file.n_bytes * COMPRESSED_RATIO
    return file.n_bytes * PARQUET_RATIO if kind_of(file.name) in PARQUET else file.n_bytes


def _is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def _can_be_cut(file: InputFile) -> bool:
    """Pieces and lines are found by bytes of UTF-8: another encoding, or an array, is read from its beginning."""
    with open(file.path, "rb", buffering=0) as opened:
        head = opened.read(HEAD_BYTES)
    is_array = kind_of(file.name) in JSONL and json_records.is_array(head)
    return encoding_of(head, file.path) == "utf-8" and not is_array


def _of_document(piece: Slice, kind: str, skipped: Skipped) -> Iterator[Document]:
    if missing := missing_extra(kind):
        raise DataError(f"{piece.file.path} needs a library that is not installed here: {missing}")
    with open_input(piece.file) as file:
        text = html_text.html_text(file, skipped) if kind in HTML else pdf_text.pdf_text(file, skipped)
    if text is not None:
        yield from text_documents(io.BytesIO(valid_text(text).encode()), skipped)


def _text_or_json(piece: Slice, field: str, skipped: Skipped, wanted: Wanted) -> Iterator[Document]:
    with open_input(piece.file) as file:
        encoding = encoding_of(file.peek(HEAD_BYTES)[:HEAD_BYTES], piece.file.path)
        if kind_of(piece.file.name) in CSV:
            yield from csv_records.row_documents(file, encoding, field, skipped)
            return
        is_cut = encoding == "utf-8" and not _is_compressed(piece.file.name)
        if encoding != "utf-8":
            file = as_utf8(file, encoding, skipped)
        if kind_of(piece.file.name) not in JSONL:
            if is_cut and piece.file.n_bytes > WHOLE_BYTES:
                yield from text_pieces(file, piece.start, piece.stop, skipped)
            else:
                yield from text_documents(file, skipped)
        elif json_records.is_array(file.peek(HEAD_BYTES)[:HEAD_BYTES]):
            yield from json_records.array_documents(file, piece.file.path, field, skipped, wanted)
        else:
            yield from json_records.line_documents(file, piece, field, skipped, wanted)
