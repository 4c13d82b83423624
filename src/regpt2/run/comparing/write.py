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
from regpt2.run.comparing.outcomes import answer, outcomes, remarks, set_up_remarks
from regpt2.run.comparing.page import Result, page, result_page, result_text, subtitle, text
from regpt2.run.comparing.runs import Comparison, read_runs
from regpt2.run.comparing.scaling.show import result as scaling_result
from regpt2.run.comparing.sweep.show import result as sweep_result
from regpt2.run.comparing.tables import costs_table, for_screen, results_table

_RESULTS = {"sweep": sweep_result, "scaling": scaling_result}


def show(folder: Path, plan: Comparison) -> None:
    """Show the tables and write compare.json, compare.md, compare.png and compare.html."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    notes = remarks(plan, runs, found)
    if plan.kind in _RESULTS:
        result = _RESULTS[plan.kind](plan, runs, found)
        write_json(folder, plan, result)
        _show_result(folder, result, plan)
    else:
        write_json(folder, plan)
        write_atomic(folder / "compare.png", picture(plan, runs, found, subtitle(plan, runs)))
        write_atomic(folder / "compare.md", text(plan, runs, found, notes, "compare.png"))
        write_atomic(folder / "compare.html", page(plan, runs, found, notes))
        tables = results_table(found), costs_table(plan, found)
        for line in ("", answer(plan, found), "", *for_screen(tables[0]), "", *for_screen(tables[1]), "", *notes):
            say(line)
    say(f"Wrote {folder / 'compare.html'}, compare.md, compare.png and compare.json.")


def _show_result(folder: Path, result: Result, plan: Comparison) -> None:
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    notes = [*result.remarks, *set_up_remarks(plan, runs)]
    write_atomic(folder / "compare.png", result.picture)
    write_atomic(folder / "compare.md", result_text(result, plan, runs, found, notes, "compare.png"))
    write_atomic(folder / "compare.html", result_page(result, plan, runs, found, notes))
    for line in ("", result.answer):
        say(line)
    for _, rows in result.tables:
        for line in ("", *for_screen(rows)):
            say(line)
    for line in ("", *notes):
        say(line)


def write_json(folder: Path, plan: Comparison, result: Result | None = None) -> None:
    """Write the plan, every run's curve and set-up, the outcomes, and the result of a comparison over one recipe."""
    runs = read_runs(folder, plan)
    found = outcomes(plan, runs)
    content = {
        "answer": result.answer if result else answer(plan, found),
        **({plan.kind: result.json} if result else {}),
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
