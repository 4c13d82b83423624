"""Check files. In: runs, checkpoints, data folders; out: a line for each thing checked, 1 if any is bad.

regpt2 verify runs/gpt2_124m data/fineweb_edu
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import say
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.data.checks.integrity import Findings
from regpt2.run.integrity import check_of


@dataclass(frozen=True)
class VerifyOptions:
    """Check runs, checkpoints and data folders: hashes, shapes, finite values, the record. Changes nothing."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT|DATA")]
    """What to check; you can give several."""
    json: Path | None = None
    """Also write the findings to this JSON file."""


def main(arguments: list[str]) -> int:
    """`regpt2 verify RUN|CHECKPOINT|DATA ...`: 1 if anything is bad."""
    options = parse(VerifyOptions, arguments, "regpt2 verify")
    if not options.folders:
        raise UsageError("nothing to check: regpt2 verify RUN|CHECKPOINT|DATA ...")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")
    checks = [(folder, check_of(folder)) for folder in options.folders]  # usage first, before any work
    findings = Findings()
    for folder, check in checks:
        check(folder, findings)
    if options.json is not None:
        write_atomic(options.json, json.dumps([asdict(finding) for finding in findings.all], indent=1) + "\n")
    say(f"{len(findings.all)} things checked, {findings.n_bad or 'none'} bad.")
    return 1 if findings.n_bad else 0
