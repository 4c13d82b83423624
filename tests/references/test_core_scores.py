"""OpenAI's scores on CORE: the file against itself and against the published list."""

import json
from pathlib import Path

import pytest

from regpt2.references.core import core_scores
from regpt2.references.scores import core_mean, references_for

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "core" / "core.json"
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def test_each_model_s_core_is_the_mean_of_its_centered_accuracies() -> None:
    """Published with six digits, from accuracies with six: 1e-6 apart at most."""
    scores = core_scores()
    assert scores.means(scores.tasks) == pytest.approx(scores.core, abs=1e-6)
    assert [one.value for one in core_mean(scores.tasks)] == pytest.approx(scores.core, abs=1e-6)
    assert all(len(task.accuracy) == len(scores.models) == len(scores.sources) == 4 for task in scores.tasks.values())


def test_centering() -> None:
    piqa = core_scores().tasks["piqa"]
    assert piqa.centered(0.5) == 0
    assert piqa.centered(1.0) == 1
    assert piqa.centered(0.25) == -0.5


def test_references_of_a_task_its_centered_figure_and_the_mean_over_some() -> None:
    assert [one.value for one in references_for("core", "piqa")] == [0.62296, 0.67, 0.698, 0.725]
    assert [one.model for one in references_for("core", "core")] == [f"GPT-2 {n}M" for n in (124, 350, 774, 1558)]
    assert references_for("core", "piqa_centered")[3].value == pytest.approx(0.45)
    some = core_mean(["piqa", "jeopardy"])
    assert some[3].value == pytest.approx((0.45 + 0.092) / 2)
    assert some[0].metric == "centered_mean"
    assert "whole sets" in some[0].source
    assert all("at most 1,000 examples" in one.source for one in some[1:])


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no ../shared/data/core")
def test_they_are_as_published() -> None:
    published = json.loads(PUBLISHED.read_text())["openai_gpt2"]
    for name, task in core_scores().tasks.items():
        for i, model in enumerate(NAMES):
            assert task.accuracy[i] == published[model][name]["accuracy"]
            # The published centered figure is from the accuracy before it was rounded, 1e-6 / (1 - 0.62) apart.
            assert task.centered(task.accuracy[i]) == pytest.approx(published[model][name]["centered"], abs=3e-6)
