"""A part becomes tokens: planned slices of text in, `.parts/000042.{train,val}.bin` and `000042.json` out.

The JSON is written last, so a part is there completely or not at all, whenever the process is killed.
"""

import json
import multiprocessing
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from regpt2.base import plugins
from regpt2.base.files import atomic_file, write_atomic
from regpt2.data.documents import Part
from regpt2.data.manifest import SPLITS
from regpt2.data.tokenizer import Tokenizer, load_tokenizer, valid_text

BUFFER_TOKENS = 1 << 20

PARTS_NAME = ".parts"


@dataclass(frozen=True)
class Job:
    """What every worker of one preparation needs to know."""

    dataset: str
    tokenizer: str
    vocab: Path | None
    val_fraction: float
    folder: Path  # where the parts go

    def start(self) -> "PartEncoder":
        """Make ready to work: load the entry and the tokenizer, once per process."""
        return PartEncoder(self, load_tokenizer(self.tokenizer, self.vocab))


@dataclass
class Tally:
    """Amounts of one split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, other: "Tally") -> None:
        """Add the other's amounts to these."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes


@dataclass(frozen=True)
class PartResult:
    """What a finished part holds."""

    splits: dict[str, Tally]
    skipped: dict[str, int]

    @classmethod
    def read(cls, folder: Path, index: int) -> "PartResult | None":
        """The result of a part; None while it is not finished."""
        try:
            content = json.loads((folder / f"{index:06d}.json").read_text(encoding="utf-8"))
            return cls({name: Tally(**content["splits"][name]) for name in SPLITS}, content["skipped"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


class PartEncoder:
    """Reads and tokenizes parts; calling it with an index and its part writes that part's files."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.entry = plugins.load("data.datasets", job.dataset)

    def __call__(self, task: tuple[int, Part]) -> None:
        index, part = task
        skipped: Counter[str] = Counter()
        with ExitStack() as stack:
            outputs = {
                name: _TokenFileWriter(stack.enter_context(atomic_file(part_file(self.job.folder, index, name))))
                for name in SPLITS
            }
            for document in self.entry.documents(part, skipped):
                text = valid_text(document.text)
                if text != document.text:
                    skipped["documents kept with half surrogate pairs replaced"] += 1
                if not text.strip():
                    skipped["documents empty"] += 1
                    continue
                output = outputs[replace(document, text=text).split_for(self.job.val_fraction)]
                output.add(self.tokenizer.eot, self.tokenizer.encode_to_numpy(text), len(text.encode()))
            for output in outputs.values():
                output.flush()
        result = PartResult({name: output.tally for name, output in outputs.items()}, dict(sorted(skipped.items())))
        write_atomic(self.job.folder / f"{index:06d}.json", json.dumps(asdict(result), ensure_ascii=False))


class _TokenFileWriter:
    """Collects documents and writes them in large pieces, so that memory does not grow with the part."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tally = Tally()
        self._file = file
        self._pieces: list[npt.NDArray[np.uint16]] = []
        self._n_waiting = 0

    def add(self, eot: int, tokens: npt.NDArray[np.uint16], text_bytes: int) -> None:
        self._pieces += [np.array([eot], dtype=np.uint16), tokens]
        self._n_waiting += 1 + len(tokens)
        self.tally.add(Tally(1, 1 + len(tokens), text_bytes))
        if self._n_waiting >= BUFFER_TOKENS:
            self.flush()
            _stop_if_orphaned()

    def flush(self) -> None:
        if self._pieces:
            self._file.write(np.concatenate(self._pieces).astype("<u2", copy=False).tobytes())
        self._pieces, self._n_waiting = [], 0


def part_file(folder: Path, index: int, split: str) -> Path:
    """Where the tokens of one split of a part lie: plain uint16, no header."""
    return folder / f"{index:06d}.{split}.bin"


def _stop_if_orphaned() -> None:
    """End a worker whose command was killed; otherwise one would work on through a long compressed file."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)
