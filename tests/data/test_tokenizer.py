"""The tokenizers against a slow byte-pair encoding written from its definition, and against `transformers`."""

import importlib.metadata
import json
import random
import time
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from regpt2.base.errors import DataError, DownloadError, UsageError
from regpt2.data import tokenizer as tokenizer_module
from regpt2.data.tokenizer import VOCAB_SHA256, StreamDecoder, Tokenizer, find_vocab, load_tokenizer

SHARED_BPE = Path(__file__).parents[2].parent / "shared" / "data" / "gpt2_bpe"
ORIGINAL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Text with what the pattern treats specially: contractions, runs of white space of all kinds, digits, other scripts.
TRICKY = (
    *("'s", "'ll", "'", " ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "\u200b", "a", "Zebra", "é"),
    *("中文", "7", "2024", "²", "!", "<|endoftext|>", "👩\u200d👩\u200d👧", "\ufeff", "\x00", "ſ", "ǅ"),
)
tricky = st.lists(st.sampled_from(TRICKY), max_size=40).map("".join)
texts = st.one_of(st.text(max_size=60), tricky)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.param)


@lru_cache
def merge_order() -> dict[tuple[str, str], int]:
    lines = find_vocab().read_text(encoding="utf-8").split("\n")[1:-1]
    return {(a, b): rank for rank, (a, b) in enumerate(line.split(" ") for line in lines)}


def slow_bpe(text: str) -> list[str]:
    """GPT-2's encoding from its definition: split by its pattern, merge by the table until nothing merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    character = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    order, tokens = merge_order(), []
    for word in regex.findall(ORIGINAL_PATTERN, text):
        parts = [character[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = [order.get(pair, len(order)) for pair in pairwise(parts)]
            if min(pairs) == len(order):
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        tokens += parts
    return tokens


@lru_cache
def slow_index() -> dict[str, int]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    first = [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    return {token: n for n, token in enumerate([*first, *("".join(pair) for pair in merge_order())])}


def repaired(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@settings(max_examples=300, deadline=None)
@given(texts)
def test_gpt2_ids_equal_the_slow_encoding_from_the_definition(text: str) -> None:
    gpt2 = _gpt2_once()
    text = repaired(text)
    assert gpt2.encode(text) == [slow_index()[token] for token in slow_bpe(text)]


@lru_cache
def _gpt2_once() -> Tokenizer:
    return load_tokenizer("gpt2")


def test_pattern_splits_as_the_one_that_tiktoken_ships(gpt2: Tokenizer) -> None:
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=r50k_pat_str,
        mergeable_ranks={piece: n for n, piece in enumerate(gpt2.id_bytes[: gpt2.eot])},
        special_tokens={},
    )
    rng = random.Random(0)
    spaces = ("\t", "\n", "\n", " ", " ", "\x85", "\xa0", "\u2003", "\u3000")
    for _ in range(10_000):
        text = "".join(rng.choice(spaces if rng.random() < 0.4 else TRICKY) for _ in range(12))
        assert gpt2.encode(text) == theirs.encode_ordinary(text)


def test_known_ids_of_the_lecture(gpt2: Tokenizer) -> None:
    # build-nanogpt's prompt, printed in the lecture
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.eot, gpt2.fingerprint) == (50257, 50256, VOCAB_SHA256)


def test_ids_equal_those_of_transformers(gpt2: Tokenizer) -> None:
    if not SHARED_BPE.exists():
        pytest.skip(f"{SHARED_BPE} is absent")
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    bpe = models.BPE.from_file(str(SHARED_BPE / "encoder.json"), str(SHARED_BPE / "vocab.bpe"))
    theirs = HuggingFaceTokenizer(bpe)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    text = Path(__file__).read_text(encoding="utf-8") + "  \n\n\tÀ 中文 👍🏽 it's 1234\u00a0\u3000x"
    assert gpt2.encode(text) == theirs.encode(text).ids
    table = json.loads((SHARED_BPE / "encoder.json").read_text(encoding="utf-8"))
    assert {token: n for token, n in table.items() if n != gpt2.eot} == slow_index()


@settings(max_examples=300, deadline=None)
@given(text=tricky)
def test_end_of_text_within_a_text_is_the_token_that_transformers_makes_of_it(
    gpt2: Tokenizer, theirs_with_end_of_text: Any, text: str
) -> None:
    ids = gpt2.encode_with_end_of_text(text)
    assert ids == theirs_with_end_of_text.encode(text, add_special_tokens=False)
    assert ids.count(gpt2.eot) == text.count("<|endoftext|>") and gpt2.eot not in gpt2.encode(text)


@pytest.fixture(scope="module")
def theirs_with_end_of_text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' GPT-2 tokenizer, from the vocabulary and the merges as OpenAI numbered them."""
    from transformers import GPT2Tokenizer

    folder = tmp_path_factory.mktemp("theirs")
    (folder / "vocab.json").write_text(json.dumps(slow_index() | {"<|endoftext|>": 50256}), encoding="utf-8")
    (folder / "merges.txt").write_bytes(find_vocab().read_bytes())
    return GPT2Tokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(texts, st.sampled_from(["gpt2", "bytes"]))
def test_decode_gives_the_text_back(text: str, name: str) -> None:
    tokenizer = _gpt2_once() if name == "gpt2" else load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == repaired(text)
    assert sum(tokenizer.token_bytes()[ids]) == len(repaired(text).encode())
    assert tokenizer.encode_to_numpy(text).dtype == np.uint16


def test_ids_of_utf8_are_those_of_the_text(either: Tokenizer) -> None:
    for text in ("", "It's", "naïve 中文 👍🏽\n\n x"):
        assert np.array_equal(either.encode_utf8(text.encode()), either.encode_to_numpy(text))


def test_end_of_text_in_a_document_stays_text(either: Tokenizer) -> None:
    ids = either.encode("a<|endoftext|>b")
    assert either.eot not in ids
    assert either.decode(ids) == "a<|endoftext|>b"
    assert either.decode([either.eot]) == "<|endoftext|>"
    assert either.token_bytes()[either.eot] == 0


def test_half_surrogate_pairs_become_replacement_characters(either: Tokenizer) -> None:
    assert either.decode(either.encode("a\ud800b\udc00c")) == "a\ufffdb\ufffdc"


def test_ids_outside_the_vocabulary_are_refused(either: Tokenizer) -> None:
    for wrong in (-1, either.vocab_size):
        with pytest.raises(DataError, match="outside the"):
            either.decode([wrong])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from(list("é中👍".encode()))), max_size=40))
def test_stream_decoder_equals_decoding_at_once(ids: list[int]) -> None:
    tokenizer = load_tokenizer("bytes")
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.feed(token) for token in ids), stream.end()]) == tokenizer.decode(ids)


def test_stream_decoder_never_shows_a_part_of_a_character(gpt2: Tokenizer) -> None:
    text = "naïve 中文字 👩\u200d👩\u200d👧 🇺🇳 ok"
    stream = StreamDecoder(gpt2)
    pieces = [stream.feed(token) for token in gpt2.encode(text)]
    assert "".join(pieces) == text
    assert stream.end() == ""
    assert "" in pieces, "some ids end within a character"
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_encoding_in_pieces_equals_encoding_at_once(text: str) -> None:
    gpt2 = _gpt2_once()
    whole = gpt2.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        assert gpt2.encode(text) == whole


@pytest.mark.seconds
@pytest.mark.parametrize("unit", ["a", " ", "\n", "\xa0", "中", "7", " \t", "=", "a1", "\x00"])
def test_a_megabyte_without_a_word_boundary_is_encoded_in_bounded_time(gpt2: Tokenizer, unit: str) -> None:
    text = "x " + unit * (1_000_000 // len(unit)) + "end"
    started_at = time.monotonic()
    assert gpt2.decode_bytes(gpt2.encode_to_numpy(text).tolist()) == text.encode()
    assert time.monotonic() - started_at < 20  # takes below one second; quadratic time would take hours


def test_unknown_tokenizer_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'gpt2'"):
        load_tokenizer("gtp2")


def test_a_wrong_vocabulary_is_refused_with_both_hashes(tmp_path: Path) -> None:
    wrong = tmp_path / "vocab.bpe"
    wrong.write_bytes(find_vocab().read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"SHA-256 is [0-9a-f]{{64}}, expected {VOCAB_SHA256}"):
        load_tokenizer("gpt2", wrong)
    with pytest.raises(DataError, match="no such vocabulary"):
        load_tokenizer("gpt2", tmp_path / "absent.bpe")


def test_vocabulary_is_looked_for_in_the_stated_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = find_vocab().read_bytes()
    packaged, cached = tmp_path / "package" / "vocab.bpe", tmp_path / "cache" / "gpt2" / "vocab.bpe"
    for path in (packaged, cached):
        path.parent.mkdir(parents=True)
        path.write_bytes(right)
    monkeypatch.setenv("REGPT2_CACHE", str(tmp_path / "cache"))
    file = importlib.metadata.PackagePath("package/vocab.bpe")
    file.dist = importlib.metadata.PathDistribution(tmp_path / "x.dist-info")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [file])
    monkeypatch.setattr(tokenizer_module, "VOCAB_URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    own = tmp_path / "own.bpe"
    own.write_bytes(right)
    assert find_vocab(own) == own
    assert find_vocab() == packaged
    packaged.write_bytes(b"wrong")
    assert find_vocab() == cached
    assert "looking elsewhere" in capsys.readouterr().err
    packaged.unlink()
    assert find_vocab() == cached
    cached.unlink()
    with pytest.raises(DownloadError, match="check the network"):
        find_vocab()
