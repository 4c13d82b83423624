"""The tokenizer beside weights: GPT-2's is proven and used, any other is named, and what we write others open."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from regpt2.base.byte_level.tokenizer_json import special
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import VOCAB_SHA256, Gpt2Tokenizer, find_vocab
from regpt2.model.files import tokenizer_files
from regpt2.model.files.contract import GPT2_TOKENS, TokenizerRef, Vocabulary
from regpt2.model.files.tokenizer_files import ADDED, FAST, FILES, IDS, KNOWN, MERGES, SETTINGS, read_tokenizer
from regpt2.model.files.vocabulary import GPT2_SHA256, GPT2_TEXTS_SHA256, is_gpt2_order, token_texts

pytestmark = pytest.mark.seconds

VOCAB = find_vocab().read_bytes()
TIKTOKEN = Gpt2Tokenizer(VOCAB)
OURS = Vocabulary("gpt2", VOCAB_SHA256, TIKTOKEN.eot, VOCAB)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that we write, by name."""
    folder = tmp_path_factory.mktemp("ours")
    tokenizer_files.write_tokenizer(folder, OURS, 1024)
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES}


def lay(folder: Path, texts: dict[str, str], *names: str) -> Path:
    for name in names or texts:
        (folder / name).write_text(texts[name], encoding="utf-8")
    return folder


def change(folder: Path, name: str, edit: Callable[[Any], object]) -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def objection(folder: Path, rows: int = GPT2_TOKENS) -> str:
    found = read_tokenizer(folder, rows)
    assert found is not None and found.objection is not None
    assert found.fingerprint != VOCAB_SHA256
    return found.objection


# --- what is written ---


def random_texts(n: int) -> list[str]:
    """Words of several alphabets, and any characters at all."""
    draw, alphabets = random.Random(7), ["abc XYZ'st  ", "0123456789.,- ", "\n\t \r\u00a0\u3000", "àéîõüñç ΑΒγδ Жщъ "]
    alphabets += ["日本語한국어ไทย हिन्दी", "".join(map(chr, (*range(0x20, 0x2FF), *range(0x1F300, 0x1F6FF))))]
    any_at_all = [*range(1, 0xD800), *range(0xE000, 0x11000)]
    words = (["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 9))) for _ in range(4)] for _ in range(n))
    return [" ".join(four) for four in words] + ["".join(map(chr, draw.choices(any_at_all, k=20))) for _ in range(n)]


@pytest.mark.seconds
def test_every_reader_of_our_files_gives_tiktokens_ids(tmp_path: Path, texts: dict[str, str]) -> None:
    lay(tmp_path, texts)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "slow").mkdir()
    lay(tmp_path / "slow", texts, MERGES, IDS, SETTINGS)
    alone = FastTokenizer.from_file(str(tmp_path / FAST))
    auto, slow = AutoTokenizer.from_pretrained(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path / "slow")
    assert len(auto) == len(slow) == alone.get_vocab_size() == GPT2_TOKENS
    sentences = random_texts(1500)
    expected = [TIKTOKEN.encode(sentence) for sentence in sentences]
    assert [encoding.ids for encoding in alone.encode_batch(sentences)] == expected
    assert auto(sentences)["input_ids"] == slow(sentences)["input_ids"] == expected
    assert [alone.decode(ids) for ids in expected] == sentences
    assert alone.encode("a<|endoftext|>b").ids == auto("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]


def test_our_own_files_are_proven(tmp_path: Path, texts: dict[str, str]) -> None:
    found = read_tokenizer(lay(tmp_path, texts), GPT2_TOKENS)
    assert found == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB) and found.objection is None


# --- what is proven ---


def test_the_constants_are_those_of_the_vocabulary() -> None:
    assert GPT2_SHA256 == VOCAB_SHA256
    order = token_texts(OURS)
    assert order is not None and is_gpt2_order(order) and not is_gpt2_order([order[1], order[0], *order[2:]])
    assert len(GPT2_TEXTS_SHA256) == 64


@pytest.mark.parametrize(("sentence", "ids"), KNOWN, ids=ascii)
def test_the_known_ids_are_tiktokens(sentence: str, ids: list[int]) -> None:
    special = {"<|endoftext|>"}
    assert TIKTOKEN._bpe.encode(sentence, allowed_special=special) == ids


@pytest.mark.parametrize(
    "files", [(MERGES,), (MERGES, IDS), (FAST,), (IDS,), (FAST, SETTINGS), (MERGES, IDS, SETTINGS)], ids=str
)
def test_any_of_the_files_proves_it(tmp_path: Path, texts: dict[str, str], files: tuple[str, ...]) -> None:
    found = read_tokenizer(lay(tmp_path, texts, *files), GPT2_TOKENS)
    assert found == Vocabulary("gpt2", VOCAB_SHA256, merges=None if files == (IDS,) else VOCAB)


def added_token(n: int, text: str) -> dict[str, Any]:
    return {"id": n} | special(text)


def old_style(fast: Any) -> None:
    """As the hub's own file for gpt2: no type, no use_regex, `normalized` end of text."""
    del fast["model"]["type"], fast["model"]["byte_fallback"], fast["pre_tokenizer"]["use_regex"]
    fast["added_tokens"][0]["normalized"] = True


def pairs(fast: Any) -> None:
    """As newer versions write merges; and end of text only among the added tokens."""
    fast["model"]["merges"] = [merge.split(" ") for merge in fast["model"]["merges"]]
    del fast["model"]["vocab"]["<|endoftext|>"]


@pytest.mark.parametrize(
    "edit",
    [old_style, pairs, lambda fast: fast["added_tokens"].append(added_token(50257, "[PAD]"))],
)
def test_other_spellings_of_the_same_are_accepted(
    tmp_path: Path, texts: dict[str, str], edit: Callable[[Any], None]
) -> None:
    change(lay(tmp_path, texts, FAST), FAST, edit)
    assert read_tokenizer(tmp_path, GPT2_TOKENS) == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)


def test_line_ends_of_windows_and_another_first_line_change_nothing(tmp_path: Path, texts: dict[str, str]) -> None:
    merges = texts[MERGES].replace("#version: 0.2", "#version: 0.2 - by another").replace("\n", "\r\n")
    (tmp_path / MERGES).write_bytes(merges.encode())
    assert read_tokenizer(tmp_path, GPT2_TOKENS) == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)


def test_what_transformers_saves_is_accepted(tmp_path: Path, texts: dict[str, str]) -> None:
    """It writes a model_max_length of 31 digits."""
    GPT2Tokenizer.from_pretrained(lay(tmp_path, texts, MERGES, IDS)).save_pretrained(tmp_path / "saved")
    assert "0000000000" in (tmp_path / "saved" / SETTINGS).read_text()
    assert read_tokenizer(tmp_path / "saved", GPT2_TOKENS) == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)


def test_no_files_are_no_tokenizer(tmp_path: Path, texts: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "README.md").write_text("hello")
    assert read_tokenizer(lay(tmp_path, texts, SETTINGS), GPT2_TOKENS) is None


# --- what is another's ---


def swap(values: Any, a: Any, b: Any) -> None:
    values[a], values[b] = values[b], values[a]


def split_digits(fast: Any) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    fast["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, fast["pre_tokenizer"]]}


def one_big(fast: Any) -> None:
    fast["added_tokens"].append({"id": 1169, "content": "the", "special": False})


def odd_flag(fast: Any) -> None:
    fast["added_tokens"].append({"id": 50257, "content": "<mask>", "lstrip": True})


def of_type(kind: str) -> Callable[[Any], None]:
    def edit(fast: Any) -> None:
        fast["model"]["type"] = kind

    return edit


CHANGED: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "unigram": (FAST, of_type("Unigram"), "describes a model of type 'Unigram', expected 'BPE'"),
    "wordpiece": (FAST, of_type("WordPiece"), "describes a model of type 'WordPiece', expected 'BPE'"),
    "lower case": (FAST, lambda f: f.update(normalizer={"type": "Lowercase"}), "has the normalizer Lowercase"),
    "composed": (FAST, lambda f: f.update(normalizer={"type": "NFC"}), "has the normalizer NFC, GPT-2's has none"),
    "digits": (FAST, split_digits, "splits text by Sequence, Digits, ByteLevel, expected ByteLevel"),
    "no split": (FAST, lambda f: f["pre_tokenizer"].update(use_regex=False), "splits text by ByteLevel, expected"),
    "a space in front": (FAST, lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "without add_prefix_space"),
    "no pre-tokenizer": (FAST, lambda f: f.update(pre_tokenizer=None), "splits text by null, expected ByteLevel"),
    "merges": (FAST, lambda f: swap(f["model"]["merges"], 100, 200), "has 50,000 merges that are not GPT-2's"),
    "ids": (FAST, lambda f: swap(f["model"]["vocab"], "The", "the"), "gives other ids to tokens than GPT-2 does"),
    "a gap": (FAST, lambda f: f["model"]["vocab"].pop("the"), "has 50,256 tokens, expected GPT-2's 50,257"),
    "dropout": (FAST, lambda f: f["model"].update(dropout=0.1), "has model.dropout = 0.1"),
    "whole words": (FAST, lambda f: f["model"].update(ignore_merges=True), "has model.ignore_merges = True"),
    "ends": (FAST, lambda f: f["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix = '</w>'"),
    "a word as a whole": (FAST, one_big, "makes 'the' a token with the id 1169"),
    "another end": (FAST, lambda f: f["added_tokens"][0].update(content="</s>"), "which is '<|endoftext|>' elsewhere"),
    "a token that strips": (FAST, odd_flag, "has lstrip = true for the token '<mask>', expected false"),
    "no model": (FAST, lambda f: f.pop("model"), "has no object 'model'"),
    "ids in vocab.json": (IDS, lambda ids: swap(ids, "The", "the"), "vocab.json gives other ids to tokens"),
    "too few in vocab.json": (IDS, lambda ids: ids.pop("the"), "has 50,256 tokens, expected GPT-2's 50,257"),
    "an id that is none": (IDS, lambda ids: ids.update(the=True), "has 50,256 tokens"),
    "settings": (SETTINGS, lambda s: s.update(add_prefix_space=True), "has add_prefix_space = True, expected false"),
    "lowered": (SETTINGS, lambda s: s.update(do_lower_case=True), "has do_lower_case = True, expected false"),
    "class": (SETTINGS, lambda s: s.update(tokenizer_class="T5Tokenizer"), "tokenizer_class = 'T5Tokenizer', expected"),
    "odd class": (SETTINGS, lambda s: s.update(tokenizer_class=["a"]), "tokenizer_class = ['a'], expected"),
    "odd tokens": (
        SETTINGS,
        lambda s: s.update(added_tokens_decoder=["a"]),
        "has no object of ids in added_tokens_dec",
    ),
    "odd token": (SETTINGS, lambda s: s.update(added_tokens_decoder={"50257": "a"}), "has an added token 'a'"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_each_difference_is_seen_in_the_description(tmp_path: Path, texts: dict[str, str], what: str) -> None:
    name, edit, message = CHANGED[what]
    change(lay(tmp_path, texts, name), name, edit)
    found = objection(tmp_path)
    assert found.startswith(f"The tokenizer beside the weights is not GPT-2's: {name} ") and message in found


def test_without_the_package_the_description_alone_is_proof(
    tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    found = read_tokenizer(lay(tmp_path, texts, FAST), GPT2_TOKENS)
    assert found == Vocabulary("gpt2", VOCAB_SHA256, merges=VOCAB)


@pytest.mark.parametrize("what", ["lower case", "composed", "digits", "no split", "a space in front", "merges", "ids"])
def test_the_known_sentences_alone_see_it(
    tmp_path: Path, texts: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the description not compared at all."""
    monkeypatch.setattr(tokenizer_files, "_by_description", lambda *_: OURS)
    name, edit, _ = CHANGED[what]
    if what in ("merges", "ids"):  # rare ones would not show in a few sentences, these do
        edit = lambda f: swap(f["model"]["vocab"], "Hello", "the")  # noqa: E731
    change(lay(tmp_path, texts, FAST), name, edit)
    found = objection(tmp_path)
    assert "tokenizer.json encodes " in found and "], expected [" in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[UNK]\nthe\n", "vocab.txt is a vocabulary of wordpiece"),
        ("spiece.model", "\n\x0fxx", "spiece.model is a vocabulary of sentencepiece"),
        ("config.json", '{"tokenizer_class": "BertTokenizer"}', "config.json has tokenizer_class = 'BertTokenizer'"),
        (MERGES, "#version: 0.2\na b\nab c\n", "merges.txt has 2 merges that are not GPT-2's 50,000 in their order"),
        (FAST, "{", "tokenizer.json is damaged (Expecting property name"),
        (FAST, "[" * 100_000, "tokenizer.json is damaged (maximum recursion depth"),
        (FAST, "[]", "tokenizer.json holds a JSON list, expected an object"),
        (FAST, '{"model": {"merges": 3}}', "tokenizer.json splits text by null"),
        (IDS, '{"a": {"b": 1}}', "vocab.json has 1 tokens, expected"),
        (SETTINGS, "{'a': 1}", "tokenizer_config.json is damaged"),
        (ADDED, '{"[PAD]": "x"}', "added_tokens.json has a token '[PAD]' with the id 'x'"),
    ],
    ids=str,
)
def test_what_lies_beside_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert message in objection(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / MERGES).write_bytes(b"\xff\xfe\xfa")
    assert "merges.txt cannot be read (" in objection(tmp_path)
    (tmp_path / MERGES).unlink()
    (tmp_path / FAST).mkdir()
    assert "tokenizer.json cannot be read (" in objection(tmp_path)


# --- rows beyond GPT-2's ---

ADDED_BY = {
    ADDED: {"[PAD]": 50257, "<|user|>": 50258},
    SETTINGS: {"added_tokens_decoder": {"50257": {"content": "[PAD]"}, "50258": {"content": "<|user|>"}}},
}


@pytest.mark.parametrize("rows", [50257, 50258, 50259, 50304])
@pytest.mark.parametrize("by", [ADDED, SETTINGS, FAST, IDS])
def test_texts_of_added_rows_are_found_in_any_file(tmp_path: Path, texts: dict[str, str], by: str, rows: int) -> None:
    lay(tmp_path, texts, *({MERGES, by} & texts.keys() - {SETTINGS}))
    if by in ADDED_BY:
        (tmp_path / by).write_text(json.dumps(ADDED_BY[by]))
    elif by == IDS:
        change(tmp_path, IDS, lambda ids: ids.update(ADDED_BY[ADDED]))
    else:
        more = [added_token(50257, "[PAD]"), added_token(50258, "<|user|>")]
        change(tmp_path, FAST, lambda fast: fast["added_tokens"].extend(more))
    found = read_tokenizer(tmp_path, rows)
    assert found is not None and found.objection is None
    assert found.added == ("[PAD]", "<|user|>", *[None] * 45)[: rows - 50257]


def test_files_that_disagree_on_an_added_token_are_refused(tmp_path: Path, texts: dict[str, str]) -> None:
    lay(tmp_path, texts, MERGES, IDS)
    (tmp_path / ADDED).write_text('{"[PAD]": 50257}')
    (tmp_path / SETTINGS).write_text('{"added_tokens_decoder": {"50257": {"content": "<pad>"}}}')
    assert "makes '<pad>' a token with the id 50257, which is '[PAD]' elsewhere" in objection(tmp_path, 50258)


@pytest.mark.parametrize("added", [("[PAD]", "<|user|>"), ("[PAD]", None, "<a b>", None), (None,) * 47], ids=str)
def test_added_tokens_are_those_of_transformers_there_and_back(tmp_path: Path, added: tuple[str | None, ...]) -> None:
    vocabulary = Vocabulary("gpt2", VOCAB_SHA256, TIKTOKEN.eot, VOCAB, added=added)
    tokenizer_files.write_tokenizer(tmp_path, vocabulary, 64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs, alone = AutoTokenizer.from_pretrained(tmp_path), FastTokenizer.from_file(str(tmp_path / FAST))
    ours = AddedTokens(TIKTOKEN, added)
    for text in ("<|user|>hi [PAD][PAD] <a b>there", "plain", "<|user|", "[PAD] "):
        assert theirs(text)["input_ids"] == alone.encode(text).ids == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    named = [n for n, text in enumerate(added, start=GPT2_TOKENS) if text]
    assert [theirs.convert_ids_to_tokens(n) for n in named] == [ours.decode([n]) for n in named]
    found = read_tokenizer(tmp_path, GPT2_TOKENS + len(added))
    assert isinstance(found, TokenizerRef) and found.added == added and found.objection is None
