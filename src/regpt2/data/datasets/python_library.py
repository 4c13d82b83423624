"""The corpus that is always there: source and documentation of the running Python's standard library in, documents out.

About 11 MB for Python 3.11: every .py, .txt and .rst but tests, IDLE and machine-made files, one document each, and
each topic of `help()` (`pydoc_data/topics.py`) as a document of plain text.
"""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from regpt2.base.errors import DataError, UsageError
from regpt2.data.sources.plan import Document, Part, Plan, Skipped, Slice, Source, group, input_file, revision_of
from regpt2.data.sources.text_stream import decode, open_input

DESCRIPTION = "built in: source and documentation of the running Python's standard library, about 11 MB"

SUFFIXES = (".py", ".txt", ".rst")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
MADE_ON_BUILD = ("_sysconfigdata", "config-")  # these hold the paths of the machine
TOPICS = "pydoc_data/topics.py"


def plan(source: Source) -> Plan:
    if source.input is not None:
        raise UsageError(f"python_library is built in and takes no --input; for {source.input}, choose text_files.")
    top = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(top).as_posix() for path in _walk(top))
    if not names:
        raise DataError(f"{top}: this Python has no standard library in files; use text_files with text of your own.")
    files = [input_file(top / name, name) for name in names]
    return Plan(
        parts=group((Slice(file), file.n_bytes) for file in files),
        source="the Python standard library",
        revision=f"Python {platform.python_version()}, {len(files)} files, names and sizes {revision_of(files)}",
    )


def documents(part: Part, skipped: Skipped) -> Iterator[Document]:
    """A document for each file, and for each topic of help()."""
    for piece in part.slices:
        skipped.file = piece.file.name
        with open_input(piece.file) as file:
            text = decode(file.read(), skipped)
        if piece.file.name == TOPICS:
            yield from map(Document, _topics(text))
        else:
            yield Document(text)


def _walk(top: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(MADE_ON_BUILD)]
        paths = (Path(folder, name) for name in names if not name.startswith(MADE_ON_BUILD))
        yield from (path for path in paths if path.suffix in SUFFIXES and path.is_file())


def _topics(text: str) -> list[str]:
    """The values of `topics = {...}`, without running the file; the whole file where it is written otherwise."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return list(ast.literal_eval(statement.value).values())
    return [text]
