"""What a token format gets to write: splits of tokens, each a row that is read once, and their description."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from regpt2.base.files import atomic_file
from regpt2.data.checks.counts import ends_of_text
from regpt2.data.tokenizer import Tokenizer

DEFAULT_SHARD_TOKENS = 100_000_000  # as in llm.c

Piece = npt.NDArray[np.uint16]


@dataclass
class Tally:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, other: "Tally") -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes

    def counted(self, pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Piece]:
        """The same tokens; their amounts are added. A document counts where it begins."""
        for piece in pieces:
            documents, text_bytes = tokenizer.count(piece)
            self.add(Tally(documents, len(piece), text_bytes))
            yield piece


class TokenRow:
    """Tokens that come in pieces, taken in any amounts, once, in order."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = iter(pieces)
        self._left = np.empty(0, dtype=np.uint16)

    def take(self, n_tokens: int) -> Iterator[Piece]:
        """The next `n_tokens`, which must exist."""
        while n_tokens:
            if not len(self._left):
                self._left = next(self._pieces)
            piece, self._left = self._left[:n_tokens], self._left[n_tokens:]
            n_tokens -= len(piece)
            yield piece


@dataclass(frozen=True)
class SplitTokens:
    """One split: "train" or "val", its tokens, and how many they are."""

    name: str
    n_tokens: int
    row: TokenRow

    def shards(self, shard_tokens: int) -> Iterator[tuple[int, Iterator[Piece]]]:
        """The amount and the tokens of each shard, to be read in this order; the last one is shorter."""
        for start in range(0, self.n_tokens, shard_tokens):
            n_tokens = min(shard_tokens, self.n_tokens - start)
            yield n_tokens, self.row.take(n_tokens)

    def all(self) -> Iterator[Piece]:
        return self.row.take(self.n_tokens)


@dataclass(frozen=True)
class TokenData:
    """Everything that is to be written. `source`, `revision` and `options` say where the tokens come from, and how."""

    dataset: str
    source: str
    revision: str
    tokenizer: Tokenizer
    options: dict[str, str]
    shard_tokens: int
    splits: tuple[SplitTokens, ...]


def write_documents(tokens: Path, ends: Path, split: SplitTokens, eot: int | None) -> int:
    """Write a split as bare tokens, and where its documents end, in tokens, as uint64; the number of documents.

    A document ends after its end of text, the last one with the split.
    """
    n_tokens = n_documents = last_end = 0
    with atomic_file(tokens) as tokens_file, atomic_file(ends) as ends_file:
        for piece in split.all():
            tokens_file.write(piece.astype("<u2", copy=False).tobytes())
            found = ends_of_text(piece, eot) + (n_tokens + 1)
            last_end = _append(ends_file, found, last_end)
            n_tokens, n_documents = n_tokens + len(piece), n_documents + len(found)
        if last_end < n_tokens:
            _append(ends_file, np.array([n_tokens]), last_end)
            n_documents += 1
    return n_documents


def _append(file: IO[bytes], ends: npt.NDArray[np.int64], last_end: int) -> int:
    file.write(ends.astype("<u8").tobytes())
    return int(ends[-1]) if len(ends) else last_end
