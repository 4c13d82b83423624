"""Signals, a folder wanted by many, a wrong clock (6, 11, 12). In: a bench; out: saved, refused, unmoved?"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import points
import trial
from suite import Bench, Fault, Outcome

from regpt2.run import opening

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_STEP, STEP = 16, 10
MOMENTS = (
    ("forward", points.Point("forward", "regpt2.model.gpt:GPT.forward"), STEP),
    ("backward", points.Point("backward", "torch:Tensor.backward", nth=2), STEP),
    ("save", points.Point("save", "os:fsync", "before", r"/tmp-step-\d+.*/optimizer"), SAVE_STEP),
    ("eval", points.Point("eval", "regpt2.evals.val_loss:TokenStream.read", "after"), SAVE_STEP),
)
CASES = [(number, *moment) for moment in MOMENTS for number in SIGNALS]
FAST = [case for n, case in enumerate(CASES) if n % 4 in (0, 2)]


def signals(bench: Bench) -> Outcome:
    """Each signal at each moment: save, leave with 128 + n within an update and a save; the next start goes on."""
    outcome, slowest = Outcome(), 0.0
    cases = FAST if bench.planned <= len(FAST) + 3 else CASES
    for number, moment, point, step in cases[: bench.planned]:
        run, what, note = bench.new("run"), f"{number.name} in {moment}", bench.new("note")
        process = trial.start(bench, run, before=partial(_arm_signal, number, point, step, note))
        wrong = _left_well(process.wait(), process.said, number)
        received_in, stopped_at = int(note.read_text() if note.exists() else -1), trial.newest_step(run)
        if not (step <= received_in and received_in <= stopped_at <= received_in + 1):
            wrong.append(f"due in update {step}, received in {received_in}, the checkpoint is of {stopped_at}")
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}")
        trial.finish(bench, run)
        outcome.same(trial.digest(run), trial.reference(bench), what)
        shutil.rmtree(run)
    if bench.planned > len(cases):
        slowest = _from_outside(bench, outcome)
        _twice(bench, outcome)
    outcome.remark = f"the command saved and left within {slowest:.1f} s"
    return outcome


def _arm_signal(number: signal.Signals, point: points.Point, step: int, note: Path) -> None:
    """Raise a signal at a point; write down the update in which the loop received it.

    A save goes on beside the loop, which may have made more updates before the point in it is reached.
    """
    points.arm(point, step, partial(signal.raise_signal, number))
    clock = points.at_step()

    def wrap(receive: Callable[..., Any]) -> Callable[..., Any]:
        def received(*args: Any) -> Any:
            note.write_text(str(clock["step"]))
            return receive(*args)

        return received

    points.patch("regpt2.base.ranks.signals:StopSignals._receive", wrap)


def _left_well(code: int, said: str, number: signal.Signals) -> list[str]:
    wrong = [] if code == 128 + number else [f"exit code {code}"]
    return wrong + (["a traceback"] if "Traceback" in said else [])


def _from_outside(bench: Bench, outcome: Outcome) -> float:
    """The real command, signaled by another process; how long the slower one took to leave."""
    slowest = 0.0
    for number in (signal.SIGTERM, signal.SIGINT):
        run = bench.new("run")
        process = bench.start(*trial.arguments(bench, run, "--max-steps", 100_000, "--save-every", 90_000))
        while trial.last_logged(run) < 5 and process.poll() is None:
            time.sleep(0.01)
        at, sent_at = trial.last_logged(run), time.monotonic()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        slowest = max(slowest, time.monotonic() - sent_at)
        wrong = (
            _left_well(process.returncode, output + errors, number) if process.returncode >= 0 else ["it died of it"]
        )
        if not trial.newest_step(run) >= at:
            wrong.append(f"the checkpoint is of {trial.newest_step(run)}, the signal came after {at}")
        outcome.fired(not wrong, f"{number.name} from outside: {'; '.join(wrong)}")
    return slowest


def _twice(bench: Bench, outcome: Outcome) -> None:
    """A second Ctrl-C leaves at once, and damages nothing."""
    run = bench.new("run")
    times: list[float] = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    process = trial.start(bench, run, before=lambda: points.arm(MOMENTS[1][1], STEP, twice))
    trial.wait_for_step(process, run, STEP - 1)
    times.append(time.monotonic())
    wrong = _left_well(process.wait(), process.said, signal.SIGINT) + trial.unloadable(run)
    if (elapsed_s := time.monotonic() - times[0]) > 2.0:
        wrong.append(f"it took {elapsed_s:.1f} s")
    outcome.fired(not wrong, f"SIGINT twice: {'; '.join(wrong)}")
    trial.finish(bench, run)
    outcome.same(trial.digest(run), trial.reference(bench), "SIGINT twice")


def parallel_starts(bench: Bench) -> Outcome:
    """So many starts on one folder: one runs, the others are refused and name it; a lock after kill -9 is free."""
    outcome, run = Outcome(), bench.new("run")
    trial.prepare_data(bench)
    starts = [trial.start(bench, run, "--max-steps", 100_000, "--save-every", 50_000) for _ in range(bench.planned - 1)]
    deadline = time.monotonic() + 60
    while sum(process.running() for process in starts) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    winners = [process for process in starts if process.running()]
    assert winners, f"nobody won: {starts[0].said[-500:]}"
    trial.wait_for_step(winners[0], run, 3)
    for process in starts:
        if process is winners[0]:
            outcome.fired(process.running(), "the winner ended")
        else:
            refused = not process.running() and process.exit_code == 2 and f"process {winners[0].pid}" in process.said
            outcome.fired(refused, f"exit code {process.exit_code}: {process.said[-300:]}")
    for process in winners:
        process.kill()
    after = trial.start(bench, run, "--max-steps", 3)
    outcome.fired(after.wait() == 0, f"after kill -9 of the holder: {after.said[-300:]}")
    outcome.remark = f"{len(winners)} of {len(starts)} ran, then a stale lock was taken"
    return outcome


YEAR_S = 365 * 86_400.0


def wrong_clock(bench: Bench) -> Outcome:
    """A clock a year off, or jumping in mid-run, and files whose times lie: same bits, same choice of checkpoint."""
    outcome = Outcome()
    cases = [(f"{sign:+d} year, {when}", sign * YEAR_S, step) for sign in (-1, 1) for when, step in _WHEN]
    for what, offset_s, step in cases[: bench.planned]:
        run = bench.new("run")
        process = trial.start(bench, run, before=partial(_shift_clock, offset_s, step))
        wrong = [] if process.wait() == 0 else [f"exit code {process.exit_code}: {process.said[-300:]}"]
        moments = trial.events(run, "run") + trial.events(run, "train") + trial.events(run, "end")
        wrong += [
            f"{key} = {e[key]}"
            for e in moments
            for key in ("step_ms", "tokens_per_s", "elapsed_s")
            if e.get(key, 0) < 0
        ]
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong[:3])}")
        outcome.same(trial.digest(run), trial.reference(bench), what)
    if bench.planned > len(cases):
        _lying_times(bench, outcome)
    outcome.remark = "the clock as the process reads it" + ("" if shutil.which("faketime") else " (no faketime here)")
    return outcome


_WHEN = (("all along", 0), ("from update 10 on", STEP), ("to and fro", -1))


def _shift_clock(offset_s: float, step: int) -> None:
    """Move the clock of this process: at once, from an update on, or at every second look. Durations stay."""
    clock = points.at_step()
    looks = count()

    def shifted() -> float:
        if step < 0:
            return offset_s if next(looks) % 2 else 0.0
        return offset_s if clock["step"] >= step else 0.0

    plain = time.time

    class Moved(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(plain() + shifted(), tz)

    time.time = lambda: plain() + shifted()
    opening.datetime = Moved  # type: ignore[attr-defined]


def _lying_times(bench: Bench, outcome: Outcome) -> None:
    """The newest checkpoint is the one of the highest step, whatever the times of the files say."""
    run = bench.new("run")
    process = trial.start(bench, run, before=lambda: points.arm(points.STEP[0], SAVE_STEP + 2))
    process.wait()
    last = trial.newest_step(run)
    for n, folder in enumerate(sorted((run / "checkpoints").iterdir(), reverse=True)):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (n * YEAR_S, n * YEAR_S))  # the older the checkpoint, the newer it looks
    process = trial.start(bench, run)
    code = process.wait()
    went_on = re.search(r"resuming from step ([\d,]+)", process.said)
    outcome.fired(code == 0 and bool(went_on) and int(went_on[1]) == last, f"lying times: {process.said[-300:]}")
    outcome.same(trial.digest(run), trial.reference(bench), "lying times")


FAULTS = [
    Fault(6, "signals to one process", (len(FAST) + 3, len(CASES) + 3), signals),
    Fault(11, "parallel starts, stale lock", (21, 41), parallel_starts),
    Fault(12, "a wrong clock", (7, 7), wrong_clock),
]
