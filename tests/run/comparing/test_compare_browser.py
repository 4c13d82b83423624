"""The page of a comparison in a real Chromium: what it answers is seen first, on a phone too."""

from pathlib import Path
from typing import Any

import pytest
from test_outcomes import a_plan, write_run

from regpt2.run.comparing.outcomes import answer, outcomes
from regpt2.run.comparing.page import page
from regpt2.run.comparing.runs import read_runs
from serving import browser
from serving.browser import opened, overflow_px

chromium = browser.chromium  # a fixture
pytestmark = [pytest.mark.browser, pytest.mark.seconds]
LONG = "an-arm-with-a-name-of-sixty-letters-as-the-command-line-allows"


@pytest.mark.parametrize("width", [1280, 390])
def test_answer_and_verdicts_are_seen_without_scrolling(chromium: Any, tmp_path: Path, width: int) -> None:
    plan = a_plan("a", "b", LONG)
    for seed in range(1, 5):
        for place, arm in enumerate(plan.arms):
            write_run(tmp_path / arm.label / f"seed-{seed}", [5.0, 3.0 + 0.1 * place + 0.01 * seed])
    runs = read_runs(tmp_path, plan)
    found = outcomes(plan, runs)
    (tmp_path / "compare.html").write_text(page(plan, runs, found, []), encoding="utf-8")
    with opened(chromium, (tmp_path / "compare.html").as_uri(), width=width) as seen:
        first = seen.page.locator("main > *").first
        assert first.text_content() == answer(plan, found)
        assert first.bounding_box()["y"] < 900 - first.bounding_box()["height"], "on the first screen"
        cells = seen.page.locator(".verdicts").first.locator("tr > :nth-child(2)")
        assert cells.all_text_contents() == ["verdict", "the baseline", "worse", "worse"]
        for box in (cell.bounding_box() for cell in cells.all()):
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert overflow_px(seen.page) == 0
