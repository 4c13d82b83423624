"""What formats of others need. In: bytes, an open file, a vocabulary; out: numbers, tensors, a shape, token texts.

Nothing here reads beyond the end of a file, or takes more memory than the file has bytes.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.files import sha256_bytes
from regpt2.model.files.contract import GPT2_TOKENS, QUANTIZED, Vocabulary
from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels.activation import Activation

END_OF_TEXT = "<|endoftext|>"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of OpenAI's vocab.bpe
GPT2_TEXTS_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # of `token_texts`, one a line
MOST_LAYERS = 1000  # GPT-3 has 96; a header must not make us build millions of empty ones
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal ones, saved as if they were weights


def damaged(path: Path, why: str) -> CheckpointError:
    """The message for a file that was not copied whole, or not by its own writer."""
    return CheckpointError(f"{path} is damaged: {why}; copy it again.")


def begins_with(path: Path, magic: bytes) -> bool:
    """Is this a plain file that begins so?"""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


class Cursor:
    """Reads little-endian values one after the other, never beyond the end of its bytes."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, n_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            CheckpointError: there are not so many.
        """
        left = len(self.data) - self.at
        if not 0 <= n_bytes <= left:
            raise damaged(self.path, f"{n_bytes:,} bytes expected at byte {self.at:,}, {left:,} are there")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def value(self, code: str) -> Any:
        """One number of the `struct` module's kind `code`: "I", "Q", "f"."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def varint(self) -> int:
        """A whole number in groups of seven bits, the lowest first, as protocol buffers have it."""
        number = 0
        for shift in range(0, 64, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise damaged(self.path, f"a number without end at byte {self.at:,}")

    def text(self, n_bytes: int) -> str:
        """UTF-8."""
        try:
            return self.take(n_bytes).decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"text that is no UTF-8 before byte {self.at:,} ({error.reason})") from None


def read_array(file: IO[bytes], path: Path, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The next numbers of an open file, of numpy's type `dtype`; the caller has compared the size with the file's."""
    count = int(np.prod(shape, dtype=np.int64))
    values = np.fromfile(file, dtype, count)
    if len(values) < count:
        raise damaged(path, f"it ends {count - len(values):,} numbers too early")
    return torch.from_numpy(values).view(shape)


def config_of(
    path: Path, sizes: Mapping[str, Any], dropout: float = 0.0, activation: Activation = "gelu_tanh"
) -> GPTConfig:
    """The shape of a model by what a file says of it.

    Raises:
        CheckpointError: a size is missing, no whole number, or impossible.
    """
    for name in SIZES:
        if type(sizes.get(name)) is not int:
            raise CheckpointError(f"{path}: {name} = {sizes.get(name)!r:.80}, expected a whole number.")
    if sizes["n_layer"] > MOST_LAYERS:
        raise CheckpointError(f"{path}: n_layer = {sizes['n_layer']:,}, expected at most {MOST_LAYERS:,}.")
    try:
        return GPTConfig(**{name: sizes[name] for name in SIZES}, dropout=dropout, activation=activation)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def own_weights(path: Path, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by GPT's names, in fp32: without masks, and without what compiled and parallel models add to names.

    Raises:
        CheckpointError: two tensors have the same name and differ, or one is quantized.
    """
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in raw.items():
        name = ".".join(part for part in theirs.split(".") if part not in _WRAPPERS).removeprefix("transformer.")
        if name.endswith(_MASKS):
            continue
        if not tensor.is_floating_point() and tensor.dtype != torch.bool:
            raise CheckpointError(f"{path}: tensor {theirs} is of type {str(tensor.dtype)[6:]}: {QUANTIZED}")
        if name in tensors and not torch.equal(tensors[name], tensor.to(torch.float32)):
            raise CheckpointError(f"{path}: {theirs} is a second {name}, with other numbers; which one is meant?")
        tensors[name] = tensor.to(torch.float32)
    return tensors


def drop_equal_head(path: Path, tensors: dict[str, Tensor]) -> None:
    """Leave out a head that only repeats `wte`.

    Raises:
        CheckpointError: it differs.
    """
    head, wte = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and (wte is None or not torch.equal(head, wte)):
        raise CheckpointError(f"{path}: lm_head.weight differs from wte.weight, this GPT-2 has one for both.")


def token_texts(vocabulary: Vocabulary | None) -> list[str] | None:
    """Every token in the order of ids, in GPT-2's printable form; None if the vocabulary is not at hand."""
    character = _byte_characters()
    if vocabulary is not None and vocabulary.merges is not None:
        merged = (line.replace(" ", "") for line in merges_of(vocabulary))
        return [*character.values(), *merged, END_OF_TEXT]
    if vocabulary is not None and vocabulary.name == "bytes" and vocabulary.eot == 256:
        return [*(character[byte] for byte in range(256)), END_OF_TEXT]
    return None


def text_bytes(text: str) -> bytes:
    """The bytes that a token in printable form stands for."""
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    return bytes(byte_of[character] for character in text)


def _byte_characters() -> dict[int, str]:
    """For each byte one character: itself if it can be printed, else one from U+0100 on; in GPT-2's order of ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def merges_of(vocabulary: Vocabulary) -> list[str]:
    """The merges of a byte-pair encoding, "a b" each: the lines of `vocab.bpe` without its head."""
    return (vocabulary.merges or b"").decode().split("\n")[1:-1]


def gpt2_tokenizer(merges: list[str]) -> Vocabulary | None:
    """GPT-2's vocabulary, if these are its merges, in its order: by the SHA-256 of `vocab.bpe`."""
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
