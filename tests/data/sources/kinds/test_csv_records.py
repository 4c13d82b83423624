"""Rows of CSV files, against what Python's csv.writer wrote."""

import csv
import io

import pytest

from regpt2.data.sources.kinds import csv_records
from regpt2.data.sources.kinds.csv_records import row_documents
from regpt2.data.sources.plan import Skipped

TEXTS = ["plain", "with a\r\nreturn", 'a "quoted", one', "two\nlines", "line\u2028separator and \x0b", "ü€", ""]


def read(data: bytes, field: str = "text", encoding: str = "utf-8") -> tuple[list[str], Skipped]:
    skipped = Skipped()
    skipped.file = "a.csv"
    return [document.text for document in row_documents(io.BytesIO(data), encoding, field, skipped)], skipped


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_row_is_a_document_whatever_it_is_divided_by(delimiter: str, encoding: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *([n, text] for n, text in enumerate(TEXTS))])
    name = {"utf-16": "utf-16-le"}.get(encoding, "utf-8")
    assert read(file.getvalue().encode(encoding), encoding=name) == (TEXTS, {})


def test_a_file_without_the_column_is_left_out_and_its_columns_are_named() -> None:
    texts, skipped = read(b"id;body\n1;x\n")
    assert texts == [] and skipped == {"files without a column 'text'": 1}
    assert skipped.first == {"files without a column 'text'": "a.csv, where --field can be id, body"}
    assert read(b"id;body\n1;x\n", "body")[0] == ["x"]
    assert read(b"")[1] == {"files without a column 'text'": 1}


def test_short_rows_are_counted_and_blank_ones_are_not() -> None:
    assert read(b"id,text\n1\n\n2,b\r\n") == (["b"], {"rows without a column 'text'": 1})


def test_a_quotation_that_never_ends_is_reported_and_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "CELL_CHARACTERS", 1000)
    texts, skipped = read(b'text\nfirst\n"' + b"never closed, " * 1000)
    assert texts == ["first"] and skipped == {"files read only up to a damaged row": 1}
    assert "after row 2" in skipped.first["files read only up to a damaged row"]


def test_no_bytes_make_it_fail() -> None:
    assert read(b"text\n\xff\0\r\rb\n")[1] == {"files kept with invalid UTF-8 replaced": 1}
