"""A tokenizer of one's own, from a file. In: a `tokenizer.json` or a folder with one; out: the bytes of a `vocab.bpe`.

Such a file, as the package `tokenizers` writes it, can describe many kinds of tokenizer. Only a byte-level byte-pair
encoding with GPT-2's splitting and layout of ids is taken: its ids here are the ids there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regpt2.base.byte_level.merges import (
    END_OF_TEXT,
    LAYOUT,
    MOST_FILE_BYTES,
    fault_in,
    fault_of,
    layout_fault,
    merges_in,
    tokens_of,
    vocab_bytes,
)
from regpt2.base.byte_level.tokenizer_json import Described, Fault, described, description, special
from regpt2.base.errors import DataError, UsageError, did_you_mean
from regpt2.base.files import read_small, sha256_bytes
from regpt2.data.tokenizer import OWN_FILE, TOKENIZERS, VOCAB_SHA256

NAME = "tokenizer.json"
_MEND = "`regpt2 tokenizer train` makes one that fits"


def read_own(path: Path) -> bytes:
    """The vocabulary in a `tokenizer.json` or a `vocab.bpe`, or in a folder that holds one of them.

    Raises:
        UsageError: there is no such file.
        DataError: it is damaged, or is not a byte-level byte-pair encoding whose ids are the same here.
    """
    file = _file(path)
    try:
        text = read_small(file, DataError, MOST_FILE_BYTES)
        if file.name == OWN_FILE:
            vocab = text.encode()
            if why := fault_in(vocab):
                raise Fault(f"cannot be used: {why}")
            return vocab
        return _vocabulary(described(_object(text)))
    except Fault as fault:
        raise DataError(f"{file} is no byte-level BPE as GPT-2's: it {fault}; {_MEND}.") from None
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); copy it again.") from None


def tokenizer_json(vocab: bytes) -> str:
    """The text of a `tokenizer.json` with the vocabulary of a `vocab.bpe`."""
    merges = merges_in(vocab)
    ids = {token: n for n, token in enumerate(tokens_of(merges))}
    return (
        json.dumps(description(ids, merges, {len(ids) - 1: special(END_OF_TEXT)}), indent=2, ensure_ascii=False) + "\n"
    )


def _file(path: Path) -> Path:
    if path.is_dir():
        if found := next((path / name for name in (NAME, OWN_FILE) if (path / name).is_file()), None):
            return found
        raise UsageError(f"--tokenizer {path}: there is no {NAME} in this folder; {_MEND}.")
    if not path.is_file():
        known = ", ".join(TOKENIZERS)
        raise UsageError(
            f"--tokenizer {path}: there is no such file, and no tokenizer of this name"
            f"{did_you_mean(str(path), TOKENIZERS)} Available: {known}, or the path of a {NAME}."
        )
    return path


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise Fault(f"holds a JSON {type(value).__name__}, expected an object")
    return value


def _vocabulary(found: Described) -> bytes:
    """The `vocab.bpe`, if ids and merges are GPT-2's layout and nothing else is a token."""
    ids, merges = found.ids, found.merges
    vocab = vocab_bytes(merges)
    if sha256_bytes(vocab) == VOCAB_SHA256:
        raise DataError("this tokenizer.json is GPT-2's own; choose --tokenizer gpt2 instead.")
    if why := layout_fault(ids, merges) or fault_of(merges):
        raise Fault(why)
    end = 256 + len(merges)
    tokens = [
        *((text, n) for text, n in ids.items() if type(n) is not int or n > end),
        *((t, n) for n, t in found.added),
    ]
    for text, n in tokens:
        if (text, n) != (END_OF_TEXT, end):
            raise Fault(f"has the token {text!r:.80} with the id {n!r:.40}, expected none but {END_OF_TEXT} ({LAYOUT})")
    return vocab
