"""The runs below a folder. In: the folder; out: each run's name and path. A name never leads out of the folder."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

DEEPEST = 3  # comparisons/ARM/seed-N
MOST_FOUND = 5000


def find_runs(folder: Path) -> dict[str, Path]:
    """The folders with a record below `folder`, by name: "demo", or "compare/adamw/seed-1"; links out are left out."""
    root = Path(os.path.realpath(folder))
    found: dict[str, Path] = {}
    for name, place in _walk(root, "", 1):
        if len(found) == MOST_FOUND:
            break
        if _is_inside(root, place / "metrics.jsonl"):
            found[name] = place
    return found


def find_run(folder: Path, name: str) -> Path | None:
    """The run of this name, if there is one. The name is compared with those that exist, and never opened."""
    place = Path(os.path.realpath(folder))
    root, parts = place, name.split("/")
    if len(parts) > DEEPEST:
        return None
    for part in parts:
        if part not in (one.name for one in _folders(place)):
            return None
        place /= part
    return place if _is_inside(root, place / "metrics.jsonl") else None


def _walk(place: Path, above: str, depth: int) -> Iterator[tuple[str, Path]]:
    for entry in sorted(_folders(place), key=lambda one: one.name):
        name, below = f"{above}{entry.name}", place / entry.name
        if (below / "metrics.jsonl").is_file():
            yield name, below
        elif depth < DEEPEST:
            yield from _walk(below, f"{name}/", depth + 1)


def _folders(place: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return [entry for entry in entries if entry.is_dir() and _may_be_named(entry.name)]
    except OSError:
        return []


def _may_be_named(name: str) -> bool:
    """Is it in sight, and can an address hold it? Names that are no UTF-8 cannot."""
    return not name.startswith(".") and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_inside(root: Path, file: Path) -> bool:
    """Is it a plain file below `root`, with all links followed?"""
    try:
        real = Path(os.path.realpath(file, strict=True))
        return real.is_relative_to(root) and stat.S_ISREG(real.stat().st_mode)
    except OSError:
        return False
