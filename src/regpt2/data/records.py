"""What files of text hold: a planned file or a stretch of it in, its documents out; also how a file can be cut.

One record of a .jsonl or .parquet is a document, and so is a .txt or .md of up to 64 KiB; a longer one is cut into
pieces at blank lines (data/inputs.py). What is left out, and what had to be repaired, is counted with its reason.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from regpt2.base.errors import DataError, did_you_mean
from regpt2.data.documents import PART_BYTES, Document, InputFile, Part, Slice
from regpt2.data.inputs import (
    COMPRESSED,
    PIECE_BYTES,
    WHOLE_BYTES,
    decode,
    n_pieces,
    open_input,
    text_documents,
    text_pieces,
)

TEXT, JSONL, PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)
COMPRESSED_RATIO = 3  # bytes of text per compressed byte, a guess for progress and disk space
PARQUET_RATIO = 2  # the same for .parquet: OpenWebText has 1.6
LINE_BYTES = 64 << 20  # a longer line of .jsonl is left out: one document must fit in memory


def kind_of(name: str) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def documents(part: Part, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of a part whose files are on this machine."""
    for piece in part.slices:
        kind = kind_of(piece.file.name)
        with open_input(piece.file) as file:
            if kind in PARQUET:
                yield from _parquet_documents(file, piece, part.field, skipped)
            elif kind in JSONL:
                yield from _jsonl_documents(file, piece, part.field, skipped)
            elif _is_compressed(piece.file.name) or piece.file.n_bytes <= WHOLE_BYTES:
                yield from text_documents(file, skipped)
            else:
                yield from text_pieces(file, piece.start, piece.stop, skipped)


def slices(file: InputFile, field: str) -> Iterator[tuple[Slice, int]]:
    """The stretches of a file on this machine that can be read on their own, each with its bytes of text."""
    kind = kind_of(file.name)
    if _is_compressed(file.name):
        yield Slice(file), file.n_bytes * COMPRESSED_RATIO
    elif kind in PARQUET:
        yield from _row_groups(file, field)
    elif kind in TEXT and file.n_bytes <= WHOLE_BYTES:
        yield Slice(file), file.n_bytes
    else:
        unit = PIECE_BYTES if kind in TEXT else 1
        end = n_pieces(file.n_bytes) if kind in TEXT else file.n_bytes
        for start in range(0, end, PART_BYTES // unit):
            stop = min(end, start + PART_BYTES // unit)
            yield Slice(file, start, stop), (stop - start) * unit


def text_bytes(file: InputFile) -> int:
    """The bytes of text in a file that nobody has looked into, as far as its size and name tell."""
    if _is_compressed(file.name):
        return file.n_bytes * COMPRESSED_RATIO
    return file.n_bytes * PARQUET_RATIO if kind_of(file.name) in PARQUET else file.n_bytes


def _is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def _jsonl_documents(file: IO[bytes], piece: Slice, field: str, skipped: Counter[str]) -> Iterator[Document]:
    """The lines that begin within [start, stop)."""
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
            skipped[f"lines longer than {LINE_BYTES >> 20} MiB"] += 1
        elif line.strip():
            yield from _record(line, field, skipped)


def _skip_line(file: IO[bytes]) -> int:
    """Read past the end of the line; how many bytes that took."""
    count = 0
    while line := file.readline(LINE_BYTES):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def _record(line: bytes, field: str, skipped: Counter[str]) -> Iterator[Document]:
    try:
        record = json.loads(decode(line, skipped))
    except (ValueError, RecursionError):
        skipped["lines that are not JSON"] += 1
        return
    if not isinstance(record, dict) or field not in record:
        skipped[f"lines without a field {field!r}"] += 1
    elif not isinstance(record[field], str):
        skipped[f"lines whose field {field!r} is not text"] += 1
    else:
        yield Document(record[field])


def _row_groups(file: InputFile, field: str) -> Iterator[tuple[Slice, int]]:
    with open_input(file) as opened:
        parquet = _parquet_file(opened, file, field)
        metadata = parquet.metadata
        column = next(n for n in range(metadata.num_columns) if parquet.schema.column(n).path == field)
        for n in range(metadata.num_row_groups):
            yield Slice(file, n, n + 1), metadata.row_group(n).column(column).total_uncompressed_size


def _parquet_documents(file: IO[bytes], piece: Slice, field: str, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow  # noqa: PLC0415  (slow to import)

    with tempfile.TemporaryFile() as seekable:
        if _is_compressed(piece.file.name):
            shutil.copyfileobj(file, seekable)
        parquet = _parquet_file(seekable if _is_compressed(piece.file.name) else file, piece.file, field)
        stop = parquet.metadata.num_row_groups if piece.stop is None else piece.stop
        groups = list(range(piece.start, stop))
        try:
            for batch in parquet.iter_batches(batch_size=256, row_groups=groups, columns=[field], use_threads=False):
                column = batch.column(0)
                is_large = pyarrow.types.is_large_string(column.type)
                for data in column.cast(pyarrow.large_binary() if is_large else pyarrow.binary()).to_pylist():
                    if data is None:
                        skipped[f"rows whose {field!r} is null"] += 1
                    else:
                        yield Document(decode(data, skipped))
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{piece.file.path} is damaged ({error}); get the file again, or remove it.") from error


def _parquet_file(file: IO[bytes], planned: InputFile, field: str) -> Any:
    import pyarrow.parquet  # noqa: PLC0415  (slow to import)

    try:
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{planned.path} is not a readable parquet file ({error}); get it again, or remove it."
        ) from error
    schema = parquet.schema_arrow
    if field not in schema.names:
        raise DataError(
            f"{planned.path} has no column {field!r}{did_you_mean(field, schema.names)} It has: "
            f"{', '.join(schema.names)}; choose one with --field."
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{planned.path}: column {field!r} holds {kind}, not text; choose another with --field.")
    return parquet
