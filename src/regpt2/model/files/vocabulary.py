"""GPT-2's vocabulary in the formats of others. In: a vocabulary, or the tokens in a file; out: the other."""

from collections.abc import Mapping

from regpt2.base.files import sha256_bytes
from regpt2.model.files.contract import GPT2_TOKENS, Vocabulary

END_OF_TEXT = "<|endoftext|>"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's vocab.bpe
GPT2_TEXTS_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # of `token_texts`, one a line


def token_texts(vocabulary: Vocabulary | None) -> list[str] | None:
    """Every token in the order of ids, in GPT-2's printable form; None if the vocabulary is not available."""
    character = _byte_characters()
    if vocabulary is not None and vocabulary.merges is not None:
        merged = (line.replace(" ", "") for line in merges_of(vocabulary))
        return [*character.values(), *merged, END_OF_TEXT]
    if vocabulary is not None and vocabulary.name == "bytes" and vocabulary.eot == 256:
        return [*(character[byte] for byte in range(256)), END_OF_TEXT]
    return None


def text_bytes(text: str) -> bytes:
    """The bytes of a token in printable form."""
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    return bytes(byte_of[character] for character in text)


def _byte_characters() -> dict[int, str]:
    """One character for each byte, in GPT-2's order of ids: itself if it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def merges_of(vocabulary: Vocabulary) -> list[str]:
    """The merges of a byte-pair encoding, "a b" each: the lines of `vocab.bpe` without its head."""
    return (vocabulary.merges or b"").decode().split("\n")[1:-1]


def gpt2_tokenizer(merges: list[str]) -> Vocabulary | None:
    """GPT-2's vocabulary if these are its merges in its order, by the SHA-256 of `vocab.bpe`; else None."""
    vocab = "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8", "replace")
    return Vocabulary("gpt2", GPT2_SHA256, merges=vocab) if sha256_bytes(vocab) == GPT2_SHA256 else None


def is_gpt2_order(texts: list[str]) -> bool:
    """Are these GPT-2's tokens in its order of ids, in printable form?"""
    return sha256_bytes("\n".join(texts).encode("utf-8", "replace")) == GPT2_TEXTS_SHA256


def added_texts(texts: Mapping[int, str], rows: int) -> tuple[str | None, ...]:
    """The texts of the rows beyond GPT-2's tokens, None for a row without one; of equal texts the first row's."""
    of_row = {text: row for row, text in sorted(texts.items(), reverse=True)}
    return tuple(
        texts[row] if texts.get(row) and of_row[texts[row]] == row else None for row in range(GPT2_TOKENS, rows)
    )
