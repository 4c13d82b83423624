"""A run in the terminal: it fits its columns, shows what is recorded, and text of the run cannot drive the terminal."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from growing import HOSTILE, append, events_until, loss_at, start_event, train_event, val_event
from rich.cells import cell_len

from regpt2.base.files import folder_lock
from regpt2.pages.live.braille import Curve, draw
from regpt2.pages.live.follow import Follower
from regpt2.pages.live.lines import Lines, last_line
from regpt2.pages.live.status import status_of
from regpt2.pages.live.table import table_of
from regpt2.pages.live.view import view_of

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def rendered(run: Path, columns: int, rows: int = 40) -> list[str]:
    follower = Follower(run)
    follower.look()
    return str(view_of(follower.record, status_of(follower), run.name, (columns, rows))).split("\n")


@pytest.mark.parametrize("columns", [24, 40, 80, 100, 200])
@pytest.mark.parametrize("rows", [12, 40])
def test_the_view_fits_the_terminal(tmp_path: Path, columns: int, rows: int) -> None:
    verdict = {
        "event": "verdict",
        "step": 90,
        "state": "above",
        "text": "above by 0.1: " + 40 * "long ",
        "checks": ["lr"],
    }
    append(tmp_path / "a_run_with_a_long_name", [*events_until(95), verdict])
    lines = rendered(tmp_path / "a_run_with_a_long_name", columns, rows)
    assert max(map(cell_len, lines)) <= columns
    assert rows < 20 or len(lines) <= rows


def test_the_view_shows_what_is_recorded(tmp_path: Path) -> None:
    append(tmp_path / "demo", events_until(50))
    with folder_lock(tmp_path / "demo"):
        text = "\n".join(rendered(tmp_path / "demo", 100))
    assert "● running" in text and "step 50/100, 50 %" in text
    assert f"validation {loss_at(50) + 0.1:.4f}" in text
    assert "5s left" in text, "50,000 tokens at 10,000 in a second"
    assert "def at_50():" in text and "def at_40():" not in text, "the newest sample"
    assert "Validation, bits per byte" in text and "Learning rate" in text


def test_text_of_a_run_cannot_drive_the_terminal(tmp_path: Path) -> None:
    events = [start_event(config={"recipe": HOSTILE}, dataset=HOSTILE), train_event(1), val_event(1)]
    events += [
        {"event": "sample", "step": 1, "prompt": HOSTILE, "texts": [HOSTILE]},
        {"event": "verdict", "step": 1, "state": HOSTILE, "text": HOSTILE, "checks": [HOSTILE]},
        {"event": "note", "step": 1, "text": HOSTILE},
        {"event": "end", "step": 1, "reason": f"failed: {HOSTILE}"},
    ]
    run = tmp_path / "a\x1b[31m\nred"
    append(run, events)
    assert not CONTROL.search("\n".join(rendered(run, 100)))
    follower = Follower(run)
    follower.look()
    from rich.console import Console

    console = Console(width=120, no_color=True)
    with console.capture() as shown:
        console.print(table_of({run.name: status_of(follower)}, 120))
    assert not CONTROL.search(shown.get()) and shown.get().count("\n") == 2


def test_one_dot_is_where_unicode_has_it() -> None:
    """U+2800 plus 1 is the dot at the top left, plus 0x80 that at the bottom right."""
    corners = Curve(np.array([0.0, math.nan, 1.0]), np.array([1.0, math.nan, 0.0]), "")
    (line,) = draw([corners], (2, 1), (0, 1), (0, 1))
    assert str(line) == chr(0x2801) + chr(0x2880)


def test_a_diagonal_is_drawn_without_gaps_and_a_value_that_is_none_leaves_one() -> None:
    x = np.array([0.0, 1.0])
    lines = [str(line) for line in draw([Curve(x, x, "")], (4, 2), (0, 1), (0, 1))]
    dots = sum(bin(ord(one) - 0x2800).count("1") for one in "".join(lines) if one != " ")
    assert dots == 8 and lines[0][:2] == "  " and lines[1][2:] == "  "
    gap = Curve(np.array([0.0, 0.5, 1.0]), np.array([0.5, math.nan, 0.5]), "")
    assert str(draw([gap], (9, 1), (0, 1), (0, 1))[0]).count(" ") == 7


def test_lines_of_a_log_give_each_event_once_and_updates_seldom(tmp_path: Path) -> None:
    lines, follower = Lines(), Follower(tmp_path)

    def new(now_s: float) -> list[str]:
        follower.look()
        return list(lines.of(follower.record, status_of(follower), now_s))

    append(tmp_path, events_until(20))
    assert [line.split(" |")[0] for line in new(0.0)] == ["demo: running", "step 20/100"]
    assert new(1.0) == []
    append(tmp_path, [train_event(21), val_event(21), {"event": "sample", "step": 21, "texts": ["two\nlines"]}])
    found = new(2.0)
    assert [line.split(":")[0] for line in found] == ["step 21 | val_loss", "step 21 | sample"]
    assert found[1] == "step 21 | sample: two lines"
    assert [line.split(" |")[0] for line in new(11.0)] == ["step 21/100"]
    append(tmp_path, [{"event": "end", "step": 21, "reason": "finished", "elapsed_s": 65.0}])
    new(12.0)
    assert (
        last_line(status_of(follower))
        == f"finished at step 21/100 after 1m05s; best validation loss {loss_at(21) + 0.1:.4f} at step 21"
    )


def test_lines_report_a_record_that_was_cut_back(tmp_path: Path) -> None:
    lines, follower = Lines(), Follower(tmp_path)
    append(tmp_path, events_until(20))
    for step in (20, 12):
        (tmp_path / "metrics.jsonl").unlink()
        append(tmp_path, events_until(step))
        follower.look()
        found = list(lines.of(follower.record, status_of(follower), 0.0))
    assert found == ["the record was cut back or begun anew; it is at step 12"]
