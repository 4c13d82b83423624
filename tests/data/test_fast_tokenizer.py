"""gigatoken beside tiktoken, and beside a broken one: what is encoded is always what tiktoken says."""

import importlib.metadata
import json
import lzma
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from regpt2.base.errors import UsageError
from regpt2.data import fast_tokenizer as encoders
from regpt2.data.fast_tokenizer import FIRST_DOCUMENTS, PART_DOCUMENTS, ProvenTokenizer, fast_tokenizer, odd_strings
from regpt2.data.tokenizer import BytesTokenizer, Gpt2Tokenizer, Tokenizer, find_vocab

CORPUS = Path(__file__).parents[2].parent / "shared" / "data" / "corpus" / "val.jsonl.xz"
CHARACTERS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]


@pytest.fixture(scope="module")
def tiktoken() -> Gpt2Tokenizer:
    return Gpt2Tokenizer(find_vocab().read_bytes())


@pytest.fixture(scope="module")
def gigatoken(tiktoken: Gpt2Tokenizer) -> ProvenTokenizer:
    """The real one, past its proof: nothing is compared any more, and what it says is what comes out."""
    pytest.importorskip("gigatoken")
    tokenizer = ProvenTokenizer(tiktoken)
    assert tokenizer.encoder.startswith("gigatoken "), "it did not pass the proof"
    tokenizer._n_to_compare = 0
    return tokenizer


def check_equal(tokenizer: Tokenizer, tiktoken: Gpt2Tokenizer, text: str) -> None:
    ids = tokenizer.encode_to_numpy(text)
    assert ids.dtype == np.uint16
    assert np.array_equal(ids, tiktoken.encode_to_numpy(text)), ascii(text[:200])


@pytest.mark.seconds
def test_20_000_random_strings_have_equal_ids(gigatoken: ProvenTokenizer, tiktoken: Gpt2Tokenizer) -> None:
    rng = random.Random(20_000)
    spans = (range(0x100), range(0x2000, 0x2100), range(0x3000), range(0x1F300, 0x1FB00), range(0x110000))
    plain = ("don't", " we'll", "'RE", "  ", " \n", "<|endoftext|>", " x1", "\u0301", "\ud83d", "１２", "\u200d")
    for _ in range(20_000):
        pieces = [rng.choice(plain) if rng.random() < 0.3 else chr(rng.choice(rng.choice(spans))) for _ in range(12)]
        check_equal(gigatoken, tiktoken, "".join(pieces))


@pytest.mark.seconds
def test_every_character_is_classified_alike_or_left_to_tiktoken(
    gigatoken: ProvenTokenizer, tiktoken: Gpt2Tokenizer
) -> None:
    known = [character for character in CHARACTERS if not encoders._NEW.match(character)]
    for start in range(0, len(known), 10_000):
        # "'re" is split off from a letter or number, the first space from the second unless white space follows.
        text = "".join(f"{character}'re  {character}b\n" for character in known[start : start + 10_000])
        assert np.array_equal(gigatoken._encode(text.encode()), tiktoken.encode_to_numpy(text)), hex(start)
    for character in set(CHARACTERS) - set(known):
        check_equal(gigatoken, tiktoken, f"{character}'re")


def test_real_text_has_equal_ids(gigatoken: ProvenTokenizer, tiktoken: Gpt2Tokenizer) -> None:
    for path in sorted(Path(__file__).parents[2].glob("src/regpt2/commands/*.py")):
        check_equal(gigatoken, tiktoken, path.read_text(encoding="utf-8"))
    if CORPUS.exists():
        with lzma.open(CORPUS) as lines:
            for line in lines:
                check_equal(gigatoken, tiktoken, json.loads(line)["text"])


@pytest.mark.seconds
@pytest.mark.parametrize("unit", [" ", "\n", "a", "\xa0", "中", "7", " \t", "=", "<|endoftext|>"])
def test_long_runs_have_equal_ids(gigatoken: ProvenTokenizer, tiktoken: Gpt2Tokenizer, unit: str) -> None:
    for end in ("", "end"):
        check_equal(gigatoken, tiktoken, unit * (500_000 // len(unit)) + end)


Encode = Callable[[bytes], npt.NDArray[np.uint32]]


@pytest.fixture
def stand_in(tiktoken: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.SimpleNamespace]:
    """Puts a module in gigatoken's place that encodes right but for one text; `loads` counts how often it began."""

    def install(wrong: str | None = None) -> types.SimpleNamespace:
        def from_tiktoken(path: Path, pretokenizer: str, special_tokens: dict[str, int]) -> types.SimpleNamespace:
            assert len(path.read_bytes().splitlines()) == 50256
            module.loads += 1
            return types.SimpleNamespace(encode=encode)

        def encode(data: bytes) -> npt.NDArray[np.uint32]:
            ids = tiktoken.encode_to_numpy(data.decode()).astype(np.uint32)
            if data.decode() == wrong:
                ids[-1] += 1
            return ids

        module = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_tiktoken=from_tiktoken), loads=0)
        monkeypatch.setitem(sys.modules, "gigatoken", module)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
        return module

    return install


def test_one_wrong_id_in_the_fixed_set_brings_tiktoken_back(
    stand_in: Callable[..., object], tiktoken: Gpt2Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(wrong=odd_strings()[-1])
    tokenizer = fast_tokenizer("auto", tiktoken)
    assert tokenizer.encoder == tiktoken.encoder
    assert "gigatoken 0.0 does not give the ids of tiktoken" in capsys.readouterr().err
    assert np.array_equal(tokenizer.encode_to_numpy(odd_strings()[-1]), tiktoken.encode_to_numpy(odd_strings()[-1]))


@pytest.mark.parametrize("wish", ["auto", "gigatoken"])
def test_one_wrong_id_in_the_first_documents_brings_tiktoken_back(
    wish: encoders.EncoderName,
    stand_in: Callable[..., object],
    tiktoken: Gpt2Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(wrong="A wrong one.")
    tokenizer = fast_tokenizer(wish, tiktoken)
    for n in range(FIRST_DOCUMENTS - 1):
        check_equal(tokenizer, tiktoken, f"Document {n}.")
    assert (tokenizer.encoder, capsys.readouterr().err) == ("gigatoken 0.0", "")
    check_equal(tokenizer, tiktoken, "A wrong one.")
    assert tokenizer.encoder == tiktoken.encoder
    tokenizer.new_part()
    check_equal(tokenizer, tiktoken, "A wrong one.")
    assert capsys.readouterr().err.count("warning") == 1


def test_the_first_documents_of_each_part_are_compared(
    stand_in: Callable[..., object], tiktoken: Gpt2Tokenizer
) -> None:
    stand_in(wrong="A wrong one.")
    tokenizer = fast_tokenizer("auto", tiktoken)
    for n in range(FIRST_DOCUMENTS):
        tokenizer.encode_to_numpy(f"Document {n}.")
    assert not np.array_equal(tokenizer.encode_to_numpy("A wrong one."), tiktoken.encode_to_numpy("A wrong one."))
    tokenizer.new_part()
    for n in range(PART_DOCUMENTS - 1):
        tokenizer.encode_to_numpy(f"Document {n}.")
    check_equal(tokenizer, tiktoken, "A wrong one.")


def test_gigatoken_begins_anew_before_its_memory_grows(
    stand_in: Callable[..., types.SimpleNamespace], tiktoken: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in()
    monkeypatch.setattr(encoders, "CACHE_TOKENS", 1000)
    tokenizer = ProvenTokenizer(tiktoken)
    for _ in range(FIRST_DOCUMENTS + 100):
        check_equal(tokenizer, tiktoken, "word " * 100)
    assert module.loads == 1 + 100 // 10


def test_without_gigatoken_auto_is_tiktoken_and_a_wish_is_refused(
    tiktoken: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert fast_tokenizer("auto", tiktoken) is tiktoken
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r'pip install "regpt2\[fast\]"'):
        fast_tokenizer("gigatoken", tiktoken)


def test_a_gigatoken_that_has_changed_does_not_stop_the_work(
    tiktoken: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", types.SimpleNamespace())
    assert fast_tokenizer("auto", tiktoken) is tiktoken
    assert "gigatoken cannot be used (AttributeError" in capsys.readouterr().err


def test_other_wishes_give_the_tokenizer_itself(tiktoken: Gpt2Tokenizer) -> None:
    assert fast_tokenizer("tiktoken", tiktoken) is tiktoken
    by_bytes = BytesTokenizer()
    assert fast_tokenizer("auto", by_bytes) is by_bytes
    assert by_bytes.encoder == "regpt2"
    with pytest.raises(UsageError, match="not for bytes"):
        fast_tokenizer("gigatoken", by_bytes)
