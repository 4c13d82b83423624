"""Token folders that other projects made, to be read as they are: a folder and a split in, its token files out.

Three kinds are told apart by content: llm.c / modded-nanogpt `.bin` with a header (the native format), build-nanogpt
`.npy`, and nanoGPT's raw `train.bin` and `val.bin`. Two have an index of documents beside the tokens, which is checked
from end to end: Megatron's `.bin` and `.idx`, and datatrove's `.ds` and `.ds.index`. Each is tokens at some offset of a
file.
"""

import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.data.tokens.manifest import HEADER_BYTES, TOKEN_BYTES

MAGIC = 20240520
VERSION = 1
QUESTIONS_MAGIC = 20240522  # llm.c's hellaswag_val.bin: questions with their endings, no tokens to train on
MEND = "prepare or download it again"

MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_HEAD = struct.Struct("<9sQBQQ")  # magic, version, type of the tokens, sequences, length of the document index
MEGATRON_UINT16 = 8
MEGATRON_WIDTHS = {4: 4, MEGATRON_UINT16: 2}  # int32, uint16
INDEX_SUFFIX = ".index"  # datatrove: after the whole name
_AT_ONCE = 1 << 16  # numbers of an index


class _Questions(DataError):
    """A file of questions that is named like a file of tokens."""


@dataclass(frozen=True)
class TokenFile:
    """A file that holds `n_tokens` little-endian integers of `width` bytes from byte `offset` to its end."""

    path: Path
    offset: int
    n_tokens: int
    width: int = TOKEN_BYTES
    whole_documents: bool = False
    """An index beside it says where its documents end, and the last of them ends with it."""

    def last_token(self) -> int | None:
        with open(self.path, "rb") as file:
            file.seek(self.offset + self.width * max(0, self.n_tokens - 1))
            data = file.read(self.width)
        return int.from_bytes(data, "little") if data else None


def foreign_files(folder: Path, split: str, questions: list[str] | None = None) -> list[TokenFile]:
    """The token files of a split in a folder without a manifest, sorted by name; empty if there are none.

    `questions` gets the names of files that are named like tokens but hold an evaluation's questions.

    Raises:
        DataError: a file is not what its name says, or the folder has the split in several formats.
    """
    names = {entry.name for entry in os.scandir(folder)}
    files, suffixes = [], set()
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        has_index = suffix in (".idx", ".ds")
        if _split_of(stem) != split if has_index else f"{stem}.idx" in names or not _is_of_split(name, split):
            continue
        read = {".idx": _megatron, ".ds": _datatrove}.get(suffix, token_file)
        try:
            files.append(read(folder / name))
            suffixes.add(suffix)
        except _Questions:
            if questions is not None:
                questions.append(name)
    if len(suffixes) > 1:
        raise DataError(
            f"{folder} holds {split} tokens in several formats ({', '.join(sorted(suffixes))}), perhaps the same "
            "twice; move all but one elsewhere."
        )
    return files


def foreign_dataset(files: list[TokenFile]) -> str | None:
    """What the names say that the text is: "fineweb_edu", "fineweb", "openwebtext", or None."""
    path = files[0].path
    name = re.split("_(?:train|val)", path.stem)[0].lower().replace("_", "").replace("-", "")
    known = {"edufineweb": "fineweb_edu", "finewebedu": "fineweb_edu", "fineweb": "fineweb"}
    return known.get(name) or ("openwebtext" if "openwebtext" in (name, path.parent.name.lower()) else None)


def token_file(path: Path) -> TokenFile:
    """Find out by its first bytes what kind of token file this is, and check its size against what they say.

    Raises:
        DataError: not a file, not readable as tokens, truncated or grown.
    """
    size = regular_file_bytes(path)
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return _npy(path, file, size)
    if len(head) >= 4 and struct.unpack_from("<i", head)[0] == MAGIC:
        return _with_header(path, head, size)
    if len(head) >= 4 and struct.unpack_from("<i", head)[0] == QUESTIONS_MAGIC:
        raise _Questions(
            f"{path} holds the questions of an evaluation, as llm.c writes them (it starts with {QUESTIONS_MAGIC}), no "
            "tokens; give it to `regpt2 evaluate` with --files hellaswag=PATH."
        )
    if path.stem not in ("train", "val"):
        raise DataError(
            f"{path} starts with neither {MAGIC} (llm.c) nor a .npy header, and only train.bin and val.bin may be raw "
            f"(nanoGPT); {MEND}, or remove it."
        )
    if size % TOKEN_BYTES:
        raise DataError(f"{path} has {size:,} bytes, an odd number: it is not whole uint16 tokens; {MEND}.")
    return TokenFile(path, 0, size // TOKEN_BYTES)


def regular_file_bytes(path: Path) -> int:
    """The size of a file.

    Raises:
        DataError: it is missing, or is a folder, a pipe or another thing that is not a plain file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {MEND}.") from None
    except OSError as error:  # a link to itself, a name that is too long
        raise DataError(f"{path} cannot be opened ({error.strerror}); {MEND}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a plain file; {MEND}.")
    return status.st_size


def _is_of_split(name: str, split: str) -> bool:
    stem, suffix = os.path.splitext(name)
    if suffix == ".bin":
        return stem == split or f"_{split}_" in f"{stem}_" or (split == "train" and stem.startswith("train"))
    return suffix == ".npy" and split in stem


def _split_of(stem: str) -> str:
    """The split of a file with an index, by the words of its name; one that says nothing is for training."""
    words = set(re.split("[^a-z]+", stem.lower()))
    if words & {"val", "valid", "validation"}:
        return "val"
    return "test" if "test" in words and "train" not in words else "train"


def _with_header(path: Path, head: bytes, size: int) -> TokenFile:
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} has {size:,} bytes, less than the header's {HEADER_BYTES:,}: truncated; {MEND}.")
    version, n_tokens = struct.unpack_from("<ii", head, 4)
    if version != VERSION:
        raise DataError(f"{path} has format version {version}, expected {VERSION}; {MEND}.")
    expect_bytes(path, size, HEADER_BYTES, n_tokens)
    return TokenFile(path, HEADER_BYTES, n_tokens)


def expect_bytes(path: Path, size: int, offset: int, n_tokens: int, width: int = TOKEN_BYTES) -> None:
    """Refuse a file that is not exactly `n_tokens` after `offset` bytes.

    Raises:
        DataError: truncated or grown.
    """
    expected = offset + width * n_tokens
    if n_tokens < 0 or size != expected:
        fault = "truncated" if size < expected else "grown"
        raise DataError(
            f"{path} has {size:,} bytes, expected {expected:,} for the {n_tokens:,} tokens it should hold: "
            f"{fault}; {MEND}."
        )


def _npy(path: Path, file: IO[bytes], size: int) -> TokenFile:
    """The place of the tokens in a `.npy` file, by numpy's own header reader: nothing is allocated or unpickled."""
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, _, dtype = readers[version](file)
    except (ValueError, KeyError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: its .npy header cannot be read ({type(error).__name__}); {MEND}.") from None
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise DataError(f"{path} holds {dtype} of shape {shape}, expected one row of uint16; {MEND}.")
    expect_bytes(path, size, file.tell(), shape[0])
    return TokenFile(path, file.tell(), shape[0])


def _megatron(index: Path) -> TokenFile:
    """A `.bin` by its `.idx`: sequences that lie in the file one after another, from its beginning to its end."""
    path = index.with_suffix(".bin")
    size, index_size = regular_file_bytes(path), regular_file_bytes(index)
    with open(index, "rb") as file:
        head = file.read(MEGATRON_HEAD.size)
        if len(head) < MEGATRON_HEAD.size:
            raise DataError(f"{index} has {index_size:,} bytes, less than its head: truncated; {MEND}.")
        magic, version, code, n_sequences, n_documents = MEGATRON_HEAD.unpack(head)
        if (magic, version) != (MEGATRON_MAGIC, 1) or code not in MEGATRON_WIDTHS:
            raise DataError(
                f"{index} begins with {magic!r}, version {version}, type {code}; expected Megatron's "
                f"{MEGATRON_MAGIC!r}, version 1, type 8 (uint16) or 4 (int32); {MEND}."
            )
        expected = MEGATRON_HEAD.size + 12 * n_sequences + 8 * n_documents
        if index_size != expected or not n_documents:
            raise DataError(
                f"{index} has {index_size:,} bytes, expected {expected:,} for {n_sequences:,} sequences and "
                f"{n_documents:,} entries of documents; {MEND}."
            )
        width = MEGATRON_WIDTHS[code]
        n_bytes = _end_of_sequences(index, file, n_sequences, width)
        file.seek(-8, os.SEEK_END)
        if (last := int.from_bytes(file.read(8), "little", signed=True)) != n_sequences:
            raise DataError(f"{index}: its documents end at sequence {last:,}, expected {n_sequences:,}; {MEND}.")
    expect_bytes(path, size, 0, n_bytes // width, width)
    return TokenFile(path, 0, n_bytes // width, width, whole_documents=True)


def _end_of_sequences(index: Path, file: IO[bytes], n_sequences: int, width: int) -> int:
    """The byte at which the last sequence of a Megatron index ends, each beginning where the one before it ends."""
    end, offsets_at = 0, MEGATRON_HEAD.size + 4 * n_sequences
    for first in range(0, n_sequences, _AT_ONCE):
        n = min(_AT_ONCE, n_sequences - first)
        lengths = _numbers(index, file, "<i4", MEGATRON_HEAD.size + 4 * first, n)
        offsets = _numbers(index, file, "<i8", offsets_at + 8 * first, n)
        ends = end + width * np.cumsum(lengths, dtype=np.int64)
        bad = (lengths < 0) | (offsets != np.concatenate([[end], ends[:-1]]))
        if bad.any():
            at = int(bad.argmax())
            raise DataError(
                f"{index}: sequence {first + at:,} has {lengths[at]:,} tokens at byte {offsets[at]:,}, expected byte "
                f"{ends[at - 1] if at else end:,}, where the one before it ends; {MEND}."
            )
        end = int(ends[-1])
    return end


def _datatrove(path: Path) -> TokenFile:
    """A `.ds` by its `.ds.index`: the document ends, in tokens, say how wide a token is."""
    index = path.with_name(path.name + INDEX_SUFFIX)
    size, index_size = regular_file_bytes(path), regular_file_bytes(index)
    if index_size % 8 or index_size // 8 > size // TOKEN_BYTES:
        raise DataError(
            f"{index} has {index_size:,} bytes, expected 8 for each document of {path.name}, which has {size:,} bytes "
            f"of tokens; {MEND}."
        )
    n_tokens = 0
    with open(index, "rb") as file:
        for first in range(0, index_size // 8, _AT_ONCE):
            ends = _numbers(index, file, "<u8", 8 * first, min(_AT_ONCE, index_size // 8 - first))
            if ends[0] < n_tokens or (ends[1:] < ends[:-1]).any():
                raise DataError(f"{index}: a document ends before it begins; {MEND}.")
            n_tokens = int(ends[-1])
    width = 4 if size == 4 * n_tokens else TOKEN_BYTES
    expect_bytes(path, size, 0, n_tokens, width)
    return TokenFile(path, 0, n_tokens, width, whole_documents=True)


def _numbers(path: Path, file: IO[bytes], kind: str, offset: int, count: int) -> npt.NDArray[Any]:
    """`count` numbers at byte `offset` of a file that is known to hold them."""
    file.seek(offset)
    numbers = np.fromfile(file, dtype=kind, count=count)
    if len(numbers) != count:
        raise DataError(f"{path} became shorter while it was read; {MEND}.")
    return numbers
