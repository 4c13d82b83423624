"""A run that stands still ends in time and says why; one that moves, sleeps as a whole or cannot write is left alone.

Real processes in the place of ranks; their collective is a folder in which each leaves a file and waits for the others.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regpt2.base.ranks.heartbeats import Beat, Diagnosis, judge, publish, read_verdict
from regpt2.base.ranks.watchdog import HUNG, Watchdog

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")

TIMEOUT_S = 2.0
RANK = """
import ctypes, sys, time
from pathlib import Path
from regpt2.base.ranks.watchdog import Watchdog

run, rank, size, timeout_s, fault, fault_at, steps, step_s = Path(sys.argv[1]), *map(eval, sys.argv[2:])

def collective(step, ranks=size):
    (run / f"{step}.{rank}").touch()
    while not all((run / f"{step}.{other}").exists() for other in range(ranks)):
        time.sleep(0.01)

def forward():
    time.sleep(step_s)

def stuck_in_python():
    time.sleep(600)

def stuck_in_c():
    while True:
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the GIL

def stuck_in_collective():
    collective("never", size + 1)

def stuck_in_full_pipe():
    while True:
        sys.stderr.write("x" * 1000)

def late():
    time.sleep(0.35 * timeout_s)

def leave():
    raise ValueError("planted")

with Watchdog(run / "ranks", rank, size, timeout_s) as watchdog:
    for step in range(steps):
        watchdog.beat(f"update {step}, micro-step 0")
        if step == fault_at and fault:
            globals()[fault]()
        forward()
        watchdog.beat(f"update {step}, micro-step 1")
        collective(step)
print("torch" in sys.modules)
"""


class Ranks:
    """The processes of one run. `faults` names what goes wrong in which rank."""

    def __init__(
        self, run: Path, size: int, faults: dict[int, str] | None = None, *, steps: int = 1000, step_s: float = 0.02
    ) -> None:
        self.run, self.began_at = run, time.monotonic()
        (run / "rank.py").write_text(RANK)
        self.processes = []
        for rank in range(size):
            values = (rank, size, TIMEOUT_S, (faults or {}).get(rank, ""), 3, steps, step_s)
            command = [sys.executable, run / "rank.py", run, *map(repr, values)]
            pipe = subprocess.PIPE
            self.processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))

    def wait_for_step(self, step: int) -> None:
        """Until all ranks have made it; the clock of the fault starts here."""
        deadline = time.monotonic() + 30
        while not all((self.run / f"{step}.{rank}").exists() for rank in range(len(self.processes))):
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.01)
        self.began_at = time.monotonic()

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)

    def ends(self, within_s: float) -> tuple[list[int], str]:
        """Exit codes and all that was said to standard error."""
        for process in self.processes:
            process.wait(max(0.01, within_s - (time.monotonic() - self.began_at)))
        said = "".join(process.communicate()[1] for process in self.processes)
        return [process.returncode for process in self.processes], said

    def stacks(self, rank: int) -> str:
        return (self.run / "ranks" / f"rank-{rank:05d}.stacks.txt").read_text()


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ranks; none outlives the test."""
    runs: list[Ranks] = []

    def begin(size: int, faults: dict[int, str] | None = None, **options: float) -> Ranks:
        runs.append(Ranks(tmp_path, size, faults, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield begin
    for process in (process for ranks in runs for process in ranks.processes):
        process.kill()
        process.communicate()


def test_a_stopped_rank_is_named_dumped_and_killed(start: Start) -> None:
    ranks = start(3)
    ranks.wait_for_step(3)
    ranks.send(signal.SIGSTOP, 1)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, -signal.SIGKILL, HUNG]
    assert said.count("no progress for 2 s") == 1, said
    assert f"hangs: rank 1 (process {ranks.processes[1].pid} on " in said
    assert "waiting: 2 of 3 ranks at 'update " in said
    assert "rank 1, innermost call first:\n    File " in said
    assert "rank.py" in ranks.stacks(1) and ranks.stacks(1).count("(most recent call first)") == 2  # dumped once
    assert "in collective" in ranks.stacks(0) and "in collective" in ranks.stacks(2)
    places = {re.search("no progress at (.*)", ranks.stacks(rank)).group(1) for rank in (0, 2)}  # type: ignore[union-attr]
    assert len(places) == 1 and places.pop() in said  # nobody was woken before all had said where they hang


def test_a_rank_that_sleeps_in_python_is_behind(start: Start) -> None:
    ranks = start(3, {0: "late", 2: "stuck_in_python"})
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, HUNG, HUNG]
    assert said.count("no progress for 2 s") == 1, said
    assert f"behind: rank 2 (process {ranks.processes[2].pid} on " in said
    assert "at 'update 3, micro-step 0'" in said and "waiting: 2 of 3 ranks at 'update 3, micro-step 1'" in said
    assert "in stuck_in_python" in said and "hangs" not in said
    late = json.loads((ranks.run / "ranks" / "rank-00000.json").read_text())
    assert TIMEOUT_S / 2 <= late["idle_s"] < TIMEOUT_S  # it joins the verdict of a rank whose time is up
    assert "in collective" in ranks.stacks(0) and "in collective" in ranks.stacks(1)


def test_a_rank_that_keeps_the_gil_in_c_is_dumped_and_killed(start: Start) -> None:
    ranks = start(3, {0: "stuck_in_c"})
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [-signal.SIGKILL, HUNG, HUNG]
    assert f"hangs: rank 0 (process {ranks.processes[0].pid} on " in said
    assert "in stuck_in_c" in said and "in stuck_in_c" in ranks.stacks(0)


def test_nobody_is_blamed_when_all_wait_at_the_same_place(start: Start) -> None:
    ranks = start(2, dict.fromkeys(range(2), "stuck_in_collective"))
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, HUNG]
    assert "nobody is behind: 2 of 2 ranks at 'update 3, micro-step 0'" in said
    assert "in stuck_in_collective" in ranks.stacks(0) and "in stuck_in_collective" in ranks.stacks(1)


def test_a_rank_that_left_by_an_error_is_named(start: Start) -> None:
    ranks = start(2, {1: "leave"})
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, 1]
    assert "hangs: rank 1 " in said and "at 'update 3, micro-step 0, left by ValueError'" in said


def test_one_process_alone_ends_too_even_if_nobody_reads_what_it_says(start: Start) -> None:
    ranks = start(1, {0: "stuck_in_full_pipe"})
    ranks.wait_for_step(2)
    assert ranks.processes[0].wait(TIMEOUT_S + 5) == HUNG
    assert "in stuck_in_full_pipe" in ranks.stacks(0)


def test_a_run_that_was_suspended_as_a_whole_goes_on(start: Start, tmp_path: Path) -> None:
    ranks = start(2, {1: "late"}, steps=6)
    ranks.wait_for_step(2)
    time.sleep(0.15 * TIMEOUT_S)  # now rank 0 waits for rank 1, and has no beat when it goes on
    ranks.send(signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT_S)
    ranks.send(signal.SIGCONT, 0)
    time.sleep(0.3 * TIMEOUT_S)  # not all in the same moment
    ranks.send(signal.SIGCONT, 1)
    codes, said = ranks.ends(30)
    assert (codes, said) == ([0, 0], "")
    assert not (tmp_path / "ranks").exists()


def test_a_slow_run_is_left_alone_and_leaves_nothing_behind(start: Start, tmp_path: Path) -> None:
    leave_traces_of_a_former_attempt(tmp_path / "ranks")
    ranks = start(2, steps=3, step_s=0.75 * TIMEOUT_S)  # long enough to look at the others' files, and a verdict
    codes, said = ranks.ends(30)
    assert (codes, said) == ([0, 0], "")
    assert not (tmp_path / "ranks").exists()


def test_traces_of_a_former_attempt_do_not_mislead_but_its_stacks_stay(start: Start, tmp_path: Path) -> None:
    leave_traces_of_a_former_attempt(tmp_path / "ranks")
    (tmp_path / "ranks" / "rank-00000.stacks.txt").write_text("stacks of yesterday\n")
    ranks = start(2, {0: "stuck_in_python"})
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, HUNG]
    assert "behind: rank 0 " in said and "yesterday" not in said
    assert ranks.stacks(0).startswith("stacks of yesterday\n") and "in stuck_in_python" in ranks.stacks(0)
    assert not (tmp_path / "ranks" / "rank-00005.json").exists()


def leave_traces_of_a_former_attempt(folder: Path) -> None:
    """Of six ranks: beats, empty stacks, and a verdict."""
    folder.mkdir()
    for rank in range(6):
        old = beat(rank, doing="yesterday", pid=1)
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(vars(old)))
        (folder / f"rank-{rank:05d}.stacks.txt").touch()
    (folder / "verdict.json").write_text('{"text": "yesterday", "suspects": [1], "ends": {"1": 0}}')


def test_a_run_that_cannot_write_goes_on_and_says_it_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    ranks = start(2, steps=20, step_s=0.05)
    codes, said = ranks.ends(30)
    assert codes == [0, 0]
    assert said.count(" cannot write: ") == 2  # once for each rank


def test_a_hang_that_cannot_be_written_down_ends_too(start: Start, tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    ranks = start(2, {1: "stuck_in_python"})
    ranks.wait_for_step(2)
    codes, said = ranks.ends(TIMEOUT_S + 5)
    assert codes == [HUNG, HUNG]
    assert "rank 1 at 'update 3, micro-step 0'" in said and "cannot be written" in said
    assert "in stuck_in_python" in said  # the stacks go where the words go


def test_stacks_can_be_asked_for_while_the_run_goes_on(start: Start) -> None:
    ranks = start(1, steps=40, step_s=0.05)
    ranks.wait_for_step(5)
    ranks.send(signal.SIGUSR2)
    codes, _ = ranks.ends(30)
    assert codes == [0]
    assert "in forward" in ranks.stacks(0)


def test_it_needs_no_torch(start: Start) -> None:
    ranks = start(1, steps=1)
    assert ranks.processes[0].communicate(timeout=30)[0] == "False\n"


def test_a_beat_costs_almost_nothing_and_a_timeout_of_zero_is_off(tmp_path: Path) -> None:
    for timeout_s in (60.0, 0.0):
        with Watchdog(tmp_path / "ranks", 0, 1, timeout_s) as watchdog:
            assert (tmp_path / "ranks").exists() == bool(timeout_s)
            took_s = []
            for _ in range(20):
                began_at = time.perf_counter()
                for _ in range(1000):
                    watchdog.beat("update 1, micro-step 1")
                took_s.append((time.perf_counter() - began_at) / 1000)
        assert min(took_s) < 5e-6
        assert not (tmp_path / "ranks").exists()


def beat(
    rank: int, *, ticks: int = 10, beats: int = 7, doing: str = "here", host: str = "a", pid: int | None = None
) -> Beat:
    return Beat(rank, host, pid or 100 + rank, 50, 1, beats, ticks, doing, 0.0, 0, "2026-01-01T00:00:00+00:00")


def test_a_frozen_rank_is_ended_by_a_sound_one_of_its_own_machine() -> None:
    hosts = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c"}
    before = {rank: beat(rank, host=host) for rank, host in hosts.items()}
    now = {rank: beat(rank, host=host, ticks=10 if rank in (2, 4) else 20) for rank, host in hosts.items()}
    verdict = judge(before, now, judging=0, size=6)
    assert verdict.suspects == [2, 4]
    assert verdict.ends == {"2": 3}  # nobody is left on c
    assert "no sign of: rank 5" in verdict.text


def test_who_is_behind_is_counted_only_where_ranks_differ() -> None:
    before = {rank: beat(rank) for rank in range(3)}
    here = {rank: beat(rank, ticks=20, beats=7 + rank) for rank in range(3)}
    assert judge(before, here, judging=0, size=3).suspects == []
    there = {**here, 2: beat(2, ticks=20, beats=3, doing="sampling")}
    assert judge(before, there, judging=0, size=3).suspects == [2]


def test_of_two_verdicts_the_first_holds(tmp_path: Path) -> None:
    first, second = Diagnosis("first", [1], {"1": 0}), Diagnosis("second", [], {})
    assert (publish(tmp_path, 1, first), publish(tmp_path, 0, second)) == (True, False)
    assert read_verdict(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


def test_work_of_one_rank_alone_is_not_counted(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "ranks", 0, 1, 1.0) as watchdog:
        watchdog.beat("update 1")
        watchdog.beat("sampling", counted=False)
        path = tmp_path / "ranks" / "rank-00000.json"
        deadline = time.monotonic() + 10
        while (seen := json.loads(path.read_text()))["doing"] != "sampling" and time.monotonic() < deadline:
            time.sleep(0.05)
    assert (seen["doing"], seen["beats"], seen["pid"]) == ("sampling", 1, os.getpid())
