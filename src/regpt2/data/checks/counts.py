"""A split in numbers. In: its stream of tokens; out: how often each id comes, and how long the documents are.

A document begins with an end of text, or, as nanoGPT writes it, ends with one. Either way that token counts as its own.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from regpt2.data.tokens.shards import TokenStream

STRETCH_TOKENS = 1 << 20  # read and counted at once; small enough for a core's cache
N_IDS = 1 << 16  # all that a uint16 can be


@dataclass
class Counts:
    """What `n_read` of the `n_tokens` of a split hold."""

    n_tokens: int
    eot: int | None
    eot_last: bool
    """Documents end with the end of text, instead of beginning with it."""
    n_read: int = 0
    head: int = 0
    """First tokens that belong to no document of this split: they continue one that began before it."""
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_IDS, dtype=np.int64))
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents of each length, in tokens; of a sample those that lie whole in a stretch."""

    @property
    def is_whole(self) -> bool:
        return self.n_read == self.n_tokens

    @property
    def n_documents(self) -> int:
        """Documents, by their ends of text; of a sample an estimate."""
        return round(self.n_ends * self.n_tokens / self.n_read)

    @property
    def n_ends(self) -> int:
        """Ends of text that were read; 0 for a vocabulary without one."""
        return 0 if self.eot is None else int(self.ids[self.eot])

    @property
    def n_used(self) -> int:
        """Number of different ids that occur."""
        return int(np.count_nonzero(self.ids))

    def length_at(self, percent: int) -> int:
        """The length that this share of the documents does not exceed: 50 is the median, 100 the longest."""
        rank, passed = -(-percent * self.lengths.total() // 100), 0
        for length in sorted(self.lengths):
            passed += self.lengths[length]
            if passed >= rank:
                return length
        raise ValueError("there is no document")

    def length_summary(self) -> dict[str, float]:
        """Tokens per document: median, mean, the length that 95 % do not exceed, and the longest."""
        mean = sum(length * times for length, times in self.lengths.items()) / self.lengths.total()
        median, percent_95, longest = map(self.length_at, (50, 95, 100))
        return {"median": median, "mean": mean, "percent_95": percent_95, "longest": longest}

    def histogram(self) -> list[tuple[int, int]]:
        """(2^k, documents of 2^k to 2^(k+1) - 1 tokens), from the shortest to the longest, gaps included."""
        buckets: Counter[int] = Counter()
        for length, times in self.lengths.items():
            buckets[length.bit_length() - 1] += times
        return [(1 << k, buckets[k]) for k in range(min(buckets), max(buckets) + 1)] if buckets else []

    def most_common(self, n: int) -> list[tuple[int, int]]:
        """(id, times) of the commonest ids, of equal ones the lower first."""
        order = np.argsort(-self.ids, kind="stable")[:n]
        return [(int(token), int(self.ids[token])) for token in order if self.ids[token]]


def count_tokens(
    stream: TokenStream,
    eot: int | None,
    n_stretches: int | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> Counts:
    """Count a split, or `n_stretches` evenly spread stretches of it. `on_tokens` gets the progress.

    Raises:
        DataError: a file has become shorter, or holds an id outside the vocabulary.
    """
    counts = Counts(stream.n_tokens, eot, eot_is_last(stream, eot))
    for start, stop in stretches(stream.n_tokens, n_stretches):
        _count_stretch(counts, stream, start, stop, on_tokens)
    return counts


def ends_of_text(ids: npt.NDArray[np.uint16], eot: int | None) -> npt.NDArray[np.int64]:
    """The places of ends of text among ids."""
    return np.empty(0, dtype=np.int64) if eot is None else np.flatnonzero(ids == eot)


def eot_is_last(stream: TokenStream, eot: int | None) -> bool:
    """Whether the end of text is the last token of each document: then it ends the split, and does not begin it.

    In a folder with a manifest it never does, wherever its splits are cut.
    """
    if eot is None or stream.tokenizer_fingerprint is not None:
        return False
    first, last = stream.read(0, 1)[0], stream.read(stream.n_tokens - 1, 1)[0]
    return bool(first != eot and last == eot)


def stretches(n_tokens: int, n: int | None) -> list[tuple[int, int]]:
    """[start, stop) of `n` evenly spread stretches; of one with everything if n is None or large enough."""
    if n is None or n * STRETCH_TOKENS >= n_tokens:
        return [(0, n_tokens)]
    return [(start, start + STRETCH_TOKENS) for start in (i * n_tokens // n for i in range(n))]


def _count_stretch(
    counts: Counts, stream: TokenStream, start: int, stop: int, on_tokens: Callable[[int], object] | None
) -> None:
    """Count tokens [start, stop). `begun` is where the current document began, once that is known."""
    begun = np.zeros(int(counts.eot_last and start == 0), dtype=np.int64)
    for at in range(start, stop, STRETCH_TOKENS):
        ids = stream.read(at, min(STRETCH_TOKENS, stop - at))
        counts.ids += np.bincount(ids, minlength=N_IDS)
        begins = at + counts.eot_last + ends_of_text(ids, counts.eot)
        if start == 0 and not len(begun):
            counts.head = int(begins[0]) if len(begins) else at + len(ids)
        begun = np.concatenate([begun, begins])
        _add_lengths(counts, begun)
        begun = begun[-1:]
        counts.n_read += len(ids)
        if on_tokens is not None:
            on_tokens(len(ids))
    if stop == stream.n_tokens and len(begun) and begun[0] < stop:
        _add_lengths(counts, np.append(begun, stop))  # the last document ends where the split does


def _add_lengths(counts: Counts, begins: npt.NDArray[np.int64]) -> None:
    for length, times in zip(*np.unique(np.diff(begins), return_counts=True), strict=True):
        counts.lengths[int(length)] += int(times)
