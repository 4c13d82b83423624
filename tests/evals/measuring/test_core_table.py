"""CORE's table on the screen: what was measured beside what OpenAI's models reach."""

from typing import Any

import pytest

from regpt2.evals.measuring.core_table import core_table
from regpt2.evals.scoring.core.tasks import TASKS


def result(*names: str, **changes: float) -> dict[str, Any]:
    """As if each of these tasks had been answered at chance."""
    found: dict[str, Any] = {}
    for name in names:
        found |= {name: TASKS[name].scores.baseline, f"{name}_stderr": 0.01, f"{name}_centered": 0.0}
    return found | changes


def test_a_row_for_each_task_and_the_mean_over_the_same_tasks() -> None:
    lines = core_table(result("piqa", "jeopardy", tasks=2, centered_mean=0.0, centered_mean_stderr=0.012)).splitlines()
    assert lines[0].split() == ["task", "shots", "accuracy", "centered", "124M", "350M", "774M", "1558M"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["piqa"] == ["10", "0.5000", "+-", "0.0100", "0.0000", "0.246", "0.340", "0.396", "0.450"]
    assert rows["jeopardy"][-4:] == ["0.002", "0.044", "0.045", "0.092"]
    assert rows["mean"][-7:] == ["0.0000", "+-", "0.0120", "0.124", "0.192", "0.220", "0.271"], "(0.450 + 0.092) / 2"
    assert rows["CORE,"][-4:] == ["0.114", "0.185", "0.215", "0.257"]
    assert "no data: hellaswag_zeroshot, bigbench_qa_wikidata, " in "\n".join(lines)
    assert all(len(line) <= 120 for line in lines if "no data" not in line)


def test_whole_it_is_core() -> None:
    lines = core_table(result(*TASKS, tasks=22, centered_mean=0.1, centered_mean_stderr=None)).splitlines()
    assert len(lines) == 1 + 22 + 1 + 2
    assert lines[23].split() == ["CORE", "0.1000", "0.114", "0.185", "0.215", "0.257"]
    assert "no data" not in "\n".join(lines)


@pytest.mark.parametrize("name", TASKS)
def test_a_single_task_has_its_row_alone(name: str) -> None:
    lines = core_table(result(name)).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == [name, str(TASKS[name].shots)]
    assert "at\n  most 1,000 examples a task" in "\n".join(lines)
