"""The command `regpt2 inspect`. In: a folder of tokens; out: what it holds in words, or where two folders differ.

regpt2 inspect data/fineweb_edu
regpt2 inspect data/fineweb_edu --at 1000000 --tokens 200
regpt2 inspect data/mine --against data/theirs
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from regpt2.base.console import say
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.data.checks.folder import open_folder
from regpt2.data.checks.integrity import Findings, check_data
from regpt2.data.checks.look import DEFAULT_STRETCHES, compare, look


@dataclass(frozen=True)
class InspectOptions:
    """Look inside a data folder, ours or another project's: manifest, counts, text; or compare it with another."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of tokens."""
    split: Literal["train", "val"] | None = None
    """Only this split; default: all, or train with --at."""
    at: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Show the text at this token, counted from 0, instead of the counts; may be given several times."""
    tokens: int = 64
    """Tokens of text to show."""
    sample: int | None = None
    """Count N evenly spaced stretches of 2^20 tokens; default: 256 for a split above a billion tokens."""
    all: bool = False
    """Count every token, also in large splits."""
    verify: bool = False
    """First check every shard and every id, as `regpt2 verify` does; stop if any is bad."""
    against: Path | None = None
    """Another folder: show where the two differ. Exit code 1 if their tokens differ, whatever their files."""
    json: Path | None = None
    """Also write the results to this JSON file."""


def main(argv: list[str]) -> int:
    """Print what the folder holds, or the differences; 1 if a shard is bad or the two differ."""
    options = parse(InspectOptions, argv, "regpt2 inspect")
    paths = [options.data] if options.against is None else [options.data, options.against]
    _check(options, paths)
    if options.verify and not all([_verify(path) for path in paths]):
        return 1
    with ExitStack() as stack:
        folders = [open_folder(path, options.split, stack) for path in paths]
        if len(folders) == 1:
            found = look(
                folders[0], options.at, n_tokens=options.tokens, n_stretches=options.sample, count_all=options.all
            )
        else:
            found = compare(folders[0], folders[1], options.tokens)
    if options.json is not None:
        write_atomic(options.json, json.dumps(found, indent=1) + "\n")
    return 0 if found.get("equal", True) else 1


def _check(options: InspectOptions, paths: list[Path]) -> None:
    for path in paths:
        if not path.is_dir():
            raise UsageError(
                f"{path}: there is no such data folder; make it with `regpt2 prepare DATASET --out {path}`."
            )
    for name, value, default in (("tokens", options.tokens, 64), ("sample", options.sample, DEFAULT_STRETCHES)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} must be at least 1; the default is {default}.")
    if options.sample is not None and options.all:
        raise UsageError("--sample and --all exclude each other; give one of them.")
    if options.against is not None and options.at:
        raise UsageError("--against finds the place by itself; leave out --at, or leave out --against.")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")


def _verify(path: Path) -> bool:
    findings = Findings()
    check_data(path, findings)
    say(f"{len(findings.all)} things checked, {findings.n_bad or 'none'} bad.\n")
    return not findings.n_bad
