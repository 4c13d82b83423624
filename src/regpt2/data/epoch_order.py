"""The order of an epoch. In: a seed and an epoch; out: a permutation, and the documents of a data set joined in it.

With `batch.order = "documents"` an epoch is a permutation of the documents, joined and cut into windows: a function of
seed and epoch, so a window is a pure function of seed and step. In each epoch the cuts fall elsewhere, and a document
has other neighbors. The windows are then taken in a shuffled order too (data/loader.py): in their own order a long
document would fill whole updates.

A document is an end of text and all up to the next one. Tokens before the first end of text are a document as well:
data whose validation split was cut off its front begins in the middle of one.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regpt2.base.errors import DataError

_ROUNDS = 6  # of the Feistel network
CHUNK_TOKENS = 1 << 22  # of one read while the starts are looked for
_OTHER_KEYS = 1 << 63  # added to the seed, which is below: the windows of an epoch are permuted by the seed itself


def permute(places: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the places of an epoch lie in the data: a permutation of 0..n-1 without a table of n entries.

    A Feistel network (Luby and Rackoff 1988) on the smallest square power of two that holds n, walked until the value
    falls below n. Written out here, so that no library's change of generator can change the order of a run.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix(
        np.arange(_ROUNDS, dtype=np.uint64) + _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    )
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= n
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Tokens(Protocol):
    """What is needed of a token stream (data/tokens/shards.py has the real one)."""

    n_tokens: int

    def read(self, start: int, count: int) -> NDArray[np.uint16]: ...


def document_starts(
    tokens: Tokens, end_of_text: int, on_tokens: Callable[[int], object] | None = None
) -> NDArray[np.int64]:
    """The places at which documents begin, the first at 0: one pass over all tokens.

    `on_tokens` gets the number of tokens of each piece that was read.
    """
    found = [np.zeros(1, dtype=np.int64)]
    for first in range(0, tokens.n_tokens, CHUNK_TOKENS):
        piece = tokens.read(first, min(CHUNK_TOKENS, tokens.n_tokens - first))
        found.append(np.flatnonzero(piece == end_of_text).astype(np.int64) + first)
        if on_tokens is not None:
            on_tokens(len(piece))
    starts = np.concatenate(found)
    return starts[1:] if len(starts) > 1 and starts[1] == 0 else starts


def require_documents(starts: NDArray[np.int64], whose: str) -> None:
    """Refuse data with nothing to shuffle.

    Raises:
        DataError: it is one document.
    """
    if len(starts) < 2:
        raise DataError(
            f"{whose} is one document (no end of text after its first token), so batch.order = 'documents' has nothing "
            "to shuffle; take --batch.order shuffled."
        )


class DocumentOrder:
    """The tokens of a stream, epoch by epoch. Several threads may read from it."""

    def __init__(self, tokens: Tokens, starts: NDArray[np.int64], *, seed: int) -> None:
        self.tokens, self.starts, self._seed = tokens, starts, seed
        self.lengths = np.diff(starts, append=tokens.n_tokens)  # (documents,)
        # An update may lie in two epochs, and the next is read ahead: the orders of three are kept.
        self._of_epoch = lru_cache(maxsize=3)(self._make)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The documents of an epoch by number, in its order."""
        n = len(self.starts)
        return permute(np.arange(n, dtype=np.int64), n, seed=self._seed + _OTHER_KEYS, epoch=epoch)

    def _make(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the documents of an epoch begin in the data, and where each ends in the epoch."""
        order = self.order(epoch)
        return self.starts[order], np.cumsum(self.lengths[order])

    def read(self, epoch: int, start: int, count: int) -> NDArray[np.uint16]:
        """Tokens [start, start + count) of an epoch.

        Raises:
            DataError: as the stream's own `read`.
        """
        joined: NDArray[np.uint16] = self._joined(self.tokens.read, epoch, start, count)
        return joined

    def read_mask(self, epoch: int, start: int, count: int) -> NDArray[np.bool_]:
        """Which of these tokens count in the loss. The stream has a mask."""
        joined: NDArray[np.bool_] = self._joined(
            self.tokens.read_mask,  # type: ignore[attr-defined]
            epoch,
            start,
            count,
        )
        return joined

    def _joined(self, read: Callable[[int, int], NDArray[Any]], epoch: int, start: int, count: int) -> NDArray[Any]:
        begins, ends = self._of_epoch(epoch)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, start + count - 1, side="right"))  # the document of the last token
        if first == last:  # most windows of long documents lie in one
            return read(int(begins[first] + start - (ends[first - 1] if first else 0)), count)
        befores = np.append(ends[first - 1] if first else 0, ends[first:last])  # tokens of the epoch before each
        skipped = np.maximum(start - befores, 0)
        sizes = np.minimum(ends[first : last + 1], start + count) - befores - skipped
        places = begins[first : last + 1] + skipped
        return np.concatenate([read(at, n) for at, n in zip(places.tolist(), sizes.tolist(), strict=True)])
