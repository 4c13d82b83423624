"""A chapter of the guide. In: its Markdown; out: blocks in their order, and the Markdown again.

What a chapter may hold, beside text:

    ```python               runs, in one namespace for the whole chapter
    ```bash                 runs, command by command, in the chapter's own folder
    ```text                 below one of these: what it printed
    ![...](images/a.png)    below a python block: the figure that it drew
    <!-- source: model/gpt.py: GPT.forward -->      the python block below is quoted from the source, and does not run
    <!-- write: forward.c -->                       the block below is written into this file
    <!-- not run: a network -->                     the block below does not run, because it needs this
    <!-- within 2% -->                              the numbers of the output below may differ by so much
    <!-- varies -->                                 the output below is another one each time: a time, a speed
    <!-- fails -->                                  the block below raises an error; its last line is the output
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "guide"
FENCE = re.compile(r"```(\w*)$")
MARK = re.compile(r"<!-- (source|write|not run|within|varies|fails):? ?(.*?) ?-->$")
PICTURE = re.compile(r"!\[[^\]]*\]\((images/[\w.-]+\.png)\)$")


@dataclass(frozen=True)
class Block:
    """A run of lines with one purpose."""

    kind: str
    """python, bash, output, picture, file, quote; or text, which only the reader uses."""
    lines: tuple[str, ...]
    """As they are in the file, fences included."""
    number: int
    """Of the first line, from 1."""
    marks: tuple[tuple[str, str], ...] = ()
    """Name and value of each comment above it."""

    @property
    def body(self) -> str:
        """Without the fences."""
        return "\n".join(self.lines[1:-1])

    @property
    def picture(self) -> str:
        """The path of a picture, relative to the guide."""
        match = PICTURE.match(self.lines[0])
        assert match, "only a block of the kind picture has one"
        return match[1]

    def mark(self, name: str) -> str | None:
        """The value of a comment above the block; None without it."""
        return dict(self.marks).get(name)

    def with_body(self, body: str) -> "Block":
        """The same block with other lines between its fences."""
        return replace(self, lines=(self.lines[0], *body.split("\n"), self.lines[-1]))


@dataclass(frozen=True)
class Chapter:
    """A chapter, read."""

    path: Path
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        """Its first heading."""
        return next(line[2:] for block in self.blocks for line in block.lines if line.startswith("# "))

    def text(self) -> str:
        """The Markdown of all blocks."""
        return "\n".join(line for block in self.blocks for line in block.lines) + "\n"


def chapters() -> list[Path]:
    """The chapters of the guide, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.md"))


def read_chapter(path: Path) -> Chapter:
    """The chapter in the file `path`. Raises ValueError for a fence that is not closed."""
    return Chapter(path, tuple(_with_purpose(list(_pieces(path.read_text().rstrip("\n").split("\n"), path.name)))))


def _pieces(lines: list[str], name: str) -> Iterator[Block]:
    """Fences, pictures, comments that mark the next block, and each run of other lines."""
    start = at = 0
    while at < len(lines):
        fence, mark, picture = FENCE.match(lines[at]), MARK.match(lines[at]), PICTURE.match(lines[at])
        if not (fence or mark or picture):
            at += 1
            continue
        if start < at:
            yield Block("text", tuple(lines[start:at]), start + 1)
        end = at + 1
        if fence:
            end = next((i + 1 for i in range(at + 1, len(lines)) if lines[i] == "```"), 0)
            if not end:
                raise ValueError(f"{name}:{at + 1}: the block that begins here does not end")
        kind = fence[1] if fence else "mark" if mark else "picture"
        yield Block(kind, tuple(lines[at:end]), at + 1)
        start = at = end
    if start < len(lines):
        yield Block("text", tuple(lines[start:]), start + 1)


def _with_purpose(pieces: list[Block]) -> Iterator[Block]:
    """Each piece with its marks; a ```text block below code that runs becomes its output."""
    marks: list[tuple[str, str]] = []
    after = ""  # the kind of the last block, if only empty lines came since
    for piece in pieces:
        if piece.kind == "mark":
            match = MARK.match(piece.lines[0])
            assert match
            marks.append((match[1], match[2]))
            yield replace(piece, kind="text")
            continue
        if piece.kind == "text" and not any(piece.lines):
            yield piece
            continue
        named = dict(marks)
        still = {"source", "write", "not run"} & named.keys()
        kind = piece.kind
        if kind == "text" and piece.lines[0].startswith("```") and after in ("python", "bash"):
            kind = "output"
        elif kind == "picture" and after not in ("python", "output"):
            kind = "text"
        elif kind not in ("python", "bash", "picture") or still:
            kind = "quote" if "source" in named else "file" if "write" in named else "text"
        yield replace(piece, kind=kind, marks=tuple(marks))
        after = kind if kind in ("python", "bash") or (kind == "output" and after == "python") else ""
        marks = []
