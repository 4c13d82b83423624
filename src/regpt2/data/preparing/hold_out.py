"""What small inputs hold out for validation. In: the SHA-256 of every document; out: a rule that leaves no split empty.

By `--val-fraction` few documents can all fall to one split. Then the document with the lowest SHA-256 is the
validation split, and all others are for training. If there is one text alone, its end is the validation split. The
rule depends on the texts alone, so workers, engines and interruptions do not change it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regpt2.data.tokenizer import Tokenizer

WINDOW_TOKENS = 1025  # of GPT-2: 1,024 and the one after them
_ROOM_TOKENS = 16  # the end is encoded anew, which can give a few tokens less
_LOOK_BACK = 2000  # characters, for a place to cut


@dataclass
class Digests:
    """The lowest and the highest SHA-256 (hex) of documents, and the first file with the lowest; empty without any."""

    lowest: str = ""
    highest: str = ""
    file: str = ""

    def include(self, other: "Digests") -> None:
        """Of these documents and of later ones."""
        if other.lowest and (not self.lowest or other.lowest < self.lowest):
            self.lowest, self.file = other.lowest, other.file
        self.highest = max(self.highest, other.highest)


@dataclass(frozen=True)
class HoldOut:
    """The document to hold out, by the SHA-256 (hex) of its text; `cut`: only its end, because all texts are equal."""

    digest: str = ""
    """Empty: the split of a document is decided by --val-fraction."""
    cut: bool = False
    file: str = ""

    @classmethod
    def of(cls, digests: Digests) -> "HoldOut":
        return cls(digests.lowest, digests.lowest == digests.highest, digests.file)

    def __str__(self) -> str:
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
