"""A report written. In: run folders, and results of evaluations; out: a page, a picture and Markdown on disk."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import read_small, write_atomic
from regpt2.base.record.metrics import read_events
from regpt2.pages.charts.draw import overview, png
from regpt2.pages.charts.panels import MOST_RUNS, panels
from regpt2.pages.record import Record, read_record
from regpt2.pages.report.markdown import markdown
from regpt2.pages.report.page import page, subtitle, title
from regpt2.pages.report.results import headline
from regpt2.references.verdict import of_record


def write_report(runs: Path | Sequence[Path], out: Path | None = None, results: Path | None = None) -> Path:
    """Write the page and, beside it, picture and Markdown; returns the page's path. Same records, same bytes.

    Raises:
        UsageError: one is not the folder of a run, there are too many, or `out` is not a page's name.
        DataError: a record or the results are damaged.
    """
    runs = [runs] if isinstance(runs, Path) else list(runs)
    records = records_of(runs)
    path = _out(runs, out)
    if results is not None:
        if len(records) > 1:
            raise UsageError("--results belongs to one run; give only that run.")
        records = [_with_results(records[0], results)]
    image = path.with_suffix(".png")
    write_atomic(image, png(overview(panels(records), *heads(records))))
    write_atomic(path.with_suffix(".md"), markdown(records, image.name))
    write_atomic(path, page(records))
    return path


def records_of(runs: Sequence[Path]) -> list[Record]:
    """The records of these runs, with verdicts, and names that tell them apart.

    Raises:
        UsageError: one is not the folder of a run, or there are too many.
        DataError: a record is damaged.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"got {len(runs)} runs; a report shows 1 to {MOST_RUNS}, each in its own color.")
    return _named([_judged(read_record(run), run) for run in runs], runs)


def heads(records: list[Record]) -> tuple[str, str]:
    """Title and subtitle of the picture."""
    line = f"{title(records)}: {headline(records[0]) if len(records) == 1 else 'side by side'}"
    return line, subtitle(records)


def _out(runs: Sequence[Path], out: Path | None) -> Path:
    if out is None and len(runs) > 1:
        raise UsageError("a report of several runs needs a name: --out compared.html.")
    path = runs[0] / "report.html" if out is None else out
    if path.suffix != ".html" or path.is_dir():
        raise UsageError(f"--out = {path} must be a file that ends in .html; .png and .md go beside it.")
    return path


def _judged(record: Record, run: Path) -> Record:
    """The record with a verdict, computed now if the run recorded none."""
    if record.verdicts:
        return record
    verdict = of_record(read_events(run / "metrics.jsonl"))
    if verdict is None:
        return record
    return replace(record, verdicts=[{**verdict.event(), "step": record.validations[-1].get("step")}])


def _named(records: list[Record], runs: Sequence[Path]) -> list[Record]:
    """Runs whose folders share a name get their paths as names."""
    times = Counter(record.name for record in records)
    return [
        record if times[record.name] == 1 else replace(record, name=str(run))
        for record, run in zip(records, runs, strict=True)
    ]


def _with_results(record: Record, path: Path) -> Record:
    try:
        content = json.loads(read_small(path, DataError))
        events = [{**figures, "eval": name} for name, figures in content["results"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} holds no results of evaluations ({type(error).__name__}: {error}); "
            "give the file that `regpt2 evaluate MODEL --out FILE.json` wrote."
        ) from None
    return replace(record, measured=events)
