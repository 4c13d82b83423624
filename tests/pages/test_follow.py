"""A record that is followed is the record that is read, however its bytes arrive; and it is read only once."""

import math
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growing import HOSTILE, append, events_until, start_event, train_event, val_event
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt2.base.files import write_atomic
from regpt2.base.record.metrics import MetricsLog
from regpt2.pages.live import follow
from regpt2.pages.live.follow import Follower
from regpt2.pages.record import Record, read_record

TEXTS = st.one_of(st.text(max_size=30), st.just(HOSTILE))
FIGURES = st.one_of(st.floats(), st.integers(-5, 5), st.none(), st.booleans(), TEXTS)
EVENTS = st.one_of(
    st.builds(
        lambda step, loss, skip: train_event(step, loss=loss, skipped=skip), st.integers(0, 50), FIGURES, st.booleans()
    ),
    st.builds(lambda step, loss: val_event(step, loss=loss), st.integers(0, 50), FIGURES),
    st.builds(lambda step, text: {"event": "sample", "step": step, "texts": [text]}, st.integers(0, 50), TEXTS),
    st.builds(lambda text: {"event": "note", "step": 3, "text": text}, TEXTS),
    st.builds(
        lambda kind: {"event": kind, "step": 5, "reason": "finished"}, st.sampled_from(["end", "run", "verdict", "?"])
    ),
)


def same(followed: Record, read: Record) -> bool:
    """Equal in all but the hash, which a page of a growing file does not need."""
    for column, values in read.train.items():
        np.testing.assert_array_equal(followed.train[column], values)
    names = [one.name for one in fields(Record) if one.name not in ("train", "sha256")]
    return all(getattr(followed, name) == getattr(read, name) for name in names)


def written(folder: Path, events: list[dict[str, Any]]) -> bytes:
    append(folder, events)
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.seconds
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=8), cuts=st.lists(st.integers(0, 3000), max_size=12))
def test_any_split_of_the_bytes_gives_the_record_that_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]], cuts: list[int]
) -> None:
    run = tmp_path_factory.mktemp("run")
    whole = written(run, [start_event(), *events])
    path, follower = run / "metrics.jsonl", Follower(run)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    path.write_bytes(b"")
    for first, stop in pairwise(places):
        with open(path, "ab") as file:
            file.write(whole[first:stop])
        follower.look()
        assert same(follower.record, read_record(run)), "after a part of the file"
    assert follower.n_restarts == 0 and follower.n_damaged == 0


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    whole = written(tmp_path, [start_event(), train_event(1)])
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    path.write_bytes(whole[:-40])
    assert follower.look() and len(follower.record.train["step"]) == 0
    assert not follower.look(), "nothing was added"
    path.write_bytes(whole)
    assert follower.look() and follower.record.train["step"].tolist() == [1]
    assert follower.n_restarts == 0


def test_a_line_that_was_taken_back_and_written_again_is_read_once(tmp_path: Path) -> None:
    """What a full disk does: half a line, cut off again, and later the whole line."""
    whole = written(tmp_path, [start_event(), train_event(1), train_event(2)])
    end_of_first = len(whole) - len(whole.splitlines(keepends=True)[-1])
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    path.write_bytes(whole[: end_of_first + 20])
    follower.look()
    path.write_bytes(
        whole[:end_of_first] + b'{"event":"note","step":1,"text":"the disk was full"}\n' + whole[end_of_first:]
    )
    follower.look()
    assert same(follower.record, read_record(tmp_path))


def test_a_record_that_was_cut_back_is_read_anew(tmp_path: Path) -> None:
    append(tmp_path, events_until(30))
    follower = Follower(tmp_path)
    follower.look()
    held = follower.record
    MetricsLog(tmp_path / "metrics.jsonl").cut_back(20)
    append(tmp_path, [start_event(step=20), *(train_event(step, loss=1.0) for step in range(21, 60))])
    assert follower.look() and follower.n_restarts == 1
    assert same(follower.record, read_record(tmp_path))
    assert follower.record.train["loss"][-1] == 1.0
    assert held.last_step == 30 and held.train["loss"][-1] != 1.0, "a record that was given out does not change"


def test_a_file_written_over_in_place_is_read_anew_though_it_is_longer(tmp_path: Path) -> None:
    append(tmp_path, events_until(5))
    follower, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    follower.look()
    other = written(tmp_path / "other", [start_event(dataset="another"), *(train_event(step) for step in range(1, 30))])
    with open(path, "r+b") as file:  # the same file as far as the system knows
        file.write(other)
    assert follower.look() and same(follower.record, read_record(tmp_path))
    assert follower.record.dataset == "another"


def test_a_file_put_in_its_place_is_read_anew_though_it_ends_alike(tmp_path: Path) -> None:
    append(tmp_path, events_until(5))
    follower, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    follower.look()
    write_atomic(path, path.read_text().replace('"tiny"', '"tony"'))
    assert follower.look() and follower.record.dataset == "tony"


def test_a_missing_file_is_waited_for_and_a_removed_one_forgotten(tmp_path: Path) -> None:
    run = tmp_path / "later"
    follower = Follower(run)

    def state() -> tuple[bool, bool, int]:
        return follower.look(), follower.exists, len(follower.record.runs)

    assert state() == (False, False, 0)
    append(run, events_until(3))
    assert state() == (True, True, 1)
    (run / "metrics.jsonl").unlink()
    assert state() == (True, False, 0)


def test_a_fifo_in_the_place_of_the_record_does_not_hold_the_reader(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert not Follower(tmp_path).look()


def test_only_what_was_appended_is_read(tmp_path: Path) -> None:
    """The first line is made unreadable after it was read: who reads it again would lose it."""
    append(tmp_path, events_until(9))
    follower, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    follower.look()
    with open(path, "r+b") as file:
        file.write(b"#" * 100)
    append(tmp_path, [train_event(10)])
    follower.look()
    assert len(follower.record.runs) == 1 and follower.record.last_step == 10 and follower.n_damaged == 0


def test_a_damaged_line_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(written(tmp_path, [start_event()]) + b'garbage\n[1]\n{"event":3,"step":1}\n\n')
    append(tmp_path, [train_event(1)])
    follower = Follower(tmp_path)
    follower.look()
    assert follower.n_damaged == 3 and follower.record.last_step == 1


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SMALL_BYTES", 4096)
    monkeypatch.setattr(follow, "CHUNK_BYTES", 1024)
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * 100_000 + b"\n")
    append(tmp_path, [start_event(), train_event(1)])
    follower = Follower(tmp_path)
    follower.look()
    assert follower.n_damaged > 0 and follower.record.last_step == 1


def test_the_newest_updates_are_enough_for_a_row_of_a_list(tmp_path: Path) -> None:
    append(tmp_path, events_until(200, max_steps=200))
    whole, short = Follower(tmp_path), Follower(tmp_path, newest=10)
    for follower in (whole, short):
        follower.look()
    assert len(short.record.train["step"]) == 10
    assert short.record.train["loss"].tolist() == whole.record.train["loss"][-10:].tolist()
    assert short.record.evals == whole.record.evals and short.record.tokens == whole.record.tokens


def test_an_event_costs_little_once_a_long_record_is_read(tmp_path: Path) -> None:
    append(tmp_path, [start_event(20_000)])
    line = written(tmp_path / "one", [train_event(1)]).decode()
    lines = [line.replace('"step":1,', f'"step":{step},') for step in range(1, 20_001)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.writelines(lines)
    follower = Follower(tmp_path)
    began_s = time.perf_counter()
    follower.look()
    whole_s, later_s = time.perf_counter() - began_s, math.inf
    for step in range(20_001, 20_011):
        append(tmp_path, [train_event(step)])
        began_s = time.perf_counter()
        follower.look()
        later_s = min(later_s, time.perf_counter() - began_s)
    assert len(follower.record.train["step"]) == 20_010
    assert later_s < whole_s / 200, f"{1e6 * later_s:.0f} us for an event, {1e3 * whole_s:.0f} ms for all"
