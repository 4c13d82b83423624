"""Which documents are left out. In: a text; out: the reason, or None. In: hashes; out: which come for the first time.

All of it is off by default. FineWeb-Edu and its like are filtered and deduplicated already.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import UsageError

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Filters:
    """Simple rules on the text of a document, after Gopher's (Rae et al. 2021, arXiv:2112.11446, appendix A)."""

    min_chars: int = 0
    """Leave out documents with fewer characters than this."""
    max_chars: int = 0
    """Leave out documents with more characters than this; 0 = no limit."""
    min_words_with_letters: float = 0.0
    """Leave out documents in which a smaller share of the words contains a letter; Gopher uses 0.8."""
    max_repeated_lines: float = 1.0
    """Leave out documents in which a larger share of the lines are repeats; Gopher uses 0.3."""

    def __post_init__(self) -> None:
        for name in ("min_chars", "max_chars"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be below 0.")
        if self.max_chars and self.max_chars < self.min_chars:
            raise UsageError(
                f"--max-chars {self.max_chars} is below --min-chars {self.min_chars}: nothing would be left."
            )
        for name in ("min_words_with_letters", "max_repeated_lines"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a share, from 0 to 1.")

    def reason(self, text: str) -> str | None:
        """Why a document is left out; None if it stays."""
        if len(text) < self.min_chars:
            return f"documents shorter than {self.min_chars:,} characters"
        if self.max_chars and len(text) > self.max_chars:
            return f"documents longer than {self.max_chars:,} characters"
        if self.min_words_with_letters and _share_with_letters(text.split()) < self.min_words_with_letters:
            return f"documents with letters in less than {self.min_words_with_letters:g} of the words"
        if self.max_repeated_lines < 1 and _share_of_repeated_lines(text) > self.max_repeated_lines:
            return f"documents with more than {self.max_repeated_lines:g} repeated lines"
        return None


def _share_with_letters(words: list[str]) -> float:
    return sum(any(map(str.isalpha, word)) for word in words) / max(1, len(words))


def _share_of_repeated_lines(text: str) -> float:
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return 1 - len(lines) / max(1, lines.total())


class Seen:
    """The 64-bit hashes of all documents so far, 8 bytes each.

    That two different texts among n share one, and the later is taken for a copy, has a chance of n^2 / 2^65: for the
    10 million documents of FineWeb-Edu's sample 3 in a million.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []  # each sorted, each at most half as long as the one before

    def first(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these come for the first time, in their order; they are remembered."""
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            new &= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] != hashes
        if new.any():
            self._runs.append(np.sort(hashes[new]))
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return new
