"""The tokenizer's files in a Hugging Face folder. In: the folder; out: its vocabulary, proven, and its files.

Ids mean nothing without the tokenizer that a model was trained with, and 50,257 rows do not prove that it is GPT-2's.
So every file that is there must describe GPT-2's: model, ids, merges, no normalizer, its split, no space in front.
`tokenizer.json` must also give known ids for known sentences, where the package `tokenizers` is installed.
Another vocabulary is accepted if all but its merges are GPT-2's, the layout of ids included; and bytes without merges.
"""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regpt2.base.byte_level.merges import END_OF_TEXT, vocab_bytes
from regpt2.base.byte_level.tokenizer_json import Described, Fault, described, description, special, text_of
from regpt2.base.errors import Problem
from regpt2.base.files import SMALL_BYTES, read_small, sha256_bytes, sha256_file, write_atomic
from regpt2.model.files.contract import CONFIG, GPT2_TOKENS, TokenizerRef, Vocabulary
from regpt2.model.files.safe_json import write_json
from regpt2.model.files.vocabulary import (
    GPT2_SHA256,
    added_texts,
    gpt2_tokenizer,
    is_gpt2_order,
    merges_of,
    other_vocabulary,
    token_texts,
)

FAST, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
IDS, MERGES = "vocab.json", "merges.txt"
FILES = (FAST, IDS, MERGES, SETTINGS)  # that `write_tokenizer` writes
END_OF_TEXT_ID = GPT2_TOKENS - 1

_OTHERS = {"vocab.txt": "wordpiece", "*.model": "sentencepiece", "*.spm": "sentencepiece", "*.tiktoken": "tiktoken"}
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_CHANGED_TEXT = ("add_prefix_space", "do_lower_case")

# GPT-2's ids, by tiktoken: contractions, capitals, digits, runs of white space, accents in both forms, signs that a
# normalizer would replace, scripts, an emoji of three characters, the end of text.
KNOWN: tuple[tuple[str, list[int]], ...] = (
    ("Hello, I'm a language model", [15496, 11, 314, 1101, 257, 3303, 2746]),
    ("it.\n\nThe", [270, 13, 198, 198, 464]),  # the only one that shows whether text is split at all
    ("  two spaces, then\n\n\ta tab \n", [220, 734, 9029, 11, 788, 628, 197, 64, 7400, 220, 198]),
    (
        "THEY'LL pay $3,14159265 (2024)",
        [10970, 56, 6, 3069, 1414, 720, 18, 11, 1415, 19707, 22980, 357, 1238, 1731, 8],
    ),
    ("it's we'd I'LL _x=y--; don't!!", [270, 338, 356, 1549, 314, 6, 3069, 4808, 87, 28, 88, 438, 26, 836, 470, 3228]),
    (
        "na\u00efve nai\u0308ve \ufb01 \u00bd \u212b",
        [2616, 38776, 299, 1872, 136, 230, 303, 27332, 105, 223, 25208, 2343, 226, 104],
    ),
    ("日本語 🙂👩\u200d👧", [33768, 98, 17312, 105, 45739, 252, 32485, 41840, 102, 447, 235, 41840, 100]),
    ("Привет", [140, 253, 21169, 18849, 38857, 16843, 20375]),
    ("\u00a0\u2003\u3000\u200b x", [1849, 447, 225, 5099, 222, 9525, 2124]),
    (f"a{END_OF_TEXT}b", [64, END_OF_TEXT_ID, 65]),
)


class _Another(Exception):
    """The files describe a tokenizer that is not GPT-2's."""

    def __init__(self, file: Path, why: str, kind: str = "bpe") -> None:
        super().__init__(f"The tokenizer beside the weights is not GPT-2's: {file.name} {why}.")
        self.file, self.why, self.kind = file, why, kind


class _OtherVocabulary(_Another):
    """It differs from GPT-2's in its tokens or merges alone."""


def read_tokenizer(folder: Path, rows: int) -> TokenizerRef | None:
    """Which tokenizer lies beside the weights of a model with `rows` tokens; None if there is none.

    GPT-2's and one's own have their merges, if a file holds them, and the texts of added rows; so have bytes, without
    merges. Any other has an objection.
    """
    try:
        try:
            return _gpt2(folder, rows)
        except _OtherVocabulary as other:
            return _other_vocabulary(folder, rows, other)
    except _Another as other:
        file = other.file
        readable = file.is_file() and file.stat().st_size <= SMALL_BYTES
        fingerprint = sha256_file(file) if readable else sha256_bytes(str(other).encode("utf-8", "replace"))
        return TokenizerRef(other.kind, fingerprint, objection=str(other))


def write_tokenizer(folder: Path, vocabulary: Vocabulary, block_size: int) -> None:
    """Write the files from which transformers, in any version, and the package tokenizers make the same tokenizer.

    Its texts must be known: it is GPT-2's, bytes, or one's own.
    """
    texts = token_texts(vocabulary)
    assert texts is not None, f"{vocabulary.name} has no tokens that these files can hold"
    ids, start = {token: n for n, token in enumerate(texts)}, len(texts)
    added = {n: text for n, text in enumerate(vocabulary.added, start=start) if text is not None}
    if list(added) != list(range(start, start + len(added))):  # readers count added tokens up from the last
        ids |= {text: n for n, text in added.items()}
    specials = {n: special(text) for n, text in ({start - 1: END_OF_TEXT} | added).items()}
    write_atomic(folder / MERGES, vocabulary.merges or vocab_bytes(()))
    write_atomic(folder / IDS, json.dumps(ids))
    write_json(folder / FAST, description(ids, merges_of(vocabulary), specials))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        **dict.fromkeys(("add_prefix_space", "clean_up_tokenization_spaces"), False),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "added_tokens_decoder": {str(n): flags for n, flags in specials.items()},
    }
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    write_json(folder / SETTINGS, settings)


def _gpt2(folder: Path, rows: int) -> Vocabulary | None:
    """GPT-2's tokenizer, proven by each file that is there; raises `_Another` where one is damaged or not GPT-2's."""
    added = _Added(rows, END_OF_TEXT_ID)
    added.take_beside(folder)
    vocabularies: list[Vocabulary] = []
    if (folder / MERGES).exists():
        vocabularies.append(_by_merges(folder / MERGES, _read(folder / MERGES).split("\n")))
    if (folder / IDS).exists():
        vocabularies.append(_by_ids(folder / IDS, _object(folder / IDS), added))
    if (folder / FAST).exists():
        vocabularies.append(_by_description(folder / FAST, _object(folder / FAST), added))
        _check_sentences(folder / FAST, KNOWN)
    if not vocabularies:
        _refuse_others(folder)
        return None
    merges = next((found.merges for found in vocabularies if found.merges), None)
    return Vocabulary("gpt2", GPT2_SHA256, merges=merges, added=added_texts(added.texts, rows))


def _other_vocabulary(folder: Path, rows: int, first: _OtherVocabulary) -> Vocabulary:
    """Bytes or a byte-pair encoding of one's own, proven by each file; `first` is what it differs from GPT-2's in."""
    files = [folder / name for name in (FAST, IDS) if (folder / name).exists()]
    lists = [_described(folder / FAST).merges] if (folder / FAST).exists() else []
    lists += [_merges_in(_read(folder / MERGES).split("\n"))] if (folder / MERGES).exists() else []
    if not files or not lists or gpt2_tokenizer(lists[0]) is not None:
        raise first
    if lists[0] != lists[-1]:
        raise _Another(folder / MERGES, f"has {len(lists[-1]):,} merges that are not those of {FAST}")
    found, added = None, None
    for file in files:
        ids = _object(file) if file.name == IDS else _described(file).ids
        found = other_vocabulary(ids, lists[0])
        if isinstance(found, str):
            raise _Another(first.file, f"{first.why}. As another vocabulary it cannot be used: {file.name} {found}")
        end = found.eot or 0
        if added is None:
            added = _Added(rows, end)
            added.take_beside(folder)
        added.take(file, ((n, text) for text, n in ids.items() if type(n) is not int or n > end))
        added.take(file, _described(file).added if file.name == FAST else ())
    assert isinstance(found, Vocabulary) and added is not None
    if rows <= added.end:
        raise _Another(files[0], f"has {added.end + 1:,} tokens, the model has {rows:,}")
    if (folder / FAST).exists():
        _check_sentences(folder / FAST, _encoded_by_ours(found))
    return replace(found, added=added_texts(added.texts, rows, added.end + 1))


class _Added:
    """The texts of rows beyond the vocabulary's, as any of the files gives them; `end` is its end of text."""

    def __init__(self, rows: int, end: int) -> None:
        self.rows, self.end, self.texts = rows, end, {end: END_OF_TEXT}

    def take_beside(self, folder: Path) -> None:
        """Check the settings of the tokenizer, and add what they and the oldest file hold."""
        settings = _TokenizerConfig(folder)
        settings.check()
        self.take(folder / ADDED, ((n, text) for text, n in _object(folder / ADDED).items()))
        self.take(folder / SETTINGS, settings.added())

    def take(self, file: Path, texts: Iterable[tuple[Any, Any]]) -> None:
        """Add ids with texts from `file`. A token without a row in the model is ignored."""
        for n, text in texts:
            if type(n) is not int or not isinstance(text, str):
                raise _Another(file, f"has a token {text!r:.80} with the id {n!r:.40}")
            if n < self.end or (n < self.rows and self.texts.get(n, text) != text):
                before = f", which is {self.texts[n]!r:.80} elsewhere" if n in self.texts else ""
                raise _OtherVocabulary(file, f"makes {text!r:.80} a token with the id {n}{before}")
            if n < self.rows:
                self.texts[n] = text


class _TokenizerConfig:
    """The content of `tokenizer_config.json`, and of `config.json` for what it lacks."""

    def __init__(self, folder: Path) -> None:
        self.file, self.own, self.model = folder / SETTINGS, _object(folder / SETTINGS), _object(folder / CONFIG)

    def check(self) -> None:
        """Refuse another class of tokenizer, and settings that change the text before it is encoded."""
        name = self.own.get("tokenizer_class") or self.model.get("tokenizer_class")
        if name is not None and name not in _CLASSES:
            file = self.file if self.own.get("tokenizer_class") else self.file.with_name(CONFIG)
            raise _Another(file, f"has tokenizer_class = {name!r:.80}, expected 'GPT2Tokenizer'", kind=str(name)[:80])
        for key in _CHANGED_TEXT:
            if self.own.get(key):
                raise _Another(self.file, f"has {key} = {self.own[key]!r:.80}, expected false")

    def added(self) -> list[tuple[Any, Any]]:
        tokens = self.own.get("added_tokens_decoder") or {}
        if not isinstance(tokens, dict) or not all(n.isdecimal() and len(n) < 10 for n in tokens):
            raise _Another(self.file, "has no object of ids in added_tokens_decoder")
        return [(int(n), _text_of(self.file, token)) for n, token in tokens.items()]


def _text_of(file: Path, token: Any) -> Any:
    """The text of an added token, which must not take white space beside it."""
    try:
        return text_of(token)
    except Fault as fault:
        raise _Another(file, str(fault)) from None


def _by_merges(file: Path, lines: Sequence[Any]) -> Vocabulary:
    merges = _merges_in(lines)
    if (vocabulary := gpt2_tokenizer(merges)) is None:
        raise _OtherVocabulary(file, f"has {len(merges):,} merges that are not GPT-2's 50,000 in their order")
    return vocabulary


def _merges_in(lines: Sequence[Any]) -> list[str]:
    return [str(line) for line in lines if line and not str(line).startswith("#version")]


def _by_ids(file: Path, ids: Mapping[str, Any], added: _Added) -> Vocabulary:
    """Compare a vocabulary's ids with GPT-2's; those beyond are added tokens."""
    base = dict(sorted((n, text) for text, n in ids.items() if type(n) is int and n < GPT2_TOKENS))
    base.setdefault(END_OF_TEXT_ID, END_OF_TEXT)  # it may be among the added tokens alone
    if len(base) < GPT2_TOKENS:
        raise _OtherVocabulary(file, f"has {len(base):,} tokens, expected GPT-2's {GPT2_TOKENS:,}")
    if not is_gpt2_order(list(base.values())):
        raise _OtherVocabulary(file, "gives other ids to tokens than GPT-2 does, or has other tokens")
    added.take(file, ((n, text) for text, n in ids.items() if type(n) is not int or n >= GPT2_TOKENS))
    return Vocabulary("gpt2", GPT2_SHA256)


def _by_description(file: Path, fast: dict[str, Any], added: _Added) -> Vocabulary:
    """Compare every part of a `tokenizer.json` that changes ids."""
    found = _described(file, fast)
    _by_ids(file, found.ids, added)
    added.take(file, found.added)
    return _by_merges(file, found.merges)


def _described(file: Path, fast: dict[str, Any] | None = None) -> Described:
    try:
        return described(_object(file) if fast is None else fast)
    except Fault as fault:
        raise _Another(file, str(fault), fault.kind) from None


def _tokenizers() -> Any:
    """The package `tokenizers`; None if it is not installed: then the description, compared part by part, is proof."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        return None


def _check_sentences(file: Path, known: Iterable[tuple[str, list[int]]]) -> None:
    """Does the package `tokenizers`, with this file, give the ids that are known?"""
    if (tokenizers := _tokenizers()) is None:
        return
    try:
        tokenizer = tokenizers.Tokenizer.from_str(_read(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = [(text, tokenizer.encode(text, add_special_tokens=False).ids, expected) for text, expected in known]
    except Exception as error:  # the package raises errors of many kinds
        raise _Another(file, f"is refused by the package tokenizers ({str(error).strip()[:200]})") from None
    for sentence, ids, expected in found:
        if ids != expected:
            raise _Another(file, f"encodes {sentence!r} as {ids}, expected {expected}")


def _encoded_by_ours(vocabulary: Vocabulary) -> list[tuple[str, list[int]]]:
    """The known sentences with the ids by a file of our own with this vocabulary."""
    if (tokenizers := _tokenizers()) is None:
        return []
    ids = {token: n for n, token in enumerate(token_texts(vocabulary) or ())}
    fast = description(ids, merges_of(vocabulary), {len(ids) - 1: special(END_OF_TEXT)})
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(fast))
    return [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text, _ in KNOWN]


def _refuse_others(folder: Path) -> None:
    for pattern, kind in _OTHERS.items():
        for file in sorted(folder.glob(pattern)):
            raise _Another(file, f"is a vocabulary of {kind}", kind=kind)


def _read(file: Path) -> str:
    try:
        return read_small(file, Problem)
    except (Problem, OSError, ValueError) as error:
        raise _Another(file, f"cannot be read ({str(error).rstrip('.')})") from None


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file. Not `read_json`: a model_max_length of 1e30 is common."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise _Another(file, f"is damaged ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise _Another(file, f"holds a JSON {type(value).__name__}, expected an object")
    return value
