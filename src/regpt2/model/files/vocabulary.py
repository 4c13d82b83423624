"""Vocabularies in the formats of others. In: a vocabulary, or the tokens in a file; out: the other."""

from collections.abc import Mapping, Sequence
from typing import Any

from regpt2.base.byte_level.merges import (
    BYTES_TOKENIZER,
    END_OF_TEXT,
    byte_characters,
    fault_of,
    layout_fault,
    merges_in,
    tokens_of,
    vocab_bytes,
)
from regpt2.base.files import sha256_bytes
from regpt2.model.files.contract import GPT2_TOKENS, Vocabulary

OWN = "bpe"  # the name of a byte-pair encoding of the user's own
BYTES_SHA256 = sha256_bytes(BYTES_TOKENIZER)  # the fingerprint of the tokenizer "bytes"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's vocab.bpe
GPT2_TEXTS_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # of `token_texts`, one a line


def token_texts(vocabulary: Vocabulary | None) -> list[str] | None:
    """Every token in the order of ids, in GPT-2's printable form; None if the vocabulary is not available."""
    if vocabulary is not None and vocabulary.merges is not None:
        return tokens_of(merges_of(vocabulary))
    if vocabulary is not None and vocabulary.fingerprint == BYTES_SHA256:
        return bytes_texts()
    return None


def bytes_texts() -> list[str]:
    """The tokens of the tokenizer "bytes": the bytes in their own order, not in GPT-2's."""
    character = byte_characters()
    return [*(character[byte] for byte in range(256)), END_OF_TEXT]


def text_bytes(text: str) -> bytes:
    """The bytes of a token in printable form."""
    byte_of = {character: byte for byte, character in byte_characters().items()}
    return bytes(byte_of[character] for character in text)


def merges_of(vocabulary: Vocabulary) -> list[str]:
    """The merges of a byte-pair encoding, "a b" each: the lines of `vocab.bpe` without its head."""
    return merges_in(vocabulary.merges or b"")


def gpt2_tokenizer(merges: list[str]) -> Vocabulary | None:
    """GPT-2's vocabulary if these are its merges in its order, by the SHA-256 of `vocab.bpe`; else None."""
    vocab = vocab_bytes(merges)
    return Vocabulary("gpt2", GPT2_SHA256, merges=vocab) if sha256_bytes(vocab) == GPT2_SHA256 else None


def is_gpt2_order(texts: list[str]) -> bool:
    """Are these GPT-2's tokens in its order of ids, in printable form?"""
    return sha256_bytes("\n".join(texts).encode("utf-8", "replace")) == GPT2_TEXTS_SHA256


def other_vocabulary(ids: Mapping[str, Any], merges: Sequence[str]) -> Vocabulary | str:
    """The vocabulary with these ids and merges that is not GPT-2's: our bytes, or an own one; or why it is neither.

    An own one must have GPT-2's layout of ids. Ids after its end of text are added tokens, which are not checked here.
    """
    texts = bytes_texts()
    if not merges and all(ids.get(text) == n for n, text in enumerate(texts[:-1])) and ids.get(END_OF_TEXT, 256) == 256:
        return Vocabulary("bytes", BYTES_SHA256, len(texts) - 1)
    if why := layout_fault(ids, merges):
        return why
    if why := fault_of(merges):
        return f"cannot be used: {why}"
    return own_vocabulary(vocab_bytes(merges))


def own_vocabulary(vocab: bytes) -> Vocabulary:
    """A byte-pair encoding of the user's own, from its `vocab.bpe`."""
    return Vocabulary(OWN, sha256_bytes(vocab), 256 + len(merges_in(vocab)), vocab)


def added_texts(texts: Mapping[int, str], rows: int, start: int = GPT2_TOKENS) -> tuple[str | None, ...]:
    """The texts of the rows from `start` on, None for a row without one; of equal texts the first row's."""
    of_row = {text: row for row, text in sorted(texts.items(), reverse=True)}
    return tuple(texts[row] if texts.get(row) and of_row[texts[row]] == row else None for row in range(start, rows))
