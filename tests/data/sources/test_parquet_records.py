"""Parquet of strangers: text of every type that holds it, in columns and within structs, and what is no text."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regpt2.base.errors import DataError
from regpt2.data.datasets import text_files
from regpt2.data.sources.plan import Skipped, Source

ROWS = [f"document {n % 7} — größer 中文" for n in range(700)] + [None, ""]
TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
}


def read(path: Path, field: str = "text") -> tuple[list[str], Skipped]:
    plan, skipped = text_files.plan(Source(path, field)), Skipped()
    return [document.text for part in plan.parts for document in text_files.documents(part, skipped)], skipped


def column(kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(ROWS, kind.value_type).dictionary_encode().cast(kind)
    is_text = kind in (pa.string(), pa.large_string(), pa.string_view())
    return pa.array(ROWS if is_text else [row if row is None else row.encode() for row in ROWS], kind)


@pytest.mark.parametrize("kind", TYPES)
def test_text_of_every_type_is_read(tmp_path: Path, kind: str) -> None:
    texts = column(TYPES[kind])
    is_view = "view" in kind  # pyarrow cannot cut these, so it writes them as one row group
    within = pa.StructArray.from_arrays([texts, pa.array(range(len(ROWS)))], ["body", "n"])
    table = pa.table({"id": range(len(ROWS)), "text": texts, "in": within})
    try:
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=len(ROWS) if is_view else 100)
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this pyarrow cannot write it: {error}")
    for field in ("text", "in.body"):
        found, skipped = read(tmp_path / "a.parquet", field)
        assert found == [row for row in ROWS if row is not None]
        assert (skipped, skipped.first) == (
            {f"rows whose {field!r} is null": 1},
            {f"rows whose {field!r} is null": "a.parquet"},
        )


def test_bytes_that_are_no_text_are_refused_not_repaired(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\x89PNG\xff"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' holds binary, and not all of it is UTF-8; choose"):
        read(tmp_path)


def test_a_struct_that_is_null_has_no_text(tmp_path: Path) -> None:
    data = [{"text": "a", "m": {"t": "x"}}, None, {"text": None, "m": None}, {"text": "b", "m": {"t": None}}]
    pq.write_table(pa.table({"data": data}), tmp_path / "a.parquet")
    assert read(tmp_path, "data.text") == (["a", "b"], {"rows whose 'data.text' is null": 2})
    assert read(tmp_path, "data.m.t") == (["x"], {"rows whose 'data.m.t' is null": 3})


def test_a_column_whose_name_has_a_dot_goes_before_one_within_another(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [{"text": "nested"}] * 3, "a.text": ["flat"] * 3}), tmp_path / "a.parquet")
    assert read(tmp_path, "a.text") == (["flat"] * 3, {})


def test_where_the_column_is_missing_or_no_text_all_are_listed(tmp_path: Path) -> None:
    data = pa.StructArray.from_arrays([pa.array(["x"]), pa.array([1.5])], ["text", "n"])
    table = pa.table({"id": [1], "data": data, "list": [["a"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    listed = r"It has: id \(int64\), data\.text \(string\), data\.n \(double\), list \(list<"
    with pytest.raises(DataError, match=rf"a\.parquet has no column 'text'; did you mean 'data\.text'\? {listed}"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"column 'list' holds list<.*, not text"):
        read(tmp_path, "list")
