"""Text in every encoding that a mark can name, in every kind of file: the documents are those of the same UTF-8."""

import codecs
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt2.base.errors import DataError
from regpt2.data.datasets import text_files
from regpt2.data.sources import plan as documents_module
from regpt2.data.sources import records, text_encoding
from regpt2.data.sources.plan import Document, Skipped, Source
from regpt2.data.sources.text_encoding import HEAD_BYTES, TextBlocks, as_utf8, encoding_of

MARKS = {
    "utf-8": b"\xef\xbb\xbf",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\0\0",
    "utf-32-be": b"\0\0\xfe\xff",
}
UNMARKED = [encoding for encoding in MARKS if encoding != "utf-8"]
SENTENCE = "The quick brown fox — “quotes”, größer, 中文, 👍.\r\n\n"
SHORT, LONG = SENTENCE * 3, "".join(f"{n}: {SENTENCE}" for n in range(6_000))
LINES = "\r\n".join(json.dumps({"text": f"{n} {SENTENCE}"}, ensure_ascii=False) for n in range(300))
ARRAY = json.dumps([{"text": f"{n} {SENTENCE}"} for n in range(300)], indent=2, ensure_ascii=False)


def read(path: Path) -> tuple[list[Document], Skipped]:
    plan, skipped = text_files.plan(Source(path)), Skipped()
    return [document for part in plan.parts for document in text_files.documents(part, skipped)], skipped


def write(path: Path, data: bytes, kind: str = "") -> Path:
    """The file, also packed; as gzip in many members, of which the first hold a byte each."""
    path = path.with_name(path.name + kind)
    if kind == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
        return path
    members = (data[:1], data[1:2], data[2:3], data[3:])
    path.write_bytes(b"".join(map(gzip.compress, members)) if kind else data)
    return path


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize(
    ("name", "text"), [("short.txt", SHORT), ("long.md", LONG), ("a.jsonl", LINES), ("a.json", ARRAY)]
)
def test_marked_text_gives_the_documents_of_the_same_text_in_utf8(
    tmp_path: Path, name: str, text: str, encoding: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (records, documents_module):  # what can be cut is
        monkeypatch.setattr(module, "PART_BYTES", 100_000)
    (tmp_path / "plain").mkdir()
    expected, _ = read(write(tmp_path / "plain" / name, text.encode()))
    found, skipped = read(write(tmp_path / name, MARKS[encoding] + text.encode(encoding), kind))
    if (name, encoding) == ("long.md", "utf-8"):  # its pieces are found by the bytes of the file, mark and all
        found, expected = ([Document("".join(document.text for document in each))] * 2 for each in (found, expected))
    assert found == expected
    assert len(found) > 1 or found == [Document(SHORT)]
    assert not skipped


@given(text=st.text(max_size=60), encoding=st.sampled_from(list(MARKS)), block_bytes=st.integers(1, 9))
def test_a_text_read_in_blocks_of_any_size_is_the_text(text: str, encoding: str, block_bytes: int) -> None:
    skipped = Skipped()
    file = io.BytesIO(MARKS[encoding] + text.encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoding, "BLOCK_BYTES", block_bytes)
        assert as_utf8(file, encoding, skipped).read() == text.encode()
    assert not skipped


@given(data=st.binary(max_size=40), encoding=st.sampled_from(list(MARKS)), block_bytes=st.integers(1, 9))
def test_damage_becomes_replacement_characters_as_python_s_and_names_the_file(
    data: bytes, encoding: str, block_bytes: int
) -> None:
    skipped = Skipped()
    skipped.file = "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_encoding, "BLOCK_BYTES", block_bytes)
        blocks = TextBlocks(io.BytesIO(MARKS[encoding] + data), encoding, skipped)
        found = "".join(iter(blocks.read, ""))
    assert found == data.decode(encoding, "replace")
    try:
        data.decode(encoding)
        assert not skipped
    except UnicodeDecodeError:
        reason = f"files kept with invalid {encoding[:6].upper()} replaced"
        assert (skipped, skipped.first) == ({reason: 1}, {reason: "a.txt"})


@pytest.mark.parametrize("encoding", UNMARKED)
@pytest.mark.parametrize(
    "text", ["Plain English.\n", "Съешь ещё этих мягких булок.\n", "Ξεσκεπάζω την ψυχοφθόρα.\n", "x"]
)
def test_text_full_of_nuls_without_a_mark_is_refused_and_its_encoding_guessed(
    tmp_path: Path, text: str, encoding: str
) -> None:
    for kind, name in (("", "a.txt"), (".gz", "b.txt"), ("", "c.jsonl")):
        path = write(tmp_path / name, (text * 5).encode(encoding), kind)
        with pytest.raises(
            DataError, match=rf"{path.name} looks like {encoding[:6].upper()} without .*iconv -f"
        ) as told:
            read(path)
        guess = str(told.value).split("iconv -f ")[1].split()[0]
        assert codecs.lookup(guess) == codecs.lookup(encoding)


def test_chinese_in_utf32_without_a_mark_is_refused_too() -> None:
    for encoding in ("utf-32-le", "utf-32-be"):
        with pytest.raises(DataError, match=f"iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} "):
            encoding_of("漢字仮名交じり文".encode(encoding), "a.txt")


@pytest.mark.parametrize("data", [bytes(5000), bytes(range(9)) * 50], ids=["zeros", "controls"])
def test_what_is_no_text_in_any_encoding_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.txt is not text: .*% are NUL"):
        read(write(tmp_path / "a.txt", data))


def test_some_nuls_and_controls_in_a_text_stay_text(tmp_path: Path) -> None:
    for text in ("a\0b\x1b[31m\x7f\0", SENTENCE * 20 + "\0" * 50 + SENTENCE * 20, "x" * HEAD_BYTES + "\0" * 9000, ""):
        found, skipped = read(write(tmp_path / "a.txt", text.encode()))
        assert "".join(document.text for document in found) == text
        assert not skipped


def test_memory_stays_flat_while_a_long_text_is_transcoded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", codecs.BOM_UTF16_LE + (SENTENCE * 150_000).encode("utf-16-le"))
    part = text_files.plan(Source(path)).parts[0]
    tracemalloc.start()
    n_characters = sum(len(document.text) for document in text_files.documents(part, Skipped()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_characters == 150_000 * len(SENTENCE)
    assert peak < 3_000_000, "of 14 MB of text"
