"""Places in a split to look at. In: streams of tokens; out: the text at a position, and where two splits part."""

from dataclasses import dataclass

import numpy as np

from regpt2.base.console import ProgressLine
from regpt2.data.checks.counts import STRETCH_TOKENS, ends_of_text, eot_is_last
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.shards import TokenStream


@dataclass(frozen=True)
class TextPiece:
    """Text from a position of the split on; an end of text is not part of it."""

    position: int
    begins_document: bool
    text: str


@dataclass(frozen=True)
class Excerpt:
    """Some tokens of a split, where they are, and their text, cut where documents begin."""

    position: int
    file: str
    file_position: int
    """The first token's place in its file."""
    ids: list[int]
    pieces: list[TextPiece]
    ends_split: bool


def excerpt(stream: TokenStream, tokenizer: Tokenizer, position: int, n_tokens: int, cut: int | None = None) -> Excerpt:
    """`n_tokens` from a position that the split has, or as many as are left. The text is also cut at token `cut`."""
    stop = min(position + n_tokens, stream.n_tokens)
    eot, before = tokenizer.eot, int(position > 0)
    ids = stream.read(position - before, stop - position + before).tolist()
    if eot_is_last(stream, eot):
        begins = {position - before + at + 1 for at, token in enumerate(ids) if token == eot} | {0}
    else:
        begins = {position - before + at for at, token in enumerate(ids) if token == eot}
    ids = ids[before:]
    cuts = sorted(at for at in begins | {position, cut} if at is not None and position <= at < stop)
    pieces = [
        TextPiece(a, a in begins, tokenizer.decode(token for token in ids[a - position : b - position] if token != eot))
        for a, b in zip(cuts, [*cuts[1:], stop], strict=True)
    ]
    index, place = stream.place(position)
    return Excerpt(position, stream.files[index].path.name, place, ids, pieces, stop == stream.n_tokens)


@dataclass(frozen=True)
class Parting:
    """Where two splits part: at the first token that differs, or where the shorter one ends."""

    position: int
    document: int
    """The document of the first split that holds the token there, from 1; 0 before its first beginning."""


def find_parting(a: TokenStream, b: TokenStream, eot: int | None, what: str) -> Parting | None:
    """Where two splits part, or None if they are equal. Only tokens count, not the files that hold them.

    Raises:
        DataError: a file has become shorter, or holds an id outside the vocabulary.
    """
    n_both, n_eot = min(a.n_tokens, b.n_tokens), 0
    with ProgressLine(f"comparing {what}", n_both, "tokens") as line:
        for start in range(0, n_both, STRETCH_TOKENS):
            count = min(STRETCH_TOKENS, n_both - start)
            ids, others = a.read(start, count), b.read(start, count)
            differs = ids != others
            if differs.any():
                at = int(np.argmax(differs))
                return _parting(a, eot, start + at, n_eot + len(ends_of_text(ids[:at], eot)))
            n_eot += len(ends_of_text(ids, eot))
            line.advance(count)
    return None if a.n_tokens == b.n_tokens else _parting(a, eot, n_both, n_eot)


def _parting(a: TokenStream, eot: int | None, position: int, n_eot: int) -> Parting:
    """`n_eot` ends of text come before the position."""
    if eot_is_last(a, eot):
        return Parting(position, n_eot + 1)
    begins = len(ends_of_text(a.read(position, min(1, a.n_tokens - position)), eot))
    return Parting(position, n_eot + begins)
