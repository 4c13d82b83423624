"""A part becomes tokens: planned slices of text in, `.parts/000042.{train,val}.bin` and `000042.json` out.

Conversations also get `000042.{train,val}.mask`, a byte for each token: whether it counts in the loss.
The JSON is written last, so a part is complete or does not exist, whenever the process is killed.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from regpt2.base import shelves
from regpt2.base.errors import DataError
from regpt2.base.files import atomic_file, write_atomic
from regpt2.base.net.download import fetch
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import encode
from regpt2.data.fast_tokenizer import EncoderName, fast_tokenizer
from regpt2.data.preparing.hold_out import Digests, HoldOut, end_for_validation
from regpt2.data.preparing.workers import Report
from regpt2.data.sources.filters import Filters
from regpt2.data.sources.plan import Document, InputFile, Part, Skipped
from regpt2.data.sources.text_stream import COMPRESSED
from regpt2.data.tokenizer import Tokenizer, load_tokenizer, valid_text
from regpt2.data.tokens.manifest import MASK_SUFFIX, SPLITS
from regpt2.data.tokens.masks import Mask
from regpt2.data.tokens.writing import Tally

PARTS_NAME = ".parts"
BUFFER_TOKENS = 1 << 20
REPORT_BYTES = 8 << 20  # between reports of progress within a part

DOCUMENT_TABLE = np.dtype([("hash", "<u8"), ("tokens", "<u4"), ("text_bytes", "<u4"), ("is_val", "?")])


@dataclass(frozen=True)
class EncodeJob:
    """What every worker of one preparation needs to know."""

    dataset: str
    tokenizer: str
    vocab: Path | None
    encoder: EncoderName
    val_fraction: float | None
    """None: one stream of documents, whose first tokens become the validation split later."""
    filters: Filters
    dedup: bool
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    """The data set's own."""
    plugins: list[str] = field(default_factory=shelves.plugin_files)
    hold_out: HoldOut = field(default_factory=HoldOut)
    """The document to hold out instead of by `val_fraction`, where that left a split empty."""

    def start(self) -> "PartEncoder":
        """Make ready to work: load the entry and the tokenizer, once per process."""
        shelves.use_plugins(self.plugins)
        return PartEncoder(self, fast_tokenizer(self.encoder, load_tokenizer(self.tokenizer, self.vocab)))


@dataclass(frozen=True)
class PartResult:
    """What a finished part holds, and which encoder made its ids."""

    splits: dict[str, Tally]
    skipped: dict[str, int]
    encoder: str
    first_skipped: dict[str, str] = field(default_factory=dict)
    """For each reason in `skipped` the first file with it."""
    digests: Digests = field(default_factory=Digests)
    """Of the documents without a split of their own; not of all, where both splits have some."""

    @classmethod
    def read(cls, folder: Path, index: int) -> "PartResult | None":
        """The result of a part; None while it is not finished."""
        try:
            content = json.loads((folder / f"{index:06d}.json").read_text(encoding="utf-8"))
            tallies = {name: Tally(**content["splits"][name]) for name in SPLITS}
            first_skipped, digests = content.get("first_skipped", {}), Digests(**content.get("digests", {}))
            return cls(tallies, content["skipped"], content["encoder"], first_skipped, digests)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


class PartEncoder:
    """Reads and tokenizes parts; calling it with an index and its part writes that part's files."""

    def __init__(self, job: EncodeJob, tokenizer: Tokenizer) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.entry = shelves.load("data.datasets", job.dataset)
        self.options = self.entry.Options(**job.options) if job.options else None
        self.added = added_tokens(self.entry)
        self.chat_tokenizer = AddedTokens(tokenizer, self.added) if self.added else None

    def __call__(self, task: tuple[int, Part], report: Report) -> None:
        index, planned = task
        folder, skipped = self.job.folder, Skipped()
        progress = _Progress(planned, report)
        self.tokenizer.new_part()
        with local_copies(planned, folder, index, progress.downloaded) as part, ExitStack() as stack:
            outputs = {name: self._open(part_file(folder, index, name), stack) for name in SPLITS}
            rows: list[tuple[int, int, int, bool]] = []
            digests = Digests()
            for document in self.entry.documents(replace(part, options=self.options), skipped):
                text, data = _valid(document.text, skipped)
                if (reason := "documents empty" if not text.strip() else self.job.filters.reason(text)) is not None:
                    skipped.add(reason)
                    continue
                has_both = all(output.tally.documents for output in outputs.values())
                digest, split = self._digest_and_split(document, data, needs_digest=not has_both)
                if digest and document.split is None:
                    digests.include(Digests.of(document, digest, len(data), skipped.file))
                for piece in self._pieces(document, text, data, digest, split):
                    outputs[piece.split].add(self.tokenizer.start_id, piece.ids, piece.n_bytes, piece.counted)
                    progress.encoded(piece.n_bytes)
                    if self.job.dedup:
                        rows.append(piece.row)
            for output in outputs.values():
                output.flush()
        if self.job.dedup:
            write_atomic(table_file(folder, index), np.array(rows, dtype=DOCUMENT_TABLE).tobytes())
        tallies = {name: output.tally for name, output in outputs.items()}
        counts = dict(sorted(skipped.items()))
        result = PartResult(tallies, counts, self.tokenizer.encoder, skipped.first, digests)
        write_atomic(folder / f"{index:06d}.json", json.dumps(asdict(result), ensure_ascii=False))
        progress.finished()

    def _open(self, path: Path, stack: ExitStack) -> "_TokenFileWriter":
        masks = stack.enter_context(atomic_file(path.with_suffix(MASK_SUFFIX))) if self.added else None
        return _TokenFileWriter(stack.enter_context(atomic_file(path)), masks)

    def _digest_and_split(self, document: Document, data: bytes, *, needs_digest: bool) -> tuple[bytes, str]:
        val_fraction, held_out = self.job.val_fraction, self.job.hold_out.digest
        by_content = val_fraction is not None and document.split is None
        by_content = by_content and (document.piece is None or needs_digest or bool(held_out))
        digest = hashlib.sha256(data).digest() if self.job.dedup or by_content else b""
        if held_out and document.split is None:
            return digest, "val" if digest.hex() == held_out else "train"
        if val_fraction is not None:
            return digest, document.split_for(val_fraction, digest)
        if document.split is not None:
            raise DataError(f"{self.job.dataset} has a validation split of its own; leave out --val-tokens.")
        return digest, "train"

    def _pieces(self, document: Document, text: str, data: bytes, digest: bytes, split: str) -> list["_Encoded"]:
        """The document encoded; in two where its end alone is held out."""
        cut = self.job.hold_out.cut and split == "val"
        if self.chat_tokenizer is not None:
            if cut:
                raise DataError("all conversations are equal, so none can be held out for validation; add others.")
            return [_Encoded(split, digest, len(data), *encode(document.messages, self.chat_tokenizer))]
        ids = self.tokenizer.encode_utf8(data)
        if not cut:
            return [_Encoded(split, digest, len(data), ids)]
        halves = end_for_validation(text, ids, self.tokenizer, self.job.val_fraction or 0)
        if halves is None:
            raise DataError("the only document is one character, which cannot be training and validation; add text.")
        return [
            # The name of the split in the digest, so that equal halves are no copies of each other.
            _Encoded(name, hashlib.sha256(name.encode() + half).digest(), len(half), self.tokenizer.encode_utf8(half))
            for name, half in zip(SPLITS, map(str.encode, halves), strict=True)
        ]


@dataclass(frozen=True)
class _Encoded:
    """A document, or a part of the only one, in ids."""

    split: str
    digest: bytes
    n_bytes: int
    ids: npt.NDArray[np.uint16]
    counted: Mask | None = None
    """Of a conversation: which ids count in the loss."""

    @property
    def row(self) -> tuple[int, int, int, bool]:
        """As DOCUMENT_TABLE has it."""
        return int.from_bytes(self.digest[:8], "little"), 1 + len(self.ids), self.n_bytes, self.split == "val"


@contextmanager
def local_copies(part: Part, folder: Path, index: int, on_bytes: Report) -> Iterator[Part]:
    """The part with its remote files downloaded; they are removed from the disk when it has been read."""
    copies: dict[str, InputFile] = {}
    for n, file in enumerate({piece.file.name: piece.file for piece in part.slices}.values()):
        if not file.path:
            path = raw_file(folder, index, n, file.name)
            fetch(file.url, path, n_bytes=file.n_bytes, digest=file.digest, on_bytes=on_bytes)
            copies[file.name] = replace(file, path=str(path), mtime_ns=path.stat().st_mtime_ns)
    slices = tuple(replace(piece, file=copies.get(piece.file.name, piece.file)) for piece in part.slices)
    yield replace(part, slices=slices)
    for copy in copies.values():
        os.unlink(copy.path)


def forget_copies(folder: Path, is_finished: Callable[[int], bool]) -> None:
    """Remove downloads of finished parts that a kill left behind."""
    for path in folder.glob("raw-*"):
        if is_finished(int(path.name.split("-")[1])):
            path.unlink()


def part_file(folder: Path, index: int, split: str) -> Path:
    """Where the tokens of one split of a part lie: plain uint16, no header."""
    return folder / f"{index:06d}.{split}.bin"


def added_tokens(entry: object) -> tuple[str, ...]:
    """The texts that a data set entry adds to the vocabulary; then it gives conversations, which have masks."""
    return tuple(getattr(entry, "ADDED_TOKENS", ()))


def table_file(folder: Path, index: int) -> Path:
    """Where a row for each document of a part lies (DOCUMENT_TABLE), if copies are to be left out."""
    return folder / f"{index:06d}.documents"


def raw_file(folder: Path, index: int, n: int, name: str) -> Path:
    """Where the n-th fetched file of a part lies while it is read."""
    packed = next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), "")
    return folder / f"raw-{index:06d}-{n}{packed}"


def _valid(text: str, skipped: Skipped) -> tuple[str, bytes]:
    """The text and its UTF-8; half surrogate pairs are replaced and counted."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        skipped.add("documents kept with half surrogate pairs replaced")
        text = valid_text(text)
        return text, text.encode()


class _Progress:
    """Progress of one part, in its planned bytes. Of files to download, half of them count for the download."""

    def __init__(self, part: Part, report: Report) -> None:
        files = {piece.file.name: piece.file for piece in part.slices}.values()
        to_download = sum(file.n_bytes for file in files if not file.path)
        self._per_downloaded = part.n_bytes / 2 / max(1, to_download)
        self._per_encoded = 0.5 if to_download else 1.0
        self._planned, self._done, self._reported, self._report = part.n_bytes, 0.0, 0, report

    def downloaded(self, n_bytes: int) -> None:
        self._advance(n_bytes * self._per_downloaded)

    def encoded(self, n_bytes: int) -> None:
        self._advance(n_bytes * self._per_encoded)

    def finished(self) -> None:
        """Report the rest of the plan, whatever the text's real size was."""
        self._report(self._planned - self._reported)

    def _advance(self, amount: float) -> None:
        self._done = min(self._done + amount, self._planned)
        if abs(self._done - self._reported) >= REPORT_BYTES:
            self._report(int(self._done) - self._reported)
            self._reported = int(self._done)


class _TokenFileWriter:
    """Collects documents and writes them in large pieces, so that memory does not grow with the part."""

    def __init__(self, file: IO[bytes], masks: IO[bytes] | None) -> None:
        self.tally = Tally()
        self._file, self._masks = file, masks
        self._waiting: list[npt.NDArray[np.uint16]] = []
        self._masks_waiting: list[Mask] = []
        self._n_waiting = 0

    def add(self, eot: int, ids: npt.NDArray[np.uint16], text_bytes: int, counted: Mask | None) -> None:
        self._waiting += [np.array([eot], dtype=np.uint16), ids]
        if counted is not None:
            self._masks_waiting += [np.zeros(1, dtype=np.bool_), counted]  # nobody writes the end of text in a chat
        self._n_waiting += 1 + len(ids)
        self.tally.add(Tally(1, 1 + len(ids), text_bytes))
        if self._n_waiting > BUFFER_TOKENS:
            self.flush()
            _stop_if_orphaned()

    def flush(self) -> None:
        if self._waiting:
            self._file.write(np.concatenate(self._waiting).astype("<u2", copy=False).tobytes())
        if self._masks is not None and self._masks_waiting:
            self._masks.write(np.concatenate(self._masks_waiting).astype(np.uint8).tobytes())
        self._waiting, self._masks_waiting, self._n_waiting = [], [], 0


def _stop_if_orphaned() -> None:
    """End a worker whose command was killed; otherwise one would work on through a long compressed file."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)
