"""Runs on one page. In: their folders with `metrics.jsonl`; out: `report.html`, which opens offline, a PNG, Markdown.

regpt2 report runs/demo
regpt2 report runs/demo --results results.json          with what regpt2 evaluate measured
regpt2 report runs/a runs/b --out compared.html         side by side; also writes compared.png and compared.md
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import say
from regpt2.base.options import parse
from regpt2.pages.report.write import write_report


@dataclass(frozen=True)
class ReportOptions:
    """Make the report of a run, or of several side by side: a page that opens offline, a picture, and Markdown."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """The runs' folders, as `regpt2 train` wrote them."""
    out: Path | None = None
    """The page to write; .png and .md are written beside it. Default: report.html in the folder of the run."""
    results: Path | None = None
    """A file of `regpt2 evaluate --out` for the model of this run: its results join those of the run."""


def main(argv: Sequence[str]) -> int:
    """`regpt2 report RUN ...`."""
    options = parse(ReportOptions, argv, "regpt2 report")
    path = write_report(options.runs, options.out, options.results)
    say(f"Wrote {path}, {path.with_suffix('.png').name} and {path.with_suffix('.md').name}.")
    return 0
