"""What small inputs hold out for validation. In: the SHA-256 of every document; out: a rule that leaves no split empty.

By `--val-fraction` few documents can all fall to one split. Then the document with the lowest SHA-256 is the
validation split, and all others are for training. Of a long text, which comes in pieces, and of one text alone,
only an end is held out. The rule depends on the texts alone, so workers, engines and interruptions do not change it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regpt2.data.sources.plan import Document
from regpt2.data.tokenizer import Tokenizer

WINDOW_TOKENS = 1025  # of GPT-2: 1,024 and the one after them
_SMALL_BYTES = 8192  # the last piece of a text may be too short for a window
_ROOM_TOKENS = 16  # the end is encoded anew, which can give a few tokens less
_LOOK_BACK = 2000  # characters, for a place to cut


@dataclass
class Digests:
    """The lowest and the highest SHA-256 (hex) of documents, and the first file with the lowest; empty without any.

    Each has a digit in front, 1 for a short piece of a longer text, so that it is the lowest only among its like.
    """

    lowest: str = ""
    highest: str = ""
    file: str = ""
    is_piece: bool = False
    """The lowest is a piece of a longer text."""

    @classmethod
    def of(cls, document: Document, digest: bytes, n_bytes: int, file: str) -> "Digests":
        """Of a single document."""
        is_piece = document.piece is not None
        key = f"{int(is_piece and n_bytes < _SMALL_BYTES)}{digest.hex()}"
        return cls(key, key, file, is_piece)

    def include(self, other: "Digests") -> None:
        """Of these documents and of later ones."""
        if other.lowest and (not self.lowest or other.lowest < self.lowest):
            self.lowest, self.file, self.is_piece = other.lowest, other.file, other.is_piece
        self.highest = max(self.highest, other.highest)


@dataclass(frozen=True)
class HoldOut:
    """The document to hold out, by the SHA-256 (hex) of its text."""

    digest: str = ""
    """Empty: the split of a document is decided by --val-fraction."""
    cut: bool = False
    """Hold out only its end: it is a piece of a longer text, or all texts are equal."""
    file: str = ""
    is_piece: bool = False

    @classmethod
    def of(cls, digests: Digests) -> "HoldOut":
        is_piece = digests.is_piece and digests.lowest != digests.highest
        return cls(digests.lowest[1:], is_piece or digests.lowest == digests.highest, digests.file, is_piece)

    def __str__(self) -> str:
        if self.is_piece:
            return f"the end of the piece with the lowest SHA-256, {self.digest[:16]} ({self.file})"
        if self.cut:
            return f"the end of the only document ({self.file})"
        return f"the document with the lowest SHA-256, {self.digest[:16]} ({self.file})"


def end_for_validation(
    text: str, ids: npt.NDArray[np.uint16], tokenizer: Tokenizer, val_fraction: float
) -> tuple[str, str] | None:
    """The text in two, of which the second is about `val_fraction` of its tokens; None if it is one character.

    The end has a window of tokens at least, where the text has two. It begins after a blank line or a line, else at a
    space, else at any character.
    """
    solid = len(text) - len(text.lstrip()) + 1, len(text.rstrip()) - 1  # neither side may be blank
    if solid[0] > solid[1]:
        return None
    wanted = max(1, round(val_fraction * len(ids)), min(WINDOW_TOKENS + _ROOM_TOKENS, len(ids) // 2))
    before = tokenizer.decode_bytes(map(int, ids[: len(ids) - wanted])).decode("utf-8", "ignore")
    at = min(max(len(before), solid[0]), solid[1])
    first = max(solid[0], at - min(_LOOK_BACK, at // 4))
    for border in ("\n\n", "\n"):
        if (found := text.rfind(border, first, at)) >= 0:
            at = found + len(border)
            return text[:at], text[at:]
    at = next((n for n in range(at, first - 1, -1) if text[n].isspace()), at)
    return text[:at], text[at:]
