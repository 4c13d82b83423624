"""How a run does: running while its folder is locked, ended by its own word, killed otherwise."""

import os
import threading
import time
from pathlib import Path

import pytest
from growing import append, events_until, start_event, train_event

from regpt2.base.errors import UsageError
from regpt2.base.files import folder_lock, is_locked, try_lock
from regpt2.pages.live.folders import find_run, find_runs
from regpt2.pages.live.follow import Follower
from regpt2.pages.live.status import Status, status_of


def status(run: Path) -> Status:
    follower = Follower(run)
    follower.look()
    return status_of(follower)


def test_a_run_is_running_while_its_folder_is_locked_and_killed_after(tmp_path: Path) -> None:
    append(tmp_path, events_until(40))
    with folder_lock(tmp_path):
        running = status(tmp_path)
        assert running.state == "running" and not running.has_ended
    killed = status(tmp_path)
    assert killed.state == "killed" and killed.has_ended


@pytest.mark.parametrize(
    ("reason", "state", "rest"),
    [
        ("finished", "finished", ""),
        ("stopped by signal 15", "stopped", "stopped by signal 15"),
        ("stopped early: 3 validations in a row were not below 3.1", "stopped", None),
        ("failed: the disk is full", "failed", "the disk is full"),
    ],
)
def test_a_run_that_ended_says_how(tmp_path: Path, reason: str, state: str, rest: str | None) -> None:
    append(tmp_path, [*events_until(10), {"event": "end", "step": 10, "reason": reason, "elapsed_s": 7.0}])
    found = status(tmp_path)
    assert (found.state, found.reason, found.elapsed_s) == (state, reason if rest is None else rest, 7.0)


def test_a_resumed_run_is_running_though_it_was_stopped_before(tmp_path: Path) -> None:
    append(tmp_path, [*events_until(10), {"event": "end", "step": 10, "reason": "stopped by signal 2"}])
    append(tmp_path, [start_event(step=10, max_steps=200), train_event(11)])
    with folder_lock(tmp_path):
        found = status(tmp_path)
    assert (found.state, found.max_steps) == ("running", 200)


def test_time_left_is_the_tokens_left_by_the_speed_now(tmp_path: Path) -> None:
    append(tmp_path, [start_event(100), *(train_event(step, tokens_per_s=1.0) for step in range(1, 30))])
    append(tmp_path, [train_event(step, tokens_per_s=500.0) for step in range(30, 61)])
    with folder_lock(tmp_path):
        found = status(tmp_path)
    assert found.left_s == 40 * 1000 / 500
    assert found.share == 0.6


def test_a_copied_record_without_a_lock_is_running_while_it_grows(tmp_path: Path) -> None:
    append(tmp_path, events_until(10))
    assert status(tmp_path).state == "running"
    old = time.time() - 3600
    os.utime(tmp_path / "metrics.jsonl", (old, old))
    assert status(tmp_path).state == "killed"


def test_no_record_is_waiting(tmp_path: Path) -> None:
    assert status(tmp_path / "none").state == "waiting"


def test_who_asks_for_the_lock_does_not_keep_a_run_from_beginning(tmp_path: Path) -> None:
    """Asking takes the lock for a moment, here for a long one."""
    with open(tmp_path / ".lock", "a+b") as asking:
        assert try_lock(asking)
        threading.Timer(0.03, asking.close).start()
        with folder_lock(tmp_path):
            assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_locked_folder_is_still_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(UsageError, match="in use"), folder_lock(tmp_path):
        pass


def test_runs_are_found_down_to_the_seeds_of_a_comparison(tmp_path: Path) -> None:
    for name in ("demo", "compare/adamw/seed-1", "compare/muon/seed-1", "a/b/c/too_deep", ".hidden"):
        append(tmp_path / name, [start_event()])
    (tmp_path / "no_run").mkdir()
    assert [*find_runs(tmp_path)] == ["compare/adamw/seed-1", "compare/muon/seed-1", "demo"]
    assert find_run(tmp_path, "compare/muon/seed-1") == (tmp_path / "compare/muon/seed-1").resolve()


def test_a_name_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    append(runs / "demo", [start_event()])
    append(tmp_path / "secret", [start_event()])
    (runs / "link").symlink_to(tmp_path / "secret")
    (runs / "linked_record").mkdir()
    (runs / "linked_record" / "metrics.jsonl").symlink_to(tmp_path / "secret" / "metrics.jsonl")
    (runs / "within").symlink_to(runs / "demo")
    append(runs / os.fsdecode(b"no_utf8_\xff"), [start_event()])
    assert [*find_runs(runs)] == ["demo", "within"]
    for name in (
        "../secret", "demo/../../secret", "link", "linked_record", "/etc", str(tmp_path / "secret"), "", ".", "..",
        "demo/", "demo/.", "./demo", "demo\x00", "no_run", "DEMO ", "demo/metrics.jsonl", "a/b/c/d/e",
    ):  # fmt: skip
        assert find_run(runs, name) is None, name
    assert find_run(runs, "demo") and find_run(runs, "within")
