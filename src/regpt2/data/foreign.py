"""Token folders that other projects made, to be read as they are: a folder and a split in, its token files out.

Three kinds, told apart by content: llm.c / modded-nanogpt `.bin` with a header (the native format), build-nanogpt
`.npy`, and nanoGPT's raw `train.bin` and `val.bin`. All of them are uint16 tokens at some offset of a file.
"""

import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from regpt2.base.errors import DataError
from regpt2.data.manifest import HEADER_BYTES, TOKEN_BYTES

MAGIC = 20240520
VERSION = 1
MEND = "prepare or download it again"


@dataclass(frozen=True)
class TokenFile:
    """A file that holds `n_tokens` little-endian uint16 from byte `offset` to its end."""

    path: Path
    offset: int
    n_tokens: int


def foreign_files(folder: Path, split: str) -> list[TokenFile]:
    """The token files of a split in a folder without a manifest, sorted by name; empty if there are none."""
    names = sorted(entry.name for entry in os.scandir(folder) if _is_of_split(entry.name, split))
    return [token_file(folder / name) for name in names]


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
        return stem == split or f"_{split}_" in name or (split == "train" and stem.startswith("train"))
    return suffix == ".npy" and split in stem


def _with_header(path: Path, head: bytes, size: int) -> TokenFile:
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} has {size:,} bytes, less than the header's {HEADER_BYTES:,}: truncated; {MEND}.")
    version, n_tokens = struct.unpack_from("<ii", head, 4)
    if version != VERSION:
        raise DataError(f"{path} has format version {version}, expected {VERSION}; {MEND}.")
    expect_bytes(path, size, HEADER_BYTES, n_tokens)
    return TokenFile(path, HEADER_BYTES, n_tokens)


def expect_bytes(path: Path, size: int, offset: int, n_tokens: int) -> None:
    """Refuse a file that is not exactly `n_tokens` after `offset` bytes.

    Raises:
        DataError: truncated or grown.
    """
    expected = offset + TOKEN_BYTES * n_tokens
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
