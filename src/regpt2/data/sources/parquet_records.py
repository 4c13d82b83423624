"""Rows of a .parquet file: its column or nested field of text in, the documents of its row groups out."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from regpt2.base.errors import DataError, did_you_mean
from regpt2.data.sources.plan import TEXT, Document, InputFile, Skipped, Slice, Wanted
from regpt2.data.sources.text_stream import COMPRESSED, decode, open_input

_BATCH_ROWS = 256
_MOST_NAMES = 30  # of the columns that a message lists


def row_groups(file: InputFile, field: str, wanted: Wanted = TEXT) -> Iterator[tuple[Slice, int]]:
    """Each row group with its bytes of text.

    Raises:
        DataError: it is not a readable parquet file, or has no such text.
    """
    with open_input(file) as opened:
        parquet = _open(opened, file)
        _column(parquet.schema_arrow, file, field, wanted)
        metadata = parquet.metadata
        paths = [f"{parquet.schema.column(n).path}." for n in range(metadata.num_columns)]
        columns = [n for n, path in enumerate(paths) if path.startswith(f"{field}.")]  # of a list, one for each leaf
        for n in range(metadata.num_row_groups):
            group = metadata.row_group(n)
            yield Slice(file, n, n + 1), sum(group.column(column).total_uncompressed_size for column in columns)


def documents(file: IO[bytes], piece: Slice, field: str, skipped: Skipped, wanted: Wanted = TEXT) -> Iterator[Document]:
    """Of the row groups [start, stop).

    Raises:
        DataError: it is not a readable parquet file, has no such text, or is damaged.
    """
    import pyarrow  # noqa: PLC0415  (slow to import)

    with tempfile.TemporaryFile() as seekable:
        is_compressed = piece.file.name.lower().endswith(COMPRESSED)
        if is_compressed:
            shutil.copyfileobj(file, seekable)
        parquet = _open(seekable if is_compressed else file, piece.file)
        names, is_text = _column(parquet.schema_arrow, piece.file, field, wanted)
        stop = parquet.metadata.num_row_groups if piece.stop is None else piece.stop
        batches = (
            batch
            for group in range(piece.start, stop)  # one by one: pyarrow cannot join the dictionaries of several
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False)
        )
        try:
            if wanted.kind is list:
                yield from _of_lists(batches, names, field, skipped, wanted)
                return
            for data in _values(batches, names):
                if data is None:
                    skipped.add(f"rows whose {field!r} is null")
                else:
                    yield Document(decode(data, skipped) if is_text else _declared_as_bytes(data, piece.file, field))
        except pyarrow.ArrowNotImplementedError as error:
            raise DataError(
                f"{piece.file.path}: column {field!r} cannot be read by pyarrow ({error}); write it again as strings."
            ) from error
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{piece.file.path} is damaged ({error}); get the file again, or remove it.") from error


def _open(file: IO[bytes], planned: InputFile) -> Any:
    import pyarrow.parquet  # noqa: PLC0415  (slow to import)

    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{planned.path} is not a readable parquet file ({error}); get it again, or remove it."
        ) from error


def _of_lists(batches: Any, names: list[str], field: str, skipped: Skipped, wanted: Wanted) -> Iterator[Document]:
    """A document of each row whose list makes one; text that is not UTF-8 makes none."""
    for batch in batches:
        for cell in _column_of(batch, names):
            try:
                value = cell.as_py()
            except UnicodeDecodeError:
                skipped.add(f"rows whose {field!r} is not UTF-8")
                continue
            document = "is null" if value is None else wanted.read(value)
            if isinstance(document, Document):
                yield document
            else:
                skipped.add(f"rows whose {field!r} {document}")


def _column_of(batch: Any, names: list[str]) -> Any:
    """The column of a batch that these names lead to, through structs."""
    import pyarrow.compute  # noqa: PLC0415  (slow to import)

    column = batch.column(batch.schema.names.index(names[0]))
    return pyarrow.compute.struct_field(column, names[1:]) if names[1:] else column


def _values(batches: Any, names: list[str]) -> Iterator[bytes | None]:
    """The bytes of each row; None where it, or what it lies within, is null."""
    import pyarrow  # noqa: PLC0415  (slow to import)

    for batch in batches:
        column = _column_of(batch, names)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # Text of any layout as bytes, because what is not UTF-8 is repaired and counted.
        is_small = column.type in (pyarrow.string(), pyarrow.binary())
        yield from column.cast(pyarrow.binary() if is_small else pyarrow.large_binary()).to_pylist()


def _column(schema: Any, planned: InputFile, field: str, wanted: Wanted = TEXT) -> tuple[list[str], bool]:
    """The names that lead to the text, and whether it is declared as text; otherwise it is bytes."""
    import pyarrow  # noqa: PLC0415  (slow to import)

    leaves = dict(_leaves(schema, ()))
    names = next((names for names in sorted(leaves, key=len) if ".".join(names) == field), None)
    if names is None:
        known = {".".join(names): str(kind) for names, kind in leaves.items()}
        listed = [f"{name} ({kind:.40})" for name, kind in known.items()]
        shown = ", ".join(listed[:_MOST_NAMES]) + (", ..." if len(listed) > _MOST_NAMES else "")
        raise DataError(
            f"{planned.path} has no column {field!r}{did_you_mean(field, known)} It has: {shown}; choose one of text "
            "with --field."
        )
    kind = leaves[names]
    if wanted.kind is list:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return list(names), False
        raise DataError(f"{planned.path}: column {field!r} holds {kind}, not {wanted.what}; choose with --field.")
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if value in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        return list(names), True
    if value in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()):
        return list(names), False
    raise DataError(f"{planned.path}: column {field!r} holds {kind}, not text; choose another with --field.")


def _leaves(fields: Any, within: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The names that lead to each column, through structs, and its type."""
    import pyarrow  # noqa: PLC0415  (slow to import)

    for field in fields:
        if pyarrow.types.is_struct(field.type):
            yield from _leaves(field.type, (*within, field.name))
        else:
            yield (*within, field.name), field.type


def _declared_as_bytes(data: bytes, file: InputFile, field: str) -> str:
    """Some writers do not declare text as text. What is none is not repaired: it may be an image."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DataError(
            f"{file.path}: column {field!r} holds binary, and not all of it is UTF-8; choose another with --field, or "
            "write it as a column of strings."
        ) from None
