"""The tokenizer's files in a Hugging Face folder. In: the folder; out: GPT-2's vocabulary, proven, and its files.

Ids mean nothing without the tokenizer that a model was trained with, and 50,257 rows do not prove that it is GPT-2's.
So every file that is there must describe GPT-2's: model, ids, merges, no normalizer, its split, no space in front.
`tokenizer.json` must also give known ids for known sentences, where the package `tokenizers` is installed.
"""

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regpt2.base.errors import Problem
from regpt2.base.files import SMALL_BYTES, read_small, sha256_bytes, sha256_file, write_atomic
from regpt2.model.files.contract import CONFIG, GPT2_TOKENS, TokenizerRef, Vocabulary
from regpt2.model.files.safe_json import write_json
from regpt2.model.files.vocabulary import (
    END_OF_TEXT,
    GPT2_SHA256,
    added_texts,
    gpt2_tokenizer,
    is_gpt2_order,
    merges_of,
    token_texts,
)

FAST, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
IDS, MERGES = "vocab.json", "merges.txt"
FILES = (FAST, IDS, MERGES, SETTINGS)  # that `write_tokenizer` writes
END_OF_TEXT_ID = GPT2_TOKENS - 1

_OTHERS = {"vocab.txt": "wordpiece", "*.model": "sentencepiece", "*.spm": "sentencepiece", "*.tiktoken": "tiktoken"}
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_CHANGED_TEXT = ("add_prefix_space", "do_lower_case")
_CHANGED_MERGING = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_CHANGED_SPLIT = ("lstrip", "rstrip", "single_word")
_SPLIT = (("type", None), ("add_prefix_space", True), ("use_regex", True))  # with the default of each
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

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
        self.file, self.kind = file, kind


def read_tokenizer(folder: Path, rows: int) -> TokenizerRef | None:
    """Which tokenizer lies beside the weights of a model with `rows` tokens; None if there is none.

    GPT-2's has its merges, if a file holds them, and the texts of added rows; any other has an objection.
    """
    try:
        return _gpt2(folder, rows)
    except _Another as other:
        file = other.file
        readable = file.is_file() and file.stat().st_size <= SMALL_BYTES
        fingerprint = sha256_file(file) if readable else sha256_bytes(str(other).encode("utf-8", "replace"))
        return TokenizerRef(other.kind, fingerprint, objection=str(other))


def write_tokenizer(folder: Path, vocabulary: Vocabulary, block_size: int) -> None:
    """Write the files from which transformers, in any version, and the package tokenizers make GPT-2's tokenizer."""
    ids = {token: n for n, token in enumerate(token_texts(vocabulary) or ())}
    added = {n: text for n, text in enumerate(vocabulary.added, start=GPT2_TOKENS) if text is not None}
    if list(added) != list(range(GPT2_TOKENS, GPT2_TOKENS + len(added))):  # readers count added tokens up from the last
        ids |= {text: n for n, text in added.items()}
    special = {n: _special(text) for n, text in ({END_OF_TEXT_ID: END_OF_TEXT} | added).items()}
    write_atomic(folder / MERGES, vocabulary.merges or b"")
    write_atomic(folder / IDS, json.dumps(ids))
    write_json(folder / FAST, _fast(ids, merges_of(vocabulary), special))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        **dict.fromkeys(("add_prefix_space", "clean_up_tokenization_spaces"), False),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "added_tokens_decoder": {str(n): flags for n, flags in special.items()},
    }
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    write_json(folder / SETTINGS, settings)


def _special(text: str) -> dict[str, Any]:
    return {"content": text, **dict.fromkeys((*_CHANGED_SPLIT, "normalized"), False), "special": True}


def _fast(ids: Mapping[str, int], merges: list[str], special: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token")),
        **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
        **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
        "vocab": ids,
        "merges": merges,
    }
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [{"id": n, **flags} for n, flags in special.items()],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": _BYTE_LEVEL | {"trim_offsets": False},
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def _gpt2(folder: Path, rows: int) -> Vocabulary | None:
    """GPT-2's tokenizer, proven by each file that is there; raises `_Another` where one is damaged or not GPT-2's."""
    settings, added = _TokenizerConfig(folder), _Added(rows)
    settings.check()
    added.take(folder / ADDED, ((n, text) for text, n in _object(folder / ADDED).items()))
    added.take(folder / SETTINGS, settings.added())
    vocabularies: list[Vocabulary] = []
    if (folder / MERGES).exists():
        vocabularies.append(_by_merges(folder / MERGES, _read(folder / MERGES).split("\n")))
    if (folder / IDS).exists():
        vocabularies.append(_by_ids(folder / IDS, _object(folder / IDS), added))
    if (folder / FAST).exists():
        vocabularies.append(_by_description(folder / FAST, _object(folder / FAST), added))
        _check_known_sentences(folder / FAST, _read(folder / FAST))
    if not vocabularies:
        _refuse_others(folder)
        return None
    merges = next((found.merges for found in vocabularies if found.merges), None)
    return Vocabulary("gpt2", GPT2_SHA256, merges=merges, added=added_texts(added.texts, rows))


class _Added:
    """The texts of rows beyond GPT-2's, as any of the files gives them."""

    def __init__(self, rows: int) -> None:
        self.rows, self.texts = rows, {END_OF_TEXT_ID: END_OF_TEXT}

    def take(self, file: Path, texts: Iterable[tuple[Any, Any]]) -> None:
        """Add ids with texts from `file`. A token without a row in the model is ignored."""
        for n, text in texts:
            if type(n) is not int or not isinstance(text, str):
                raise _Another(file, f"has a token {text!r:.80} with the id {n!r:.40}")
            if n < END_OF_TEXT_ID or (n < self.rows and self.texts.get(n, text) != text):
                before = f", which is {self.texts[n]!r:.80} elsewhere" if n in self.texts else ""
                raise _Another(file, f"makes {text!r:.80} a token with the id {n}{before}")
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
    if not isinstance(token, dict) or "content" not in token:
        raise _Another(file, f"has an added token {token!r:.80}")
    if flags := [flag for flag in _CHANGED_SPLIT if token.get(flag)]:
        raise _Another(file, f"has {flags[0]} = true for the token {token.get('content')!r:.80}, expected false")
    return token["content"]


def _by_merges(file: Path, lines: Sequence[Any]) -> Vocabulary:
    merges = [str(line) for line in lines if line and not str(line).startswith("#version")]
    if (vocabulary := gpt2_tokenizer(merges)) is None:
        raise _Another(file, f"has {len(merges):,} merges that are not GPT-2's 50,000 in their order")
    return vocabulary


def _by_ids(file: Path, ids: Mapping[str, Any], added: _Added) -> Vocabulary:
    """Compare a vocabulary's ids with GPT-2's; those beyond are added tokens."""
    base = dict(sorted((n, text) for text, n in ids.items() if type(n) is int and n < GPT2_TOKENS))
    base.setdefault(END_OF_TEXT_ID, END_OF_TEXT)  # it may be among the added tokens alone
    if len(base) < GPT2_TOKENS:
        raise _Another(file, f"has {len(base):,} tokens, expected GPT-2's {GPT2_TOKENS:,}")
    if not is_gpt2_order(list(base.values())):
        raise _Another(file, "gives other ids to tokens than GPT-2 does, or has other tokens")
    added.take(file, ((n, text) for text, n in ids.items() if type(n) is not int or n >= GPT2_TOKENS))
    return Vocabulary("gpt2", GPT2_SHA256)


def _by_description(file: Path, fast: dict[str, Any], added: _Added) -> Vocabulary:
    """Compare every part of a `tokenizer.json` that changes ids."""
    model = fast.get("model")
    if not isinstance(model, dict):
        raise _Another(file, "has no object 'model'")
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise _Another(file, f"describes a model of type {kind!r:.80}, expected 'BPE'", kind=str(kind)[:80].lower())
    for key in _CHANGED_MERGING:
        if model.get(key):
            raise _Another(file, f"has model.{key} = {model[key]!r:.80}, which GPT-2's has not")
    if fast.get("normalizer"):
        raise _Another(file, f"has the normalizer {_kinds(fast['normalizer'])}, GPT-2's has none")
    split = fast.get("pre_tokenizer")
    if not isinstance(split, dict) or any(_BYTE_LEVEL[key] != split.get(key, default) for key, default in _SPLIT):
        raise _Another(file, f"splits text by {_kinds(split)}, expected ByteLevel without add_prefix_space")
    tokens, ids, merges = fast.get("added_tokens") or [], model.get("vocab"), model.get("merges")
    if not isinstance(tokens, list) or not isinstance(ids, dict) or not isinstance(merges, list):
        raise _Another(file, "has no lists of added tokens, ids and merges")
    texts = [_text_of(file, token) for token in tokens]
    added.take(file, ((token.get("id"), text) for token, text in zip(tokens, texts, strict=True)))
    _by_ids(file, ids, added)
    return _by_merges(file, [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges])


def _kinds(part: Any) -> str:
    """The types within a part of `tokenizer.json`, in short."""
    return ", ".join(re.findall(r'"type": "(\w+)"', json.dumps(part)))[:120] or json.dumps(part)[:120]


def _check_known_sentences(file: Path, text: str) -> None:
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:  # the description was compared, part by part
        return
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        found = [tokenizer.encode(sentence, add_special_tokens=False).ids for sentence, _ in KNOWN]
    except Exception as error:  # the package raises errors of many kinds
        raise _Another(file, f"is refused by the package tokenizers ({str(error).strip()[:200]})") from None
    for (sentence, expected), ids in zip(KNOWN, found, strict=True):
        if ids != expected:
            raise _Another(file, f"encodes {sentence!r} as {ids}, expected {expected}")


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
