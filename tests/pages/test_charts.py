"""Charts of a report: nothing that a reader looks for is cut off, and what is drawn can be told apart."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growing import BATCH_TOKENS, append, loss_at, start_event, train_event, val_event

from regpt2.pages.charts.draw import svg
from regpt2.pages.charts.panels import Panel, panels
from regpt2.pages.record import read_record
from regpt2.pages.report.write import write_report

pytestmark = pytest.mark.seconds
REAL = {"dataset": "fineweb", "n_params": 124_475_904}  # with published levels of its loss


def run_of(
    folder: Path, steps: int, *, every: int = 10, more: Any = (), batch: int = BATCH_TOKENS, **start: Any
) -> Path:
    """A run whose loss falls from 10 to 3 within its first hundred updates."""
    events = [start_event(steps, **start), val_event(0)]
    for step in range(1, steps + 1):
        events.append(train_event(step, tokens=step * batch))
        events += [val_event(step)] * (step % every == 0)
    append(folder, [*events, *more])
    return folder


def drawn(folder: Path, steps: int, **how: Any) -> dict[str, Panel]:
    return {panel.name: panel for panel in panels([read_record(run_of(folder, steps, **how))])}


def hellaswag(step: int, acc_norm: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "eval": "hellaswag", "acc_norm": acc_norm, "acc_norm_stderr": 0.004}


def texts(drawing: str) -> list[tuple[str, str, float]]:
    """Each text of a drawing: what, its anchor, and its place from left to right."""
    found = re.findall(r'<text style="[^"]*text-anchor: (\w+)[^"]*" x="([\d.]+)"[^>]*>([^<]*)</text>', drawing)
    return [(text, anchor, float(x)) for anchor, x, text in found]


def right_edge(text: str, anchor: str, x: float) -> float:
    """In points, for letters of 9 points that are 0.64 of that wide, as the digits of DejaVu Sans are."""
    return x + 0.64 * 9 * len(text) * {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]


@pytest.mark.parametrize(("steps", "start"), [(60, {}), (60, REAL), (3000, {"baselines": {}})])
def test_a_short_run_is_shown_from_its_first_loss(tmp_path: Path, steps: int, start: dict[str, Any]) -> None:
    charts = drawn(tmp_path / "run", steps, every=steps // 6, **start)
    low, high = charts["loss"].limits() or (0, 0)
    assert low < loss_at(steps) and high > val_event(0)["loss"] > loss_at(1)
    low, high = charts["bits"].limits() or (0, 0)
    assert high > val_event(0)["bits_per_byte"]


def test_a_long_run_beside_published_levels_is_shown_at_its_end(tmp_path: Path) -> None:
    low, high = drawn(tmp_path / "run", 2000, **REAL)["loss"].limits() or (0, 0)
    assert low < 3 and 3.425 < high < 6, "the level is within; the fall from 10 would leave a tenth for the rest"


def test_the_best_of_a_rising_score_is_within_its_chart(tmp_path: Path) -> None:
    scores = [hellaswag(step, 0.25 + 0.6 * (step / 100) ** 8) for step in range(1, 101)]
    panel = drawn(tmp_path / "run", 100, more=scores)["hellaswag"]
    low, high = panel.limits() or (0, 0)
    assert low < 0.25 and high > 0.85


def test_the_noise_of_single_updates_does_not_leave_at_the_bottom(tmp_path: Path) -> None:
    noise = [train_event(step, loss=3 + 0.5 * math.sin(step)) for step in range(101, 400)]
    low, _ = drawn(tmp_path / "run", 100, more=noise)["loss"].limits() or (0, 0)
    assert low < 2.55


@pytest.mark.parametrize("inches", [(8.4, 3.7), (4.4, 2.4)])
def test_the_last_label_stays_inside_the_picture(tmp_path: Path, inches: tuple[float, float]) -> None:
    """At the last step a tick has a label below, in steps, and one above, in tokens."""
    found = texts(svg(drawn(tmp_path / "run", 60, batch=1536)["loss"], inches))
    assert {"60", "92.2k"} <= {text for text, _, _ in found}, "labels at the very end, or the test could not fail"
    assert max(right_edge(*one) for one in found) <= 72 * inches[0]


def test_the_longest_label_of_a_level_stays_inside_the_picture(tmp_path: Path) -> None:
    scores = [hellaswag(step, 0.25 + step / 1000) for step in (10, 40)]
    found = texts(svg(drawn(tmp_path / "run", 40, more=scores)["hellaswag"], (4.4, 2.4)))
    assert "27.5 %" in {text for text, _, _ in found}, "the longest, or the test could not fail"
    assert min(right_edge(*one) - right_edge(one[0], "start", 0) for one in found) >= 0


@pytest.mark.parametrize("mfu", [None, 0.4], ids=["five small charts", "six"])
def test_no_chart_is_alone_in_a_row_of_two(tmp_path: Path, mfu: float | None) -> None:
    run = run_of(tmp_path / "run", 40, more=[train_event(step, mfu=mfu) for step in range(41, 60)])
    page = write_report(run).read_text()
    small, wide = (re.findall(rf'<figure class="{kind}">', page) for kind in ("half", "wide"))
    assert len(small) % 2 == 0 and len(small) + len(wide) == (6 if mfu is None else 7)


@pytest.mark.parametrize(("every", "markers"), [(10, 7), (1, 0)])
def test_points_have_markers_only_where_there_is_room(tmp_path: Path, every: int, markers: int) -> None:
    """60 or more in an inch a dozen are a caterpillar. A legend has no entry for markers of its own here."""
    drawing = svg(drawn(tmp_path / "run", 60, every=every)["bits"], (4.4, 2.4))
    assert drawing.count("<use") == markers
    assert drawing.count("stroke: var(--val)") >= 1, "the line itself is there"


def test_of_several_runs_each_keeps_a_few_markers(tmp_path: Path) -> None:
    """Their inks alone do not tell them apart for everybody."""
    records = [read_record(run_of(tmp_path / name, 400, every=1)) for name in ("a", "b")]
    (loss,) = (panel for panel in panels(records) if panel.name == "loss")
    drawing = svg(loss, (8.4, 3.7))
    for ink in ("run1", "run2"):
        dots = [float(x) for x in re.findall(rf'<use [^>]*x="([\d.]+)"[^>]*style="fill: var\(--{ink}\)', drawing)][:-1]
        assert 6 <= len(dots) <= 10, "without that of the legend"
        apart = np.diff(dots)
        assert apart.min() > 0.9 * apart.max(), "evenly spaced"


def test_a_norm_between_powers_of_ten_has_labels(tmp_path: Path) -> None:
    jumps = [train_event(step, grad_norm=0.3 + 7.0 * (step == 45)) for step in range(41, 60)]
    panel = drawn(tmp_path / "run", 40, more=jumps)["grad_norm"]
    assert panel.log
    labels = {text for text, anchor, x in texts(svg(panel, (4.4, 2.4))) if anchor == "end" and x < 40}
    assert {"0.5", "1", "2", "5"} <= labels


def test_the_name_of_a_level_goes_out_of_the_way_of_a_curve(tmp_path: Path) -> None:
    """The curve crosses the first level at the left, and is below the other all the time there."""
    start = {"baselines": {"unigram": 2.9, "gzip": 0.5}}
    named = {text: anchor for text, anchor, _ in texts(svg(drawn(tmp_path / "run", 60, **start)["bits"], (4.4, 2.4)))}
    assert named["unigram 2.9"] == "end" and named["gzip 0.5"] == "start"


def test_markers_at_both_ends_are_whole(tmp_path: Path) -> None:
    drawing = svg(drawn(tmp_path / "run", 60)["bits"], (4.4, 2.4))
    dots = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', drawing)]
    ((left, width),) = {
        (float(x), float(w))
        for x, w in re.findall(r'<clipPath.*?<rect x="([\d.]+)"[^>]*width="([\d.]+)"', drawing, re.S)
    }
    assert left + 1.75 < min(dots) and max(dots) < left + width - 1.75
    assert all(a < b for a, b in itertools.pairwise(dots))
