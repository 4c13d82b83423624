"""What a data set entry promises: a source in, a plan of parts out; then a part in, its documents out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regpt2.base.console import safe_text
from regpt2.base.files import sha256_bytes
from regpt2.data.chat_template import Message

PART_BYTES = 2 << 20  # of text, about: a worker's task, 0.1 s of work with tiktoken
LARGE_BYTES, LARGE_PART_BYTES = 1 << 30, 8 << 20  # so much text makes enough larger tasks, which cost less each


@dataclass(frozen=True)
class Source:
    """What the user asks for. Each entry has its own defaults."""

    input: Path | None = None
    field: str = "text"
    repo: str = ""
    """A data set's id on the Hugging Face hub, "owner/name"."""
    config: str = ""
    split: str = ""
    revision: str = ""
    first: int | None = None
    suffixes: tuple[str, ...] = ()
    """Which files of a folder of one's own to read, as ".py"; empty: those that text_files reads by default."""
    options: Any = None
    """The entry's own `Options`, if it has any."""


_MOST_CHARACTERS = 300  # kept of where something was met first: names come from strangers


class Skipped(Counter[str]):
    """What was left out or repaired: how often for each reason, and in `first` the file where each was met first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}
        self.file = ""

    def add(self, reason: str, where: str = "") -> None:
        """Count one more. `where` is the place, if it is not `file` alone."""
        self[reason] += 1
        if place := where or self.file:
            self.first.setdefault(reason, safe_text(place)[:_MOST_CHARACTERS])

    def include(self, counts: Mapping[str, int], first: Mapping[str, str]) -> None:
        self.update(counts)
        self.first = {**first, **self.first}


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the work was planned. `name` is relative to the input and says nothing of the machine."""

    path: str
    """Empty for a file to download: a worker fetches it from `url` and removes it when it has read it."""
    name: str
    n_bytes: int
    mtime_ns: int
    url: str = ""
    digest: str = ""
    """What the publisher says of its content: SHA-256 (64 hex digits) or git's blob SHA-1 (40); empty if nothing."""


@dataclass(frozen=True)
class Slice:
    """A stretch [start, stop) of a file in the entry's own unit (bytes, pieces, row groups); None is to the end."""

    file: InputFile
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Part:
    """A worker's task. `n_bytes` is its amount of text, estimated from sizes."""

    slices: tuple[Slice, ...]
    n_bytes: int
    field: str = "text"
    options: Any = None
    """The entry's own, once a worker reads the part."""


@dataclass(frozen=True)
class Plan:
    """All parts of a data set in their order. `source` and `revision` go into the manifest and name the exact input."""

    parts: tuple[Part, ...]
    source: str
    revision: str
    skipped: Skipped = field(default_factory=Skipped)
    n_tokens: int = 0
    """GPT-2 tokens by the publisher's own count; 0 if unknown."""
    val_tokens: int = 0
    """The first N tokens are the validation split, unless the user chooses one; 0: a share of the documents."""

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def is_local(self) -> bool:
        """Its files are on this machine, where somebody may change them; published ones have digests."""
        return any(piece.file.path for part in self.parts for piece in part.slices)

    @property
    def fingerprint(self) -> str:
        """Changes when a file's name, size or time of change does, or the way that files are cut into parts."""
        digest = hashlib.sha256(f"{self.source}\n{self.revision}\n".encode())
        for number, part in enumerate(self.parts):
            for s in part.slices:
                f = s.file
                line = f"{number} {part.field} {f.name} {f.n_bytes} {f.digest or f.mtime_ns} {s.start} {s.stop}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Document:
    """One text. `split` where the data set itself says it; `piece` where it is the n-th piece of a long text."""

    text: str
    split: str | None = None
    piece: int | None = None
    messages: tuple[Message, ...] = ()
    """If it is a conversation: what `text` is rendered from, without the end of text in front."""

    def split_for(self, val_fraction: float, digest: bytes) -> str:
        """ "train" or "val": as the data set says, else by the number of the piece, else by the content.

        Of every k = round(1 / val_fraction) pieces the sixth goes to validation (the last, where k is below six).
        By content means by `digest`, the SHA-256 of the text, so that equal documents are never on both sides.
        """
        if self.split is not None:
            return self.split
        if self.piece is not None:
            every = round(1 / val_fraction)
            return "val" if self.piece % every == min(5, every - 1) else "train"
        return "val" if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else "train"


@dataclass(frozen=True)
class Wanted:
    """What a record's field should hold: a value of `kind`, of which `read` makes a document."""

    kind: type
    what: str
    """The kind in words, to follow "is not"."""
    read: Callable[[Any], "Document | str"]
    """Gives a string, to follow "whose field 'x'", where the value makes no document."""


TEXT = Wanted(str, "text", Document)


def input_file(path: Path, name: str) -> InputFile:
    status = path.stat()
    return InputFile(str(path), name, status.st_size, status.st_mtime_ns)


def revision_of(files: Iterable[InputFile]) -> str:
    """SHA-256 over the names and sizes of files: the same for a copy of them elsewhere."""
    lines = "".join(f"{file.name} {file.n_bytes}\n" for file in files)
    return sha256_bytes(lines.encode(errors="surrogateescape"))


def group(sized_slices: Iterable[tuple[Slice, int]], field: str = "text") -> tuple[Part, ...]:
    """Slices with their bytes of text to parts of about PART_BYTES: many small files make one part."""
    sized = list(sized_slices)
    part_bytes = LARGE_PART_BYTES if sum(n_bytes for _, n_bytes in sized) >= LARGE_BYTES else PART_BYTES
    parts: list[Part] = []
    slices: list[Slice] = []
    n_bytes = 0
    for piece, piece_bytes in sized:
        if slices and (slices[-1].file, slices[-1].stop) == (piece.file, piece.start):
            slices[-1] = replace(slices[-1], stop=piece.stop)
        else:
            slices.append(piece)
        n_bytes += piece_bytes
        if n_bytes >= part_bytes:
            parts.append(Part(tuple(slices), n_bytes, field))
            slices, n_bytes = [], 0
    if slices:
        parts.append(Part(tuple(slices), n_bytes, field))
    return tuple(parts)
