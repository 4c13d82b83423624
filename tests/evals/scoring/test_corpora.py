"""Files of corpora: plain, in a zip, in a tar; what is damaged, too large or of another kind is said."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from regpt2.base.errors import DataError
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals.scoring import corpora
from regpt2.evals.scoring.corpora import last_bytes, read_member, read_text, sentences

BYTES = load_tokenizer("bytes")
CONTENT = b"some text\n" * 1000


def pack(path: Path, name: str, content: bytes = CONTENT) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("other", b"x")
            archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as packed:
        for member, data in (("other", b"x"), (name, content)):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            packed.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
@pytest.mark.parametrize("name", ["a/b.txt", "../../b.txt"])
def test_a_member_is_read_and_nothing_is_written(tmp_path: Path, suffix: str, name: str) -> None:
    path = pack(tmp_path / f"packed{suffix}", name)
    assert read_member(path, name) == CONTENT
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"the archive has no file c\.txt"):
        read_member(path, "c.txt")


def test_a_tar_may_name_its_members_from_a_dot(tmp_path: Path) -> None:
    assert read_member(pack(tmp_path / "p.tgz", "./a/b.txt"), "a/b.txt") == CONTENT


def test_a_plain_file_is_the_member_itself(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(CONTENT)
    assert read_text(tmp_path / "plain", "a/b.txt") == CONTENT.decode()


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / f"p{suffix}", "a", content=bytes(20_000_000))
    monkeypatch.setattr(corpora, "_MOST_BYTES", 9_999)
    tracemalloc.start()
    with pytest.raises(DataError, match="more than the 9,999 bytes"):
        read_member(path, "a")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_a_damaged_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    path = pack(tmp_path / f"p{suffix}", "a", content=bytes(range(256)) * 999)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read"):
        read_member(path, "a")


def test_a_link_within_a_tar_leads_nowhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as packed:
        for name, target in (("a", "/etc/hostname"), ("b", "b")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            packed.addfile(entry)
    for name in ("a", "b"):
        with pytest.raises(DataError):
            read_member(tmp_path / "p.tar", name)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 text: byte 0xff at 3"):
        read_text(tmp_path / "a", "a")


def test_sentences_are_detokenized_and_their_words_counted() -> None:
    text = sentences(" it 's one \n two <unk> N \n three \n", BYTES, limit=0)
    assert [BYTES.decode(ids) for ids in text.documents] == ["it's one\ntwo <unk> N\nthree\n"]
    assert text.n_units == 3 + 3 + 1
    assert sentences("a b\nc\n", BYTES, limit=1).n_units == 2


def test_characters_that_are_cut_in_two_are_left_out() -> None:
    data = "äöü".encode()  # two bytes each
    text = last_bytes(data[:-1], 4, BYTES, limit_tokens=0)  # half of ä, ö, half of ü
    assert [BYTES.decode(ids) for ids in text.documents] == ["ö"]
    assert text.n_units == 2
    assert last_bytes(b"abcdef", 5, BYTES, limit_tokens=3).n_units == 3
    gpt2 = load_tokenizer("gpt2")
    assert last_bytes(b"hello world", 100, gpt2, limit_tokens=1).n_units == 5
