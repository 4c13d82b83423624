"""Your own text: a file or folder of .txt, .md, .jsonl, .parquet (each also .gz, .zst) in, its documents out.

How a file of each kind is read stands in data/records.py. What is left out is counted with its reason.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from regpt2.base.errors import DataError, UsageError
from regpt2.data import records
from regpt2.data.documents import InputFile, Plan, Source, group, input_file, revision_of

DESCRIPTION = "your own text: a file or folder (--input) of .txt .md .jsonl .parquet, each also .gz .zst"

KINDS = (*records.TEXT, ".jsonl", *records.PARQUET)

documents = records.documents


def plan(source: Source) -> Plan:
    """The parts of a file or of everything below a folder, by name."""
    if source.input is None:
        raise UsageError("text_files needs --input PATH: a file, or a folder of .txt, .md, .jsonl or .parquet files.")
    if not source.input.exists():
        raise UsageError(f"--input {source.input}: there is no such file or folder.")
    skipped: Counter[str] = Counter()
    files = _find(source.input, skipped)
    if not files:
        reasons = "".join(f"; {count} {reason}" for reason, count in sorted(skipped.items()))
        raise DataError(f"{source.input}: no .txt, .md, .jsonl or .parquet (also .gz, .zst) file in it{reasons}.")
    slices = (sized for file in files for sized in records.slices(file, source.field))
    return Plan(
        parts=group(slices, source.field),
        source=source.input.resolve().name,
        revision=f"{len(files)} files, names and sizes {revision_of(files)}",
        skipped=dict(skipped),
    )


def _find(top: Path, skipped: Counter[str]) -> list[InputFile]:
    """Every file that we can read, sorted by its name below `top`; the others are counted."""
    paths = sorted(_walk(top, skipped), key=lambda path: path.relative_to(top).parts) if top.is_dir() else [top]
    files = []
    for path in paths:
        if path.name.startswith(".") and path is not top:
            skipped["files hidden"] += 1
        elif records.kind_of(path.name) not in KINDS:
            skipped[f"files of a kind not read ({path.suffix.lower() or 'no suffix'})"] += 1
        elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            skipped["files missing behind a link, or not plain files"] += 1
        else:
            files.append(input_file(path, path.relative_to(top).as_posix() if path is not top else path.name))
    return files


def _walk(top: Path, skipped: Counter[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(top, onerror=refuse):
        seen = [name for name in folders if not name.startswith(".")]
        if len(seen) < len(folders):
            skipped["folders hidden"] += len(folders) - len(seen)
        if links := [name for name in seen if os.path.islink(os.path.join(folder, name))]:
            skipped["folders behind a link"] += len(links)
        folders[:] = seen
        yield from (Path(folder, name) for name in names)
