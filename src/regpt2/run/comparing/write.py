"""The result of a comparison. In: its plan and its runs; out: tables on the screen and four files."""

import json
import math
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from regpt2 import __version__
from regpt2.base.console import say
from regpt2.base.files import write_atomic
from regpt2.base.version import commit
from regpt2.run.comparing.charts import picture
from regpt2.run.comparing.outcomes import outcomes, remarks
from regpt2.run.comparing.page import page, subtitle, text, title
from regpt2.run.comparing.runs import Comparison, read_runs
from regpt2.run.comparing.tables import costs_table, for_screen, results_table


def show(folder: Path, plan: Comparison) -> None:
    """Show the tables and write compare.json, compare.md, compare.png and compare.html."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    notes = remarks(plan, runs, found)
    write_json(folder, plan)
    write_atomic(folder / "compare.png", picture(plan, runs, found, title(plan), subtitle(plan, runs)))
    write_atomic(folder / "compare.md", text(plan, runs, found, notes, "compare.png"))
    write_atomic(folder / "compare.html", page(plan, runs, found, notes))
    tables = results_table(found), costs_table(plan, found)
    for line in ("", *for_screen(tables[0]), "", *for_screen(tables[1]), "", *notes):
        say(line)
    say(f"Wrote {folder / 'compare.html'}, compare.md, compare.png and compare.json.")


def write_json(folder: Path, plan: Comparison) -> None:
    """Write the plan, every run's curve and set-up, and the outcomes."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    content = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "plan": asdict(plan),
        "outcomes": [{**asdict(one), "mean": one.mean, "sd": one.sd, "verdict": one.verdict} for one in found],
        "remarks": remarks(plan, runs, found),
        "runs": {arm.label: [asdict(run) for run in of_arm] for arm, of_arm in zip(plan.arms, runs, strict=True)},
    }
    write_atomic(folder / "compare.json", json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
