"""A run on one page. In: its folder with `metrics.jsonl`; out: `report.html`, which opens offline, and `report.png`.

regpt2 report runs/demo
regpt2 report runs/demo --out demo.html        also writes demo.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import say
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.pages.curves import picture
from regpt2.pages.page import headline, page, summary
from regpt2.pages.record import read_record


@dataclass(frozen=True)
class ReportOptions:
    """Make the report of a run: a page that opens offline, and a picture for a README."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder, as `regpt2 train` wrote it."""
    out: Path | None = None
    """The page to write; the picture gets the same name with .png. By default report.html in the run's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """The verb `regpt2 report`."""
    options = tyro.cli(ReportOptions, prog="regpt2 report", args=argv)
    path = write_report(options.run, options.out)
    say(f"{path} and {path.with_suffix('.png').name} are written.")
    return 0


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page and, beside it, the picture; returns the page's path. The same record gives the same bytes.

    Raises:
        UsageError: `run` is not the folder of a run, or `out` is not a page's name.
        DataError: the record is damaged.
    """
    path = run / "report.html" if out is None else out
    if path.suffix != ".html" or path.is_dir():
        raise UsageError(f"--out = {path} must be a file that ends in .html; the picture goes beside it as .png.")
    record = read_record(run)
    write_atomic(path.with_suffix(".png"), picture(record, f"{record.recipe}: {headline(record)}", summary(record)))
    write_atomic(path, page(record))
    return path
