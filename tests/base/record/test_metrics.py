"""The record only grows, is cut back to the step of a resume, and survives a line that a kill cut in half."""

import json
import math
from pathlib import Path

import pytest

from regpt2.base.errors import DataError
from regpt2.base.record.metrics import MetricsLog, read_events


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log("train", 1, loss=2.5)
    log.log("note", 1, text="line\nbreak and \u2028 and ü and \udc80")
    assert list(read_events(tmp_path / "metrics.jsonl")) == [
        {"event": "train", "step": 1, "loss": 2.5},
        {"event": "note", "step": 1, "text": "line\nbreak and \u2028 and ü and \udc80"},
    ]


def test_what_json_cannot_say_is_said_in_words(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m").log("train", 1, loss=math.nan, norms=[math.inf, 1.0])
    line = (tmp_path / "m").read_text()
    assert json.loads(line, parse_constant=lambda _: pytest.fail("not JSON")) == {
        "event": "train", "step": 1, "loss": "nan", "norms": ["inf", 1.0],
    }  # fmt: skip


def test_cutting_back_forgets_later_events_but_no_note(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    for step in range(1, 9):
        log.log("train", step, loss=1.0)
    log.log("eval", 4, eval="val_loss", loss=1.0)
    log.log("note", 8, text="kept")
    with open(tmp_path / "m", "a") as file:
        file.write('{"event":"train","st')
    log.cut_back(4)
    assert log.observed(4) == ["val_loss"]
    assert log.observed(3) == []
    assert [(e["event"], e["step"]) for e in read_events(tmp_path / "m")] == [
        ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("note", 8),
    ]  # fmt: skip


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"event":"a","step":1}\nnonsense\n{"event":"b","step":2}\n')
    with pytest.raises(DataError, match=":2 is not an event"):
        list(read_events(tmp_path / "m"))


def test_a_damaged_record_does_not_stop_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").write_text('nonsense\n{"event":"a","step":1}\n{"event":"b","step":2}\n')
    MetricsLog(tmp_path / "m").cut_back(1)
    assert list(read_events(tmp_path / "m")) == [{"event": "a", "step": 1}]
    assert (tmp_path / "m.bad").read_text().startswith("nonsense")
    assert "1 damaged lines" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "no" / "such" / "folder")
    log.log("train", 1)
    log.log("train", 2)
    assert capsys.readouterr().err.count("the record is not being written") == 1


def test_other_ranks_keep_no_record() -> None:
    MetricsLog(None).log("train", 1, loss=1.0)
    MetricsLog(None).cut_back(3)
