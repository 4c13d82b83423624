"""GPT-2's ids faster: a tokenizer in; out: one that encodes with `gigatoken`, for as long as its ids are tiktoken's.

gigatoken is some twenty times as fast on one core, and young. So it has to give tiktoken's ids for a fixed set of odd
strings when a process begins, and for the first documents of each part; at the first difference tiktoken takes over.
"""

import base64
import importlib.metadata
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from regpt2.base.console import warn
from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Gpt2Tokenizer, Tokenizer, last_sure_split, valid_text

EncoderName = Literal["auto", "tiktoken", "gigatoken"]

FIRST_DOCUMENTS = 200  # of a process: encoded by both and compared
PART_DOCUMENTS = 8  # of each part after that
CACHE_TOKENS = 50_000_000  # gigatoken remembers every word, up to 7 bytes a token: begin anew after 0.35 GB
ODD_STRINGS = 4000

# The letters and numbers that came with Unicode 17. gigatoken 0.10 knows them; to tiktoken 0.14, with the tables of
# Unicode 16, they are symbols, so that "'re" behind one is not split off. Text with any of them is left to tiktoken.
_NEW = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011ddb"
    "\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)

# What GPT-2's pattern treats specially, and what programs get wrong.
_ODD = (
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "'", "''", "don't", "<|endoftext|>", "|>", "<|"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u1680", "\u2000", "\u200a"),
    *("\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\x1c", "\x1f", "\u180e", "\u200b", "\u2060", "\ufeff"),
    *("a", "Z", "the", "Hello", "hyphen-ated", "snake_case", "naïve", "ß", "ſ", "ǅ", "ª", "ʰ", "İ", "ﬁ"),
    *("Ελληνικά", "Русский", "עברית", "العربية", "हिन्दी", "தமிழ்", "ไทย"),
    *("한국어", "ᄒ", "日本語", "カタカナ", "中文", "𠀀", "𝒳"),
    *("0", "7", "2024", "3.14", "²", "½", "Ⅷ", "㊷", "٣", "३", "５", "𝟘", "〇"),
    *("e\u0301", "\u0301", "\u0489", "\u20dd", "\ufe0f", "\U000e0100", "\u200d", "\u200f", "\u202e", "\xad"),
    *("👩\u200d👩\u200d👧", "👍🏽", "🇺🇳", "1\ufe0f\u20e3", "🏴\U000e0067\U000e0062\U000e007f", "😀"),
    *("!", "...", "=====", "//", "$", "€", "+", "\u2014", "\u201c", "`", "\\", "_", "\x00", "\x07", "\x7f", "\x80"),
    *("\ue000", "\ufffd", "\ufffe", "\uffff", "\u0378", "\U0001ffff", "\U000f0000", "\U0010ffff"),
)


def fast_tokenizer(wish: EncoderName, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the encoder that is wished for; "auto" is gigatoken where it is installed. Takes 0.2 s.

    Raises:
        UsageError: gigatoken is asked for and is not installed, or the tokenizer is not GPT-2's.
    """
    if wish == "tiktoken" or (wish == "auto" and not isinstance(tokenizer, Gpt2Tokenizer)):
        return tokenizer
    if not isinstance(tokenizer, Gpt2Tokenizer):
        raise UsageError(f"--encoder gigatoken is for the gpt2 tokenizer, not for {tokenizer.name}; leave it out.")
    try:
        return ProvenTokenizer(tokenizer)
    except Exception as error:  # an extra of whatever version must not stop the work
        what = f"gigatoken cannot be used ({type(error).__name__}: {error})"
        if wish == "gigatoken":
            mend = 'Run: pip install "regpt2[fast]", or choose --encoder tiktoken.'
            raise UsageError(f"--encoder gigatoken: {what}. {mend}") from None
        if not isinstance(error, ImportError):
            warn(f"{what}; {tokenizer.encoder} is.")
        return tokenizer


class ProvenTokenizer(Tokenizer):
    """GPT-2's tokenizer with gigatoken as its encoder, until gigatoken is seen to give another id."""

    name = Gpt2Tokenizer.name
    vocab_size = Gpt2Tokenizer.vocab_size
    eot = Gpt2Tokenizer.eot
    start_id = Gpt2Tokenizer.start_id
    fingerprint = Gpt2Tokenizer.fingerprint

    def __init__(self, reference: Gpt2Tokenizer) -> None:
        super().__init__(reference.id_bytes)
        self._reference = reference
        self._encode = _gigatoken(self.id_bytes[: self.eot])
        self.encoder = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self._cached_tokens = 0
        self._n_to_compare = ODD_STRINGS
        for text in odd_strings():
            self.encode_to_numpy(text)
        self._n_to_compare = FIRST_DOCUMENTS

    def last_split(self, text: str) -> int:
        return last_sure_split(text)

    def new_part(self) -> None:
        self._n_to_compare = max(self._n_to_compare, PART_DOCUMENTS)

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        return self.encode_utf8(valid_text(text).encode())

    def encode_utf8(self, data: bytes) -> npt.NDArray[np.uint16]:
        if self.encoder == self._reference.encoder or _has_new(data):
            return self._reference.encode_utf8(data)
        ids = self._encode(data)
        if self._n_to_compare:
            self._n_to_compare -= 1
            expected = self._reference.encode_utf8(data)
            if not np.array_equal(ids, expected):
                warn(f"{self.encoder} does not give the ids of {self._reference.encoder}, which is used from now on.")
                self.encoder = self._reference.encoder
            return expected
        self._cached_tokens += len(ids)
        if self._cached_tokens > CACHE_TOKENS:
            self._encode, self._cached_tokens = _gigatoken(self.id_bytes[: self.eot]), 0
        return ids.astype(np.uint16)  # from uint32; every id is below 50257


def _has_new(data: bytes) -> bool:
    # Most text has none of the bytes that their UTF-8 begins with.
    return (b"\xe0" in data or b"\xea" in data or b"\xf0" in data) and _NEW.search(data.decode()) is not None


def odd_strings() -> list[str]:
    """The same strings every time: odd things side by side, and how each of many characters is classified."""
    choice = random.Random(0).choice
    mixed = ["".join(choice(_ODD) for _ in range(n % 20)) for n in range(ODD_STRINGS // 2)]
    # The planes with letters. "'re" is split off from a letter or number, the two spaces from one that is no space.
    characters = (chr(choice(range(0x34000))) for _ in range(ODD_STRINGS // 2))
    return mixed + [f"{character}'re  {character}b" for character in characters]


def _gigatoken(pieces: list[bytes]) -> Callable[[bytes], npt.NDArray[np.uint32]]:
    """gigatoken's encoder for the bytes of ids 0, 1, 2, ... It has no special tokens: it would find them in text."""
    import gigatoken  # noqa: PLC0415  (an extra)

    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder, "ranks.tiktoken")
        ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), n) for n, piece in enumerate(pieces)))
        encode: Callable[[bytes], npt.NDArray[np.uint32]] = gigatoken.Tokenizer.from_tiktoken(ranks, "gpt2", {}).encode
    return encode
