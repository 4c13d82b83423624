"""What the corpus is made of: a case has files to write and a reader to feed them to; helpers that make odd files."""

import io
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Content = bytes | str | Callable[[Path], object]
"""What stands in a file, or what makes an odd thing at its place."""


@dataclass(frozen=True)
class Case:
    """Files for an empty folder, and the public function that is given the folder."""

    name: str
    read: Callable[[Path], object]
    files: Mapping[str, Content]
    fine: bool = False
    """It may be read: it is odd, but does no harm."""

    def write(self, folder: Path) -> None:
        """Make the files."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            if callable(content):
                content(folder / name)
            else:
                (folder / name).write_bytes(content if isinstance(content, bytes) else os.fsencode(content))


def pipe(path: Path) -> None:
    """A pipe that nobody writes into: who opens it waits forever."""
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], object]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def folder(path: Path) -> None:
    """A folder in place of a file."""
    path.mkdir()


def sparse(n_bytes: int, head: bytes = b"") -> Callable[[Path], object]:
    """A file that claims many bytes and has few on disk."""

    def make(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, n_bytes)

    return make


ODD_THINGS: dict[str, Content] = {
    "a pipe": pipe,
    "a folder": folder,
    "a link to nothing": link_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to an endless device": link_to("/dev/zero"),
    "a link to an empty device": link_to("/dev/null"),
    "nothing in it": b"",
    "8 GB of zeros": sparse(8 << 30),
    "random bytes": bytes((n * n * 31 + 7 * n) % 251 for n in range(5000)),
}


def archive(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        for name, data in members.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type = name, method  # the constructor would mend the name
            made.writestr(info, data)
    return file.getvalue()
