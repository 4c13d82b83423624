"""Does the fault suite notice? Each planted bug turns its fault red; without a bug the same faults are green."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("run.py")
# The fault that each bug must turn red, and how many injections are enough for that.
RED = {
    "naive_save": (3, 2),
    "rng_not_restored": (2, 2),
    "per_rank_shard_boundary": (31, 3),
    "mean_of_means": (32, 3),
    "nan_in_window": (13, 3),
    "any_host_is_ours": (24, 20),
    "slow_clients_are_kept": (25, 4),
    "queue_without_bound": (26, 100),
    "streams_are_cut": (27, 2),
}


def inject(folder: Path, *options: object) -> tuple[int, dict[int, dict[str, Any]]]:
    """The real suite with small counts: its exit code, and its rows by number."""
    result = folder / "result.json"
    command = [sys.executable, RUN, "--json", result, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, check=False)
    assert result.exists(), done.stdout + done.stderr
    return done.returncode, {row["number"]: row for row in json.loads(result.read_text())["faults"]}


@pytest.mark.slow  # as `make faults`, which CI runs too
def test_without_a_bug_the_faults_are_met(tmp_path: Path) -> None:
    numbers = ",".join(str(number) for number, _ in RED.values())
    code, rows = inject(tmp_path, "--only", numbers, "--count", 3)
    assert code == 0, [row["failures"] for row in rows.values()]
    assert len(rows) == len(RED)


@pytest.mark.parametrize(
    "plant", ["naive_save", *(pytest.param(name, marks=pytest.mark.slow) for name in list(RED)[1:])]
)
def test_a_planted_bug_turns_its_fault_red(tmp_path: Path, plant: str) -> None:
    number, count = RED[plant]
    code, rows = inject(tmp_path, "--only", number, "--count", count, "--plant", plant)
    if rows[number]["skipped"]:
        pytest.skip(rows[number]["skipped"])
    assert code == 1
    assert rows[number]["red"]
    assert rows[number]["injected"] >= count, "red because it never fired, not because the bug was noticed"


def test_fewer_injections_than_planned_are_red(tmp_path: Path) -> None:
    sys.path.insert(0, str(RUN.parent))
    from suite import Outcome

    outcome = Outcome()
    outcome.fired(True)
    assert not outcome.is_red(planned=1)
    assert outcome.is_red(planned=2)
    outcome.fired(False, "not noticed")
    assert outcome.is_red(planned=2)


GOOD_ORDER = [
    'openat(AT_FDCWD</>, "/c/tmp-step-00000002-9/.x", O_RDWR|O_CREAT) = 3</c/tmp-step-00000002-9/.x>',
    'renameat(AT_FDCWD</>, "/c/tmp-step-00000002-9/.x", AT_FDCWD</>, "/c/tmp-step-00000002-9/a") = 0',
    "fsync(3</c/tmp-step-00000002-9/a>) = 0",
    "fsync(3</c/tmp-step-00000002-9>) = 0",
    'rename("/c/tmp-step-00000002-9", "/c/step-00000002") = 0',
    'openat(AT_FDCWD</>, "/c", O_RDONLY) = 3</c>',
    "fsync(3</c>) = 0",
]


def test_every_fsync_that_is_left_out_is_seen_in_a_trace() -> None:
    sys.path.insert(0, str(RUN.parent))
    from kills import _out_of_order

    assert _out_of_order([GOOD_ORDER], "step-00000002") == []
    for n, call in enumerate(GOOD_ORDER):
        if "fsync" in call or call.startswith("rename("):
            assert _out_of_order([GOOD_ORDER[:n] + GOOD_ORDER[n + 1 :]], "step-00000002"), call
