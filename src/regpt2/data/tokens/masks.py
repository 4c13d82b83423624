"""Masks: which tokens count in the loss. In: a bool for each token of a shard; out: a file beside it, read like it.

A mask is one byte for each token, 1 where the token counts and else 0, without a header, in `NAME.mask` beside
`NAME.bin`. Bits would be an eighth of that, but with a byte any stretch of tokens and its mask are read in one way,
and sets of conversations are small: 100 million tokens have 100 MB of mask.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.base.files import atomic_file, sha256_file
from regpt2.data.tokens.manifest import MASK_SUFFIX, Shard
from regpt2.data.tokens.other_formats import MEND, expect_bytes, regular_file_bytes

MASK_BYTES = 1  # of a token
Mask = npt.NDArray[np.bool_]


def write_mask(path: Path, n_tokens: int, pieces: Iterable[Mask]) -> tuple[str, int]:
    """Write the mask of the shard at `path`, given in pieces, beside it; its SHA-256 and how many tokens count.

    It is written before its shard: a shard that is there has its mask.
    """
    digest, written, counted = hashlib.sha256(), 0, 0
    with atomic_file(path.with_suffix(MASK_SUFFIX)) as file:
        for piece in pieces:
            data = piece.astype(np.uint8).tobytes()
            digest.update(data)
            file.write(data)
            written, counted = written + len(piece), counted + int(piece.sum())
        assert written == n_tokens, f"{path.name}: a mask of {written} tokens, {n_tokens} announced"
    return digest.hexdigest(), counted


def with_mask(shard: Shard, mask: tuple[str, int] | None) -> Shard:
    """The shard with what `write_mask` gave."""
    return shard if mask is None else replace(shard, mask_sha256=mask[0], counted=mask[1])


def open_mask(folder: Path, shard: Shard) -> Path | None:
    """The file of a shard's mask, if it has one.

    Raises:
        DataError: it is missing, truncated or grown.
    """
    if shard.mask is None:
        return None
    path = folder / shard.mask
    expect_bytes(path, regular_file_bytes(path), 0, shard.tokens, MASK_BYTES)
    return path


def verify_mask(folder: Path, shard: Shard, on_bytes: Callable[[int], object] | None = None) -> None:
    """Compare a shard's mask, if it has one, with its entry in the manifest.

    Raises:
        DataError: it is missing, or differs in size or SHA-256.
    """
    path = open_mask(folder, shard)
    if path is not None and (got := sha256_file(path, on_bytes)) != shard.mask_sha256:
        raise DataError(f"{path} has SHA-256 {got}, expected {shard.mask_sha256}: damaged; {MEND}.")


def as_mask(path: Path, data: bytes) -> Mask:
    """Bytes of a mask's file as bools.

    Raises:
        DataError: there is another byte than 0 and 1.
    """
    values = np.frombuffer(data, dtype=np.uint8)
    if len(values) and values.max() > 1:
        raise DataError(f"{path} holds {values.max()}, expected 0 or 1 for each token: damaged; {MEND}.")
    return values.astype(np.bool_)
