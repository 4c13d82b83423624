"""Your own text: a file or folder of text, HTML, PDF, JSON, CSV, parquet (each also .gz, .zst) in, its documents out.

How a file of each kind is read is in data/sources/records.py. What is left out is counted by its reason, and named.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from regpt2.base.console import safe_text
from regpt2.base.errors import DataError, UsageError
from regpt2.data.sources import records
from regpt2.data.sources.plan import InputFile, Plan, Skipped, Source, group, input_file, revision_of
from regpt2.data.sources.text_stream import COMPRESSED
from regpt2.data.tokens.manifest import described

KINDS = (*records.TEXT, *records.HTML, *records.PDF, *records.JSONL, *records.PARQUET, *records.CSV)
DESCRIPTION = f"your own text: a file or folder (--input) of {' '.join(KINDS)}, each also .gz .zst"

_MOST_SUFFIXES = 20  # counted apart

documents = records.documents


def plan(source: Source) -> Plan:
    """The parts of a file or of everything below a folder, by name."""
    if source.input is None:
        raise UsageError(
            "text_files needs --input PATH: a file, or a folder of text, HTML, PDF, .jsonl, .csv or .parquet files."
        )
    kinds = _kinds(source.suffixes)
    if not source.input.exists():
        raise UsageError(f"--input {source.input}: there is no such file or folder.")
    skipped = Skipped()
    files = _find(source.input, kinds, skipped)
    if not files:
        reasons = "".join(f"; {line}" for line in described(skipped, skipped.first))
        raise DataError(
            f"{source.input}: no file to read, which is one of {' '.join(kinds)} (also .gz, .zst){reasons}. Name the "
            "suffixes of other files of plain text with --suffixes."
        )
    slices = (sized for file in files for sized in records.slices(file, source.field))
    return Plan(
        parts=group(slices, source.field),
        source=source.input.resolve().name,
        revision=f"{len(files)} files, names and sizes {revision_of(files)}",
        skipped=skipped,
    )


def _kinds(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds to read, from `--suffixes py .TXT`; each is what its suffix says, and plain text if we know none."""
    kinds = tuple(dict.fromkeys(f".{suffix.lower().removeprefix('.')}" for suffix in suffixes))
    for kind in kinds:
        if kind in COMPRESSED:
            raise UsageError(
                f"--suffixes {kind}: a compressed file is read by the suffix before, as .txt of a.txt{kind}."
            )
        if not re.fullmatch(r"\.[^\s./\\*?]+", kind):
            raise UsageError(
                f"--suffixes {kind[1:]!r}: expected what a file's name ends with, as in --suffixes .py .rst"
            )
    return kinds or KINDS


def _find(top: Path, kinds: tuple[str, ...], skipped: Skipped) -> list[InputFile]:
    """Every file that we can read, sorted by its name below `top`; the others are counted."""
    named: list[tuple[tuple[str, ...], Path]] = [((top.name,), top)]
    if top.is_dir():
        named = sorted((path.relative_to(top).parts, path) for path in _walk(top, skipped))
    files, unread = [], set[str]()
    for parts, path in named:
        name = "/".join(parts)
        if path.name.startswith(".") and path is not top:
            skipped.add("files hidden", name)
        elif (kind := records.kind_of(path.name)) not in kinds or records.missing_extra(kind):
            suffix = safe_text(path.suffix.lower()) or "no suffix"
            if kind in kinds:
                suffix = f"{kind}; {records.missing_extra(kind)}"
            if suffix not in unread and len(unread) == _MOST_SUFFIXES:
                suffix = "other suffixes"
            else:
                unread.add(suffix)
            skipped.add(f"files of a kind not read ({suffix})", name)
        elif not path.is_file():
            skipped.add("files missing behind a link, or not plain files", name)
        else:
            files.append(input_file(path, name))
    return files


def _walk(top: Path, skipped: Skipped) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(top, onerror=refuse):
        within = Path(folder).relative_to(top)
        for name in sorted(folders):
            if name.startswith("."):
                skipped.add("folders hidden", (within / name).as_posix())
            elif os.path.islink(os.path.join(folder, name)):
                skipped.add("folders behind a link", (within / name).as_posix())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in names)
