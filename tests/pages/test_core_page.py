"""CORE on the page: each task beside OpenAI's four models, the mean over those measured, the curve of a run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from growing import append, events_until

from regpt2.pages.charts.panels import panels
from regpt2.pages.record import read_record
from regpt2.pages.report.core import core_table
from regpt2.pages.report.results import side_by_side
from regpt2.pages.report.write import write_report
from regpt2.references.core import core_scores

TASKS = core_scores().tasks


def core_event(step: int, mean: float, *, tasks: int = 22) -> dict[str, Any]:
    """As training records it: without single tasks."""
    over_all = {"core": mean, "core_stderr": 0.01} if tasks == 22 else {}
    found = {"centered_mean": mean, "centered_mean_stderr": 0.01, "tasks": tasks, "count": 100 * tasks}
    return {"event": "eval", "step": step, "eval": "core", **over_all, **found, "elapsed_s": 1.0}


def figures(accuracy: dict[str, float]) -> dict[str, Any]:
    """What `evaluate --out` keeps of CORE."""
    found: dict[str, Any] = {}
    for name, value in accuracy.items():
        centered = TASKS[name].centered(value)
        found |= {name: value, f"{name}_stderr": 0.0123, f"{name}_centered": centered}
    centered = [found[f"{name}_centered"] for name in accuracy]
    mean = sum(centered) / len(centered)
    over_all = {"core": mean, "core_stderr": 0.01} if len(accuracy) == len(TASKS) else {}
    found |= over_all | {"centered_mean": mean, "centered_mean_stderr": 0.01, "tasks": len(accuracy), "count": 4242}
    return found | {"protocol": {name: "10-shot" for name in accuracy}, "references": {}, "elapsed_s": 1.0}


def written(tmp_path: Path, results: dict[str, Any] | None, *events: dict[str, Any]) -> tuple[str, str]:
    """The page and the Markdown of a run, with the results of a later evaluation."""
    append(tmp_path / "run", [*events_until(20), *events])
    path = None
    if results is not None:
        path = tmp_path / "results.json"
        path.write_text(json.dumps({"results": results}))
    page = write_report(tmp_path / "run", results=path)
    return page.read_text(), page.with_suffix(".md").read_text()


def rows_of(page: str) -> list[list[str]]:
    """The text of each cell of CORE's table, the head first."""
    body = page[page.index('<table class="figures core">') :].partition("</table>")[0]
    rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body))
    return [[re.sub(r" *<a.*?</a>", "", cell) for cell in row] for row in rows]


def test_a_table_shows_each_task_beside_openais_models_centered(tmp_path: Path) -> None:
    """Of the models by hand: 124M's boolq is (0.552294 - 0.62) / 0.38 = -0.178."""
    page, markdown = written(tmp_path, {"core": figures({"boolq": 0.81, "jeopardy": 0.25})})
    head, jeopardy, boolq, mean = rows_of(page)
    assert head == ["task", "accuracy", "centered", "124M", "350M", "774M", "1558M", "chance"]
    assert boolq[:4] == ["boolq", "81.0 ± 1.2 %", "0.500", "-0.178"] and boolq[-1] == "62 %"
    assert jeopardy == ["jeopardy", "25.0 ± 1.2 %", "0.250", "0.002", "0.044", "0.045", "0.092", "0 %"]
    assert mean[:4] == ["mean of these 2", "", "0.375", "-0.088"]  # (-0.178 + 0.002) / 2
    assert "the other three on at most 1,000 examples of each task" in page
    assert "| boolq | 81.0 ± 1.2 % | 0.500 | -0.178 |" in markdown
    assert "at most 1,000 examples of each task" in markdown
    assert page.count("<td>81.00") == 0  # the tasks are in their own table only


def test_of_all_tasks_the_last_row_is_core_beside_the_published_four(tmp_path: Path) -> None:
    page, _ = written(tmp_path, {"core": figures({name: task.accuracy[0] for name, task in TASKS.items()})})
    rows = rows_of(page)
    assert [row[0] for row in rows[1:-1]] == list(TASKS)
    assert rows[-1] == ["CORE, the mean", "", "0.114", "0.114", "0.185", "0.215", "0.257", ""]
    assert "GPT-2 124M 0.1139" in page  # beside `core` in the table of all evaluations


def test_tasks_measured_one_by_one_share_the_table_and_the_newest_counts(tmp_path: Path) -> None:
    parts = {
        f"core.{name}": {name: value, f"{name}_stderr": 0.01, f"{name}_centered": 0.5, "count": 10}
        for name, value in {"copa": 0.7, "piqa": 0.6}.items()
    }
    page, _ = written(tmp_path, {"core": figures({"copa": 0.5}), **parts})
    rows = rows_of(page)
    assert [row[:3] for row in rows[1:]] == [
        ["copa", "70.0 ± 1.0 %", "0.400"],
        ["piqa", "60.0 ± 1.0 %", "0.200"],
        ["mean of these 2", "", "0.300"],
    ]


def test_single_tasks_are_not_listed_a_second_time_among_the_evaluations(tmp_path: Path) -> None:
    results = {"core.piqa": figures({"piqa": 0.6}), "hellaswag": {"acc_norm": 0.3, "count": 10}}
    page, text = written(tmp_path, results)
    assert "core.piqa" not in page[: page.index('<table class="figures core">')]
    assert "core.piqa" not in text[: text.index("| task ")]
    assert "hellaswag" in page and len(rows_of(page)) == 3


def test_while_training_there_is_a_curve_and_no_table(tmp_path: Path) -> None:
    page, markdown = written(tmp_path, None, core_event(10, 0.02), core_event(20, 0.05))
    assert '<table class="figures core">' not in page
    record = read_record(tmp_path / "run")
    (panel,) = [one for one in panels([record]) if one.name == "core"]
    assert panel.title == "CORE" and panel.traces[0].y.tolist() == [0.02, 0.05]
    assert [(rule.label, rule.value) for rule in panel.rules] == [("GPT-2 124M", 0.113891), ("chance", 0.0)]
    assert ["CORE", "0.0500"] in side_by_side([record])
    assert "| CORE | 0.0500 |" in markdown


def test_the_mean_over_some_tasks_has_no_published_line(tmp_path: Path) -> None:
    """OpenAI's CORE is over all 22, and which these 20 were is not in the record."""
    append(tmp_path / "run", [*events_until(20), core_event(10, 0.02, tasks=20), core_event(20, 0.05, tasks=20)])
    record = read_record(tmp_path / "run")
    (panel,) = [one for one in panels([record]) if one.name == "core"]
    assert panel.title == "CORE, the mean over 20 tasks"
    assert [rule.label for rule in panel.rules] == ["chance"]
    assert ["CORE", "0.0500 over 20 tasks"] in side_by_side([record])


@pytest.mark.parametrize("value", [None, "x", math.nan, 1e9, -1, [1], {"a": 1}])
def test_a_damaged_figure_is_left_out_of_the_table(tmp_path: Path, value: object) -> None:
    append(tmp_path / "run", events_until(2))
    results = figures({"copa": 0.5, "piqa": 0.6}) | {"eval": "core", "piqa": value, "copa_stderr": value}
    damaged = {"event": "eval", "step": 20, "eval": "core", "centered_mean": value, "tasks": value}
    record = replace(read_record(tmp_path / "run"), measured=[results], evals=[damaged])
    found = core_table(record)
    assert found is not None
    assert [row[0] for row in found.rows] == ["copa", "mean of these 1"]
    assert found.rows[0][1].startswith("50.0")
    assert all(panel.name != "core" or panel.description() for panel in panels([record]))
    assert side_by_side([record])
