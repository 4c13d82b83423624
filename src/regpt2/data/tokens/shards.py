"""Shards: token ids in files. In: ids, a folder; out: files in the llm.c format, and a stream of ids to read from.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) and then its tokens as little-endian uint16.
`{dataset}_{split}_{index:06d}.bin` in order make up a split; a document may continue in the next shard.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from regpt2.base.errors import DataError
from regpt2.base.files import atomic_file, sha256_bytes, sha256_file
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.characters import META_NAME, CharacterTokenizer, read_meta
from regpt2.data.tokenizer import OWN, OWN_FILE, VOCAB_BYTES, VOCAB_SHA256, Tokenizer, load_tokenizer
from regpt2.data.tokens.manifest import HEADER_BYTES, MANIFEST_NAME, SPLITS, TOKEN_BYTES, Manifest, Shard
from regpt2.data.tokens.masks import Mask, as_mask, open_mask, verify_mask
from regpt2.data.tokens.other_formats import (
    MAGIC,
    MEND,
    VERSION,
    TokenFile,
    expect_bytes,
    foreign_dataset,
    foreign_files,
    regular_file_bytes,
    token_file,
)

LEDGER_NAME = ".prepare.json"  # there while a preparation is unfinished
MAX_OPEN_FILES = 128  # shells allow 256 (macOS) or 1024; further files are opened for each read
GPT2_VOCAB_SIZE, GPT2_EOT = 50257, 50256  # what a foreign folder is taken to hold


def shard_name(dataset: str, split: str, index: int) -> str:
    """The file name of a shard; names sort in the order of their tokens."""
    return f"{dataset}_{split}_{index:06d}.bin"


def write_shard(path: Path, n_tokens: int, pieces: Iterable[npt.NDArray[np.uint16]]) -> Shard:
    """Write one shard of `n_tokens`, given in pieces. It appears under its name when it is whole and on disk."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    digest, written = hashlib.sha256(header.tobytes()), 0
    with atomic_file(path) as file:
        file.write(header.tobytes())
        for piece in pieces:
            data = piece.astype("<u2", copy=False).tobytes()
            digest.update(data)
            file.write(data)
            written += len(piece)
        assert written == n_tokens, f"{path.name}: {written} tokens written, {n_tokens} announced"
    return Shard(path.name, n_tokens, HEADER_BYTES + TOKEN_BYTES * n_tokens, digest.hexdigest())


@dataclass(eq=False)
class TokenStream(AbstractContextManager["TokenStream"]):
    """The tokens of one split, as one long row across its files. Many threads may read from it at once.

    `vocab_size`, `tokenizer_fingerprint` and `dataset` are what the folder states; `characters` has the character of
    each id, if ids are characters; `added` the special tokens beyond the tokenizer's vocabulary; `masks` a file of each
    token file, which says what counts in the loss, or nothing if all does. `note`, unless empty, is for the user to
    read. Files are read, never memory-mapped: a mapped file that shrinks kills the process.
    """

    files: list[TokenFile]
    fingerprint: str
    tokenizer_name: str
    tokenizer_fingerprint: str | None
    vocab_size: int | None
    dataset: str | None = None
    characters: str | None = None
    note: str = ""
    vocab: Path | None = None
    """The `vocab.bpe` of a tokenizer of one's own, in the folder."""
    added: tuple[str, ...] = ()
    masks: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        self._ends = list(accumulate(file.n_tokens for file in self.files))
        self.n_tokens = self._ends[-1]
        self._handles: dict[Path, IO[bytes]] = {}
        self._lock = threading.Lock()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this name, and the added tokens. The caller compares its fingerprint with the stream's.

        Raises:
            Problem: no tokenizer has this name, or its vocabulary cannot be found.
        """
        if self.characters is not None:
            return CharacterTokenizer(self.characters)
        base = load_tokenizer(self.tokenizer_name, self.vocab)
        return AddedTokens(base, self.added) if self.added else base

    def read(self, start: int, count: int) -> npt.NDArray[np.uint16]:
        """Tokens [start, start + count), across files where need be.

        Raises:
            DataError: a file has become shorter, or holds an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise ValueError(f"tokens [{start}, {start + count}) of a stream of {self.n_tokens}")
        tokens, filled = np.empty(count, dtype=np.uint16), 0
        while filled < count:
            index, first = self.place(start + filled)
            wanted = min(count - filled, self.files[index].n_tokens - first)
            tokens[filled : filled + wanted] = self._read_file(index, first, wanted)
            filled += wanted
        return tokens

    def read_mask(self, start: int, count: int) -> Mask:
        """Which of the tokens [start, start + count) count in the loss.

        Raises:
            DataError: a mask has become shorter, or is none.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise ValueError(f"tokens [{start}, {start + count}) of a stream of {self.n_tokens}")
        counted, filled = np.ones(count, dtype=np.bool_), 0 if self.masks else count
        while filled < count:
            index, first = self.place(start + filled)
            wanted = min(count - filled, self.files[index].n_tokens - first)
            path = self.masks[index]
            data = self._read_bytes(path, first, wanted)
            if len(data) != wanted:
                raise DataError(f"{path} ended early, at token {first + len(data):,}: truncated; {MEND}.")
            counted[filled : filled + wanted] = as_mask(path, data)
            filled += wanted
        return counted

    def place(self, position: int) -> tuple[int, int]:
        """The number of the file that holds a token, and the token's place in it."""
        index = bisect_right(self._ends, position)
        return index, position - (self._ends[index] - self.files[index].n_tokens)

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_file(self, index: int, first: int, count: int) -> npt.NDArray[np.uint16]:
        file = self.files[index]
        data = self._read_bytes(file.path, file.offset + file.width * first, file.width * count)
        if len(data) != file.width * count:
            raise DataError(
                f"{file.path} ended {file.width * count - len(data):,} bytes early, at token "
                f"{first + len(data) // file.width:,} of {file.n_tokens:,}: truncated; prepare the folder again."
            )
        tokens = np.frombuffer(data, dtype=f"<u{file.width}")
        n_ids = self.vocab_size or 1 << 16
        if count and tokens.max() >= n_ids:
            bad = int(np.argmax(tokens >= n_ids))
            raise DataError(
                f"{file.path} holds id {tokens[bad]} at token {first + bad:,}, outside the vocabulary of "
                f"{n_ids:,} ({self.tokenizer_name}); prepare the folder again."
            )
        return tokens.astype(np.uint16, copy=False)

    def _read_bytes(self, path: Path, offset: int, count: int) -> bytes:
        with self._lock:
            handle = self._handles.get(path)
            if handle is None and len(self._handles) < MAX_OPEN_FILES:
                handle = self._handles[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        if handle is not None:
            return self._read_at(handle, offset, count)
        with open(path, "rb", buffering=0) as own:
            return self._read_at(own, offset, count)

    def _read_at(self, handle: IO[bytes], offset: int, count: int) -> bytes:
        pieces = []
        while count:
            if hasattr(os, "pread"):
                piece = os.pread(handle.fileno(), count, offset)
            else:  # Windows
                with self._lock:
                    handle.seek(offset)
                    piece = handle.read(count)
            if not piece:
                break
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
        return b"".join(pieces)


def open_tokens(folder: Path, split: str) -> TokenStream:
    """The tokens of a split ("train" or "val") of a prepared folder, or of one that another project made.

    The size of every file is checked here against its header and the manifest; `verify` checks the content.

    Raises:
        DataError: no folder, no such split, or a file missing, truncated or grown.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such data folder; make it with `regpt2 prepare DATASET --out {folder}`."
        )
    if (folder / MANIFEST_NAME).exists():
        return _open_native(folder, split)
    if (folder / LEDGER_NAME).exists():
        raise DataError(f"{folder}: its preparation is not finished; run the same `regpt2 prepare` command again.")
    return _open_foreign(folder, split)


def _open_foreign(folder: Path, split: str) -> TokenStream:
    questions: list[str] = []
    files = foreign_files(folder, split, questions)
    aside = f" {', '.join(questions)} is left out: it holds an evaluation's questions, no tokens." if questions else ""
    if not sum(file.n_tokens for file in files):
        mend = f"make them with `regpt2 prepare DATASET --out {folder}`"
        if split == "val" and foreign_files(folder, "train"):
            mend = f"`regpt2 reshard {folder} OUT --to native --val-tokens N` takes the first N of train"
        raise DataError(
            f"{folder}: no {split} tokens here (no manifest.json, no *_{split}_*.bin, *{split}*.npy, {split}.bin, "
            f"*{split}*.idx or *{split}*.ds); {mend}.{aside}"
        )
    own: Tokenizer | None = read_meta(folder / META_NAME) if (folder / META_NAME).exists() else _own(folder)
    what, eot = ("taken to be GPT-2's", GPT2_EOT) if own is None else (f"those of its {OWN_FILE}", own.eot)
    if own is not None and own.characters is not None:
        what = f"the {own.vocab_size:,} characters of its {META_NAME}"
    note = f"{folder} has no manifest.json: its tokens are {what}, and its content cannot be verified."
    if eot is not None and files[-1].whole_documents and files[-1].last_token() not in (eot, None):
        note += " No end of text separates its documents: they run together."
    lines = [f"{file.path.name} {file.n_tokens}" for file in files] + ([own.fingerprint] if own else [])
    return TokenStream(
        files,
        fingerprint=sha256_bytes("\n".join(lines).encode()),
        tokenizer_name=own.name if own else "gpt2",
        tokenizer_fingerprint=own.fingerprint if own else None,
        vocab_size=own.vocab_size if own else GPT2_VOCAB_SIZE,
        dataset=None if own else foreign_dataset(files),
        characters=own.characters if own else None,
        note=note + aside,
        vocab=folder / OWN_FILE if own and own.vocab is not None else None,
    )


def _own(folder: Path) -> Tokenizer | None:
    """A byte-pair encoding of one's own, if its `vocab.bpe` lies beside the tokens and is not GPT-2's."""
    path = folder / OWN_FILE
    if not path.is_file() or (path.stat().st_size == VOCAB_BYTES and sha256_file(path) == VOCAB_SHA256):
        return None
    return load_tokenizer(OWN, path)


def verify(folder: Path, on_bytes: Callable[[int], object] | None = None, *, part: int = 0, of: int = 1) -> list[str]:
    """Compare every shard with the SHA-256 in the manifest; a message for each bad one, none if all is well.

    `on_bytes` gets the progress. Several processes can share the work: each takes one `part` of `of`. Of a folder
    without a manifest only sizes can be checked.
    """
    if not (folder / MANIFEST_NAME).exists():
        for split in SPLITS:
            foreign_files(folder, split)
        return []
    bad = []
    for shard in Manifest.read(folder).shards[part::of]:
        try:
            verify_shard(folder, shard, on_bytes)
        except DataError as error:
            bad.append(str(error))
    return bad


def check_vocabulary(folder: Path, manifest: Manifest) -> str:
    """Compare the `vocab.bpe` of a tokenizer of one's own with the manifest; returns its SHA-256.

    Raises:
        DataError: it is missing, or another.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        raise DataError(
            f"{path} is missing: it holds the tokenizer's merges. Copy it from a folder that was made with the same "
            "tokenizer, or prepare the folder again."
        )
    if (got := sha256_file(path)) != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{path} has SHA-256 {got}, expected {manifest.tokenizer_fingerprint}: damaged, or of another tokenizer; "
            "prepare the folder again."
        )
    return got


def verify_shard(folder: Path, shard: Shard, on_bytes: Callable[[int], object] | None = None) -> None:
    """Compare one shard, and its mask if it has one, with its entry in the manifest.

    Raises:
        DataError: it is missing, or differs in size or SHA-256.
    """
    path = folder / shard.file
    expect_bytes(path, regular_file_bytes(path), HEADER_BYTES, shard.tokens)
    got = sha256_file(path, on_bytes)
    if got != shard.sha256:
        raise DataError(f"{path} has SHA-256 {got}, expected {shard.sha256}: damaged; prepare the folder again.")
    verify_mask(folder, shard, on_bytes)


def _open_native(folder: Path, split: str) -> TokenStream:
    manifest = Manifest.read(folder)
    if split not in manifest.splits or not manifest.splits[split].shards:
        raise DataError(f"{folder}: no {split} split; it has: {', '.join(manifest.splits) or 'none'}.")
    if manifest.tokenizer == OWN:
        check_vocabulary(folder, manifest)
    files, masks = [], []
    for shard in manifest.splits[split].shards:
        path = folder / shard.file
        expect_bytes(path, regular_file_bytes(path), HEADER_BYTES, shard.tokens)
        file = token_file(path)
        if (file.offset, file.n_tokens) != (HEADER_BYTES, shard.tokens):
            raise DataError(f"{path}: its header does not say {shard.tokens:,} tokens; prepare the folder again.")
        files.append(file)
        masks.append(open_mask(folder, shard))
    return TokenStream(
        files,
        fingerprint=manifest.fingerprint,
        tokenizer_name=manifest.tokenizer,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        vocab_size=manifest.vocab_size,
        dataset=manifest.dataset,
        characters=manifest.characters,
        vocab=folder / OWN_FILE if manifest.tokenizer == OWN else None,
        added=manifest.added,
        masks=tuple(path for path in masks if path is not None),
    )
