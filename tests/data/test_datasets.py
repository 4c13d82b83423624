"""The shelf of data sets: real files of every kind in, and each document that they hold out, once and in order."""

import gzip
import hashlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt2.base import shelves
from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.data.datasets import python_library, text_files, tiny_shakespeare
from regpt2.data.sources import json_records, records
from regpt2.data.sources import plan as documents_module
from regpt2.data.sources.kinds import html_text, pdf_text
from regpt2.data.sources.plan import Document, Skipped, Source

INVALID = "documents kept with invalid UTF-8 replaced"


def read_all(entry: ModuleType, source: Source) -> tuple[list[Document], Skipped]:
    """Every document of every part, as a worker would read them, and everything counted."""
    plan = entry.plan(source)
    skipped = Skipped()
    skipped.include(plan.skipped, plan.skipped.first)
    found = []
    for part in plan.parts:
        found += entry.documents(pickle.loads(pickle.dumps(part)), skipped)
    return found, skipped


def texts(path: Path, field: str = "text") -> list[str]:
    found, _ = read_all(text_files, Source(path, field))
    return [document.text for document in found]


def split_of(document: Document, val_fraction: float) -> str:
    return document.split_for(val_fraction, hashlib.sha256(document.text.encode()).digest())


def compress(path: Path, kind: str) -> Path:
    data, target = path.read_bytes(), path.with_name(path.name + kind)
    if kind == ".gz":
        target.write_bytes(gzip.compress(data))
    else:
        with pa.output_stream(str(target), compression="zstd") as stream:
            stream.write(data)
    path.unlink()
    return target


@pytest.mark.parametrize("name", shelves.entries("data.datasets"))
def test_every_entry_has_a_description_of_one_line(name: str) -> None:
    description = shelves.load("data.datasets", name).DESCRIPTION
    assert description
    assert "\n" not in description


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_jsonl_gives_a_document_a_line_and_counts_the_rest(tmp_path: Path, kind: str) -> None:
    lines = [
        json.dumps({"text": "one\ntwo", "other": 1}).encode(),
        b"",
        b"not json",
        b'["a list"]',
        b'{"other": "no text"}',
        b'{"text": 5}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "\\ud83d\\ude00"}',
        b"[" * 100_000,
        b'{"text": "no line end"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found, skipped = read_all(text_files, Source(compress(path, kind) if kind else path))
    assert [document.text for document in found] == ["one\ntwo", "bad \ufffd byte", "😀", "no line end"]
    assert skipped == {
        "lines that are not JSON": 2,
        "lines without a field 'text'": 2,
        "lines whose field 'text' is not text": 1,
        INVALID: 1,
    }


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.text(max_size=30), max_size=20), part_bytes=st.integers(1, 60), line_bytes=st.integers(40, 400)
)
def test_jsonl_cut_anywhere_gives_every_line_once(
    tmp_path: Path, words: list[str], part_bytes: int, line_bytes: int
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": word}) for word in words]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PART_BYTES", part_bytes)
        patch.setattr(documents_module, "PART_BYTES", part_bytes)
        patch.setattr(json_records, "LINE_BYTES", line_bytes)
        found, skipped = read_all(text_files, Source(path))
    fitting = [word for word, line in zip(words, lines, strict=True) if len(line) < line_bytes]
    assert [document.text for document in found] == fitting
    assert sum(skipped.values()) == len(words) - len(fitting)


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string()])
def test_parquet_is_read_by_row_group_and_column(tmp_path: Path, kind: str, text_type: pa.DataType) -> None:
    rows = [f"document {n}" for n in range(1000)] + [None, "é"]
    table = pa.table({"id": range(len(rows)), "body": pa.array(rows, text_type)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=100)
    path = compress(path, kind) if kind else path
    found, skipped = read_all(text_files, Source(path, "body"))
    assert [document.text for document in found] == [row for row in rows if row is not None]
    assert skipped == {"rows whose 'body' is null": 1}
    with pytest.raises(DataError, match=r"no column 'bdy'; did you mean 'body'\?.*--field"):
        read_all(text_files, Source(path, "bdy"))
    with pytest.raises(DataError, match="column 'id' holds int64"):
        read_all(text_files, Source(path, "id"))


def test_parquet_with_invalid_utf8_is_kept_and_counted(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"bad \xff"], pa.binary())
    column = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found, skipped = read_all(text_files, Source(tmp_path))
    assert [document.text for document in found] == ["ok", "bad \ufffd"]
    assert skipped == {INVALID: 1}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    for kind in (".gz", ".zst"):
        source.write_text('{"text": "x"}\n' * 100_000)
        path = compress(source, kind)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=rf"a.jsonl\{kind} cannot be decompressed"):
            texts(path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"b\.parquet is not a readable parquet file"):
        texts(tmp_path / "b.parquet")


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_small_text_is_one_document(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# Title\r\n\n" + b"x" * 60_000)
    [document] = read_all(text_files, Source(compress(path, kind) if kind else path))[0]
    assert document == Document("# Title\r\n\n" + "x" * 60_000)


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("unit", ["A paragraph of text.\n\n", "A line of text.\r\n", "no end 中 ", "中"])
def test_long_text_is_cut_into_pieces_that_join_to_the_whole(tmp_path: Path, kind: str, unit: str) -> None:
    whole = unit * (3_000_000 // len(unit.encode()))
    path = tmp_path / "input.txt"
    path.write_bytes(whole.encode())
    plan = text_files.plan(Source(path))
    assert len(plan.parts) == 2, "a long file is shared between workers"
    found, skipped = read_all(text_files, Source(compress(path, kind) if kind else path))
    assert "".join(document.text for document in found) == whole
    assert not skipped, "no character is cut"
    assert [document.piece for document in found] == list(range(len(found)))
    assert all(16_000 < len(document.text.encode()) < 50_000 for document in found[:-1])
    ends = {"A paragraph of text.\n\n": "\n\n", "A line of text.\r\n": "\r\n"}.get(unit, "")
    assert all(document.text.endswith(ends) for document in found)
    splits = [split_of(document, 0.05) for document in found]
    assert [n for n, split in enumerate(splits) if split == "val"] == list(range(5, len(found), 20))


def test_split_follows_the_content_and_the_fraction() -> None:
    splits = Counter(split_of(Document(f"text {n}"), 0.1) for n in range(5000))
    assert 420 < splits["val"] < 580  # four standard deviations of a binomial with p = 0.1
    assert split_of(Document("x"), 0.1) == split_of(Document("x"), 0.1)
    assert split_of(Document("x", split="val"), 0.0001) == "val"
    assert [split_of(Document("", piece=n), 0.5) for n in range(4)] == ["train", "val", "train", "val"]


def test_folders_are_read_in_order_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.md",
        "a.txt",
        "c.TXT",
        ".hidden.txt",
        ".git/x.txt",
        "picture.png",
        "b/another.png",
        "noend",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "dead.txt").symlink_to(tmp_path / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "up").symlink_to("..")
    found, skipped = read_all(text_files, Source(tmp_path))
    assert [document.text for document in found] == ["a.txt", "b/10.md", "b/2.txt", "c.TXT"]
    left_out = {
        "folders behind a link": (2, "loop"),
        "folders hidden": (1, ".git"),
        "files hidden": (1, ".hidden.txt"),
        "files of a kind not read (.png)": (2, "b/another.png"),
        "files of a kind not read (no suffix)": (1, "noend"),
        "files missing behind a link, or not plain files": (1 + hasattr(os, "mkfifo"), "dead.txt"),
    }
    assert {reason: (number, skipped.first[reason]) for reason, number in skipped.items()} == left_out


def test_suffixes_beyond_a_few_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for n in range(100, 130):
        (tmp_path / f"frame.{n}").touch()
    (tmp_path / "frame.\x1b[2J").touch()
    _, skipped = read_all(text_files, Source(tmp_path))
    assert len(skipped) == 21
    assert skipped["files of a kind not read (other suffixes)"] == 11
    assert skipped.first["files of a kind not read (other suffixes)"] == "frame.119"
    assert "\x1b" not in repr(skipped.first) + repr(list(skipped))


def test_every_kind_gives_its_documents(tmp_path: Path) -> None:
    """Also compressed; a long text within HTML is cut as one in a file of its own."""
    long = "".join(f"<p>Paragraph {n} &amp; more" for n in range(4000))
    for name, text in (
        ("a.rst", "Title\n=====\n"),
        ("b.tex", "\\section{One}"),
        ("c.HTML", "<h1>T</h1>a<br>b"),
        ("d.htm", long),
        ("e.csv", "n,text\n1,row one\n2,row two\n"),
        ("f.tsv", "text\tn\nrow\t1\n"),
        ("g.csv", "n\n1\n"),
    ):
        (tmp_path / name).write_text(text)
    for name in ("c.HTML", "e.csv"):
        (tmp_path / f"z{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    found, skipped = read_all(text_files, Source(tmp_path))
    pieces = [document.text for document in found if document.piece is not None]
    assert len(pieces) > 2 and "".join(pieces).split("\n\n")[1:3] == ["Paragraph 1 & more", "Paragraph 2 & more"]
    rows, page = ["row one", "row two"], "T\n\na\nb\n"
    short = [document.text for document in found if document.piece is None]
    assert short == ["Title\n=====\n", "\\section{One}", page, *rows, "row", page, *rows]
    assert (skipped, skipped.first) == (
        {"files without a column 'text'": 1},
        {"files without a column 'text'": "g.csv, where --field can be n"},
    )


def test_suffixes_choose_what_is_read(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "c.html", "d.F90", "e.py.gz"):
        data = f"<b>{name}</b>".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found, skipped = read_all(text_files, Source(tmp_path, suffixes=(".py", "f90", ".HTML")))
    assert [document.text for document in found] == ["<b>a.py</b>", "c.html\n", "<b>d.F90</b>", "<b>e.py.gz</b>"]
    assert skipped == {"files of a kind not read (.txt)": 1}
    for wrong, message in (
        (".gz", "as .txt of a.txt.gz"),
        ("", "expected what a file's name ends with"),
        (".py,.rst", ""),
    ):
        with pytest.raises(UsageError, match=f"--suffixes.*{message}"):
            text_files.plan(Source(tmp_path, suffixes=(wrong,)))


def test_files_whose_library_is_not_installed_are_left_out_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.pdf", "c.html"):
        (tmp_path / name).write_text(name)
    planned = text_files.plan(Source(tmp_path))
    for reader in (html_text, pdf_text):
        monkeypatch.setattr(reader, "is_installed", lambda: False)
    found, skipped = read_all(text_files, Source(tmp_path))
    assert [document.text for document in found] == ["a.txt"]
    assert skipped == {
        f"files of a kind not read ({kind}; pip install 'regpt2[documents]')": 1 for kind in (".pdf", ".html")
    }
    with pytest.raises(DataError, match=r"b\.pdf needs a library that is not installed here: pip install"):
        list(text_files.documents(planned.parts[0], Skipped()))  # on another machine of a cluster, say


def test_many_small_files_share_a_part(tmp_path: Path) -> None:
    for n in range(50):
        (tmp_path / f"{n:02}.txt").write_text("x" * 60_000)
    assert [len(part.slices) for part in text_files.plan(Source(tmp_path)).parts] == [35, 15]


def test_plan_is_the_same_for_a_copy_but_notices_every_change(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "corpus").mkdir(parents=True)
        (tmp_path / place / "corpus" / "a.txt").write_text("text")
    one, two = (text_files.plan(Source(tmp_path / place / "corpus")) for place in ("one", "two"))
    assert (one.source, one.revision) == (two.source, two.revision) == ("corpus", one.revision)
    path = tmp_path / "one" / "corpus" / "a.txt"
    os.utime(path, ns=(1, 1))
    assert text_files.plan(Source(path.parent)).fingerprint != one.fingerprint
    with pytest.raises(DataError, match=r"a\.txt was changed while it was being prepared"):
        list(text_files.documents(one.parts[0], Skipped()))
    path.write_text("longer text")
    assert text_files.plan(Source(path.parent)).revision != one.revision


def test_wrong_inputs_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --input"):
        text_files.plan(Source())
    with pytest.raises(UsageError, match="no such file or folder"):
        text_files.plan(Source(tmp_path / "absent"))
    (tmp_path / "a.png").touch()
    with pytest.raises(
        DataError, match=r"one of \.txt .* files of a kind not read \(\.png\): 1, first in a\.png.*--suffixes"
    ):
        text_files.plan(Source(tmp_path))
    with pytest.raises(UsageError, match="takes no --input"):
        python_library.plan(Source(tmp_path))


def test_tiny_shakespeare_accepts_only_the_pinned_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny_shakespeare, "URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DownloadError, match="check the network"):
        tiny_shakespeare.plan(Source())
    copy = tmp_path / "input.txt"
    with pytest.raises(DataError, match="no such file"):
        tiny_shakespeare.plan(Source(copy))
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 17_000
    copy.write_text(text)
    with pytest.raises(DataError, match=r"SHA-256 is [0-9a-f]{64}, expected 86c4e6aa"):
        tiny_shakespeare.plan(Source(copy))
    monkeypatch.setattr(tiny_shakespeare, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    found, _ = read_all(tiny_shakespeare, Source(copy))
    assert "".join(document.text for document in found) == text
    assert {split_of(document, 0.05) for document in found} == {"train", "val"}


@pytest.mark.network
def test_tiny_shakespeare_can_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path))
    try:
        found, _ = read_all(tiny_shakespeare, Source())
    except DownloadError as error:
        if "could not download" in str(error):
            pytest.skip(f"there is no network: {error}")
        raise
    assert sum(len(document.text.encode()) for document in found) == 1_115_394


def test_python_library_is_megabytes_of_clean_text_in_one_order() -> None:
    found, skipped = read_all(python_library, Source())
    again, _ = read_all(python_library, Source())
    assert found == again
    assert INVALID not in skipped
    assert sum(len(document.text.encode()) for document in found) > 5_000_000
    names = [piece.file.name for part in python_library.plan(Source()).parts for piece in part.slices]
    assert "json/decoder.py" in names
    assert not [name for name in names if "/test/" in name or "site-packages" in name or name.endswith(".pyc")]
    assert any(document.text.startswith('The "assert" statement') for document in found), "a topic of help(), as text"


def test_neighboring_slices_of_a_file_are_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (documents_module.InputFile(f"/{name}", name, 9, 0) for name in "ab")
    cut = [(documents_module.Slice(a, 0, 3), 3), (documents_module.Slice(a, 3, 6), 3)]
    cut += [(documents_module.Slice(b, 6, 9), 3), (documents_module.Slice(b, 0, 3), 3)]
    monkeypatch.setattr(documents_module, "PART_BYTES", 9)
    first, second = documents_module.group(cut)
    assert first.slices == (documents_module.Slice(a, 0, 6), documents_module.Slice(b, 6, 9))
    assert (second.slices, second.n_bytes) == ((documents_module.Slice(b, 0, 3),), 3)
    monkeypatch.setattr(documents_module, "LARGE_BYTES", 12)
    monkeypatch.setattr(documents_module, "LARGE_PART_BYTES", 12)
    assert len(documents_module.group(cut)) == 1
