"""nanoGPT's character-level data: its pickle read without running it, and folders that keep what their ids are."""

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regpt2.base.errors import DataError, UsageError
from regpt2.cli import main
from regpt2.data.characters import CharacterTokenizer, meta_bytes, read_meta
from regpt2.data.checks.integrity import Findings, check_data
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.tokenizer import StreamDecoder
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens

TEXT = "First Citizen:\nWe are accounted poor citizens, é 日 🙂.\n"
CHARACTERS = "".join(sorted(set(TEXT)))


def meta_of(characters: str) -> dict[str, Any]:
    """As nanoGPT's data/shakespeare_char/prepare.py makes it."""
    stoi = {ch: i for i, ch in enumerate(characters)}
    return {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}


def write_folder(folder: Path, text: str = TEXT * 50, n_val: int = 200) -> Path:
    """What nanoGPT's prepare.py leaves: train.bin, val.bin, meta.pkl."""
    meta = meta_of("".join(sorted(set(text))))
    ids = np.array([meta["stoi"][ch] for ch in text], dtype=np.uint16)
    folder.mkdir(parents=True)
    ids[:-n_val].tofile(folder / "train.bin")
    ids[-n_val:].tofile(folder / "val.bin")
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump(meta, file)
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_characters_are_those_that_pickle_wrote(tmp_path: Path, protocol: int) -> None:
    everything = "".join(chr(n) for n in range(65_536 + 2048) if not 0xD800 <= n < 0xE000)
    for characters in (CHARACTERS, everything[:5000]):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of(characters), protocol))
        assert read_meta(tmp_path / "meta.pkl").characters == characters
    if protocol == pickle.DEFAULT_PROTOCOL:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of(everything), protocol))
        assert read_meta(tmp_path / "meta.pkl").vocab_size == 65_536


@given(characters=st.text(min_size=1, max_size=300).map(lambda text: "".join(dict.fromkeys(text))))
def test_python_s_pickle_reads_what_is_written(characters: str) -> None:
    assert pickle.loads(meta_bytes(characters)) == meta_of(characters)


class Evil:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    folder, mark = write_folder(tmp_path / "data"), tmp_path / "ran"
    for evil in (Evil(mark), meta_of("ab") | {"itos": {0: Evil(mark), 1: "b"}}, meta_of("ab") | {"more": Evil(mark)}):
        (folder / "meta.pkl").write_bytes(pickle.dumps(evil, protocol))
        with pytest.raises(DataError, match=r"meta\.pkl: it holds more than dicts, texts and whole numbers .*not run"):
            open_tokens(folder, "train")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark), protocol))
    assert mark.exists(), "the test's own pickle does nothing"


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"vocab_size": 50304}, "expected a dict of 'vocab_size', 'itos' and 'stoi'"),
        ("abc", "it holds 'abc', expected"),
        (["a"], "more than dicts, texts and whole numbers"),
        (meta_of("ab") | {"vocab_size": 3}, "vocab_size is 3, 'itos' has 2 and 'stoi' 2"),
        (meta_of("ab") | {"vocab_size": "2"}, "not a whole number"),
        (meta_of("ab") | {"itos": {0: "a", 2: "b"}}, "'itos' has None for id 1"),
        (meta_of("ab") | {"itos": {0: "a", 1: "ba"}}, "'itos' has 'ba' for id 1, expected one character"),
        (meta_of("ab") | {"itos": {0: "a", 1: {}}}, "'itos' has a dict for id 1"),
        (meta_of("ab") | {"stoi": {"a": 0, "c": 1}}, "'itos' has 'b' for id 1, 'stoi' has id None"),
        (meta_of("ab") | {"itos": {0: "a", 1: "a"}}, "'itos' has 'a' for id 1, 'stoi' has id 0"),
        (meta_of("a\ud800"), "half a surrogate pair"),
        (meta_of(""), "0 characters, expected 1 to 65,536"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_what_nanogpt_does_not_write_is_refused(tmp_path: Path, meta: object, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(DataError, match=message) as caught:
        read_meta(tmp_path / "meta.pkl")
    assert "make it again" in str(caught.value) and "move it elsewhere" in str(caught.value)


def test_sizes_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(b"(" * (5 << 20))
    with pytest.raises(DataError, match="5,242,880 bytes, expected at most"):
        read_meta(path)
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")  # a memo at 2^31: Python's own reader takes 16 GB for it
    with pytest.raises(DataError, match="it holds a dict of"):
        read_meta(path)
    deep = b"}J\x00\x00\x00\x00"
    path.write_bytes(b"\x80\x02" + deep * 100_000 + b"}" + b"s" * 100_000 + b".")
    with pytest.raises(DataError, match=r"a dict of \['0'\]"):
        read_meta(path)


@given(data=st.binary(max_size=60), at=st.integers(0, 200), protocol=st.integers(0, 5))
def test_any_bytes_are_characters_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, protocol: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "meta.pkl"
    whole = pickle.dumps(meta_of("ab\n"), protocol)
    for changed in (data, whole[:at] + data, whole[:at] + data + whole[at + len(data) :]):
        path.write_bytes(changed)
        with suppress(DataError):
            assert read_meta(path).characters


def test_text_comes_back_and_bytes_are_those_of_utf8() -> None:
    tokenizer = CharacterTokenizer(CHARACTERS)
    ids = tokenizer.encode(TEXT)
    assert ids == [CHARACTERS.index(ch) for ch in TEXT]
    assert tokenizer.decode(ids) == TEXT
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(token) for token in ids] == list(TEXT)
    assert tokenizer.token_bytes()[ids].tolist() == [len(ch.encode()) for ch in TEXT]
    assert tokenizer.count(np.array(ids, dtype=np.uint16)) == (0, len(TEXT.encode()))
    assert (tokenizer.eot, tokenizer.decode([tokenizer.start_id])) == (None, "\n")
    assert [CharacterTokenizer(text).start_id for text in ("cab", "c\nab")] == [0, 1]
    assert tokenizer.can_encode("are") and not tokenizer.can_encode("Are!")


def test_a_character_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"'!', character 6 of the text, is not one of the 4 .*: 'Whoa'; write the"):
        CharacterTokenizer("Whoa").encode("Whooo!")
    with pytest.raises(DataError, match="'a' comes twice among 3"):
        CharacterTokenizer("aba")


def test_the_order_of_the_characters_makes_another_vocabulary() -> None:
    assert len({CharacterTokenizer(text).fingerprint for text in ("ab", "ba", "abc")}) == 3
    assert CharacterTokenizer("ab").fingerprint == CharacterTokenizer("ab").fingerprint


def test_a_folder_with_meta_pkl_holds_characters(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shakespeare_char")
    with open_tokens(folder, "train") as train, open_tokens(folder, "val") as val:
        tokenizer = train.tokenizer()
        text = tokenizer.decode([*train.read(0, train.n_tokens), *val.read(0, val.n_tokens)])
        assert text == TEXT * 50
        assert (train.tokenizer_name, train.vocab_size) == ("characters", len(CHARACTERS))
        assert train.tokenizer_fingerprint == tokenizer.fingerprint == CharacterTokenizer(CHARACTERS).fingerprint
        assert f"its tokens are the {len(CHARACTERS)} characters of its meta.pkl" in train.note
        before = train.fingerprint
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta_of(CHARACTERS[::-1])))
    with open_tokens(folder, "train") as train:
        assert train.fingerprint != before
    (folder / "meta.pkl").unlink()
    with open_tokens(folder, "train") as train:
        assert train.tokenizer_name == "gpt2"


def test_an_id_that_is_no_character_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    np.array([0, len(CHARACTERS), 1], dtype=np.uint16).tofile(folder / "train.bin")
    with open_tokens(folder, "train") as train, pytest.raises(DataError, match=r"id 24 at token 1, .* of 24 \(char"):
        train.read(0, 3)
    findings = Findings()
    check_data(folder, findings)
    assert [one.status for one in findings.all if "train split" in one.what] == ["BAD"]
    assert [one.status for one in findings.all if "val split" in one.what] == ["ok"]


def test_a_mixture_of_other_characters_is_refused(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", "abc\n" * 200)
    same, other = write_folder(tmp_path / "b", "cab\n" * 200), write_folder(tmp_path / "c", "abd\n" * 200)
    with open_mixture(read_shares("", [f"{first}=1", f"{same}=1"])) as mixture:
        assert mixture.tokenizer().characters == "\nabc"
    with pytest.raises(
        DataError, match=r"c was made with the tokenizer 'characters' of 4 tokens, .*a with another 'chara"
    ):
        open_mixture(read_shares("", [f"{first}=1", f"{other}=1"]))


def test_inspect_shows_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data")
    assert main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    counts = json.loads((tmp_path / "found.json").read_text())["counts"]["train"]
    assert (counts["end_of_text"], counts["documents"], counts["ids_used"]) == (None, 0, len(CHARACTERS))
    said = capsys.readouterr().out
    assert "│ First Citizen:\n  │ We are accounted poor citizens, é 日 🙂.\n" in said
    assert "no end of text among them" in said and f"{len(CHARACTERS)} ids occur, 100.0% of the vocabulary" in said
    assert "GPT-2" not in said
    other = write_folder(tmp_path / "other", TEXT.replace("poor", "rich") * 50)
    assert main(["inspect", str(folder), "--against", str(other)]) == 1
    said = capsys.readouterr().out
    assert "no manifest.json, its tokens those of meta.pkl" in said and "GPT-2" not in said


@pytest.mark.parametrize("to", ["native", "nanogpt"])
def test_resharded_folders_keep_their_characters(tmp_path: Path, to: str) -> None:
    folder, out, again = write_folder(tmp_path / "data"), tmp_path / to, tmp_path / "again"
    (folder / "val.bin").unlink()
    assert main(["reshard", str(folder), str(out), "--to", to, "--val-tokens", "300"]) == 0
    assert main(["reshard", str(out), str(again), "--to", "nanogpt"]) == 0
    for place in (out, again):
        with open_tokens(place, "val") as val, open_tokens(place, "train") as train:
            ids = [*val.read(0, val.n_tokens), *train.read(0, train.n_tokens)]
            assert val.n_tokens == 300 and train.tokenizer().decode(ids) == (TEXT * 50)[:-200]
    assert pickle.loads((again / "meta.pkl").read_bytes()) == meta_of(CHARACTERS)
    if to == "native":
        manifest = Manifest.read(out)
        assert (manifest.tokenizer, manifest.characters) == ("characters", CHARACTERS)
        text_bytes = sum(split.text_bytes for split in manifest.splits.values())
        assert text_bytes == len((TEXT * 50)[:-200].encode())
        assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize("to", ["datatrove", "llmc", "megatron", "npy"])
def test_formats_of_bare_ids_do_not_take_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    folder = write_folder(tmp_path / "data")
    assert main(["reshard", str(folder), str(tmp_path / "out"), "--to", to]) == 2
    assert "cannot say which characters the ids of" in (said := capsys.readouterr().err)
    assert "formats that can: nanogpt, native" in said and not (tmp_path / "out").exists()
    assert main(["reshard", str(folder), str(tmp_path / "out"), "--to", "native", "--tokenizer", "gpt2"]) == 2
    assert "--tokenizer gpt2: meta.pkl says characters" in capsys.readouterr().err
