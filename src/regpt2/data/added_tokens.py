"""Ids beyond a vocabulary. In: a tokenizer, and the texts of ids added to it; out: a tokenizer of both."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.data.tokenizer import Tokenizer, valid_text

MOST_IDS = 1 << 16  # ids are kept as uint16


class AddedTokens(Tokenizer):
    """As `base`, but a text that was added, wherever it occurs, is the one id that was added for it.

    So `[PAD]` and `<|user|>` in a prompt are tokens, as in transformers: nothing else encodes to them. The longest
    wins where several begin. None in `added` is an id without a text, which decodes to nothing.
    """

    def __init__(self, base: Tokenizer, added: Sequence[str | None]) -> None:
        self.base, self.name, self.fingerprint, self.encoder = base, base.name, base.fingerprint, base.encoder
        self.added, self.vocab = tuple(added), base.vocab
        self.eot, self.start_id, self.vocab_size = base.eot, base.start_id, base.vocab_size + len(added)
        if self.vocab_size > MOST_IDS:
            raise DataError(f"{self.vocab_size:,} tokens, of them {len(added):,} added ones; at most {MOST_IDS:,} fit.")
        texts = [valid_text(text or "") for text in added]
        super().__init__([*base.id_bytes, *(text.encode() for text in texts)])
        self._id_of = {text: n for n, text in reversed(list(enumerate(texts, start=base.vocab_size))) if text}
        self.textless = tuple(n for n, text in enumerate(texts, start=base.vocab_size) if not text)
        longest_first = sorted(self._id_of, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        return np.concatenate(list(self._encoded(valid_text(text))))

    def _encoded(self, text: str) -> Iterator[npt.NDArray[np.uint16]]:
        start = 0
        for found in self._added.finditer(text) if self._added else ():
            yield self.base.encode_to_numpy(text[start : found.start()])
            yield np.array([self._id_of[found.group()]], dtype=np.uint16)
            start = found.end()
        yield self.base.encode_to_numpy(text[start:])
