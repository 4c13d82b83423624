"""A closed terminal, output that nobody takes (37, 38). In: a bench; out: saved, or finished, and noted once?"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import points
import ranks
import trial
from suite import Bench, Fault, Outcome

from regpt2 import cli

STEP = 10
BACKWARD = points.Point("backward", "torch:Tensor.backward", nth=2)
SAVED = 128 + signal.SIGHUP


def hangups(bench: Bench) -> Outcome:
    """SIGHUP, from a terminal, past `nohup`, through torchrun: saved and left, or not heard, and the same bits."""
    outcome = Outcome()
    cases = (_hangup, _closed_terminal, _ignored, _nohup_torchrun)
    for inject in cases[: bench.planned]:
        inject(bench, outcome)
    return outcome


def _hangup(bench: Bench, outcome: Outcome) -> None:
    """The signal alone: the screen is still there."""
    run = bench.new("run")
    before = partial(points.arm, BACKWARD, STEP, partial(signal.raise_signal, signal.SIGHUP))
    process = trial.start(bench, run, before=before)
    wrong = _left(process.wait(), run, notes=0)
    wrong += [] if "SIGHUP: stopping" in process.said and "Traceback" not in process.said else ["no message"]
    outcome.fired(not wrong, f"SIGHUP: {wrong}: {process.said[-300:]}")
    trial.finish(bench, run)
    _same(bench, outcome, run, "SIGHUP")


def _closed_terminal(bench: Bench, outcome: Outcome) -> None:
    """The system itself sends the signal, and from then on neither output can be written."""
    run, reached = bench.new("run"), bench.new("reached")
    master, slave = os.openpty()
    os.set_blocking(master, False)

    def wait_for_the_end() -> None:
        reached.touch()
        deadline = time.monotonic() + 10
        while os.isatty(1) and time.monotonic() < deadline:
            time.sleep(0.002)

    def sit_at_it() -> None:
        os.close(master)
        own = os.open(os.ttyname(slave), os.O_RDWR)  # it becomes the terminal of this session
        for number in (0, 1, 2):
            os.dup2(own, number)
        os.close(own)
        os.close(slave)
        points.arm(BACKWARD, STEP, wait_for_the_end)

    def shown() -> bool:
        with suppress(BlockingIOError):
            os.read(master, 1 << 16)
        return reached.exists()

    process = trial.start(bench, run, before=sit_at_it)
    os.close(slave)
    process.until(shown)
    os.close(master)
    wrong = _left(process.wait(), run, notes=2)
    outcome.fired(not wrong, f"a closed terminal: {wrong}")
    trial.finish(bench, run)
    _same(bench, outcome, run, "a closed terminal")


def _ignored(bench: Bench, outcome: Outcome) -> None:
    """As `nohup` starts a process: it hears nothing of it."""
    run = bench.new("run")

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        points.arm(BACKWARD, STEP, partial(signal.raise_signal, signal.SIGHUP))

    process = trial.start(bench, run, before=nohup)
    outcome.fired(process.wait() == 0, f"ignored: exit code {process.exit_code}: {process.said[-300:]}")
    _same(bench, outcome, run, "ignored")


def _nohup_torchrun(bench: Bench, outcome: Outcome) -> None:
    """torchrun hears it all the same, and passes it on to ranks that do not ignore it."""
    expected = ranks.undisturbed(bench)
    run = bench.new("run")
    agent, log = ranks.torchrun(bench, run, launcher=("nohup",))
    ranks.wait_until(lambda: trial.newest_step(run) >= 40 or agent.poll() is not None, log, "the first checkpoint")
    at = trial.last_logged(run)
    agent.send_signal(signal.SIGHUP)
    agent.wait(60)
    wrong = _left(SAVED, run, notes=0)
    wrong += [] if at <= trial.newest_step(run) < ranks.STEPS_UNDER_TORCHRUN else [f"{trial.newest_step(run)} is saved"]
    outcome.fired(not wrong, f"nohup torchrun: {wrong}: {log.read_text()[-900:]}")
    ranks.finish_ranks(bench, run, 2, *ranks.LONG)
    outcome.same(trial.digest(run, ranks.STEPS_UNDER_TORCHRUN), expected, "nohup torchrun")


def _same(bench: Bench, outcome: Outcome, run: Path, what: str) -> None:
    """The end of a run that got so far is that of the undisturbed one."""
    if (run / "metrics.jsonl").exists():
        outcome.same(trial.digest(run), trial.reference(bench), what)


def _left(code: int, run: Path, notes: int) -> list[str]:
    """Saved, said in the record, tidied up."""
    wrong = [] if code == SAVED else [f"exit code {code}"]
    wrong += [] if trial.newest_step(run) >= STEP else [f"the newest checkpoint is of {trial.newest_step(run)}"]
    wrong += [] if _reason(run) == f"stopped by signal {int(signal.SIGHUP)}" else [f"its end is {_reason(run)!r}"]
    wrong += [] if len(_notes(run)) == notes else [f"notes: {_notes(run)}"]
    return wrong + (["ranks/ is left behind"] if (run / "ranks").exists() else [])


def _reason(run: Path) -> str:
    """Of the end, as the record has it."""
    return next((str(event["reason"]) for event in _events(run, "end")), "")


def _notes(run: Path) -> list[str]:
    """What the record says of standard output and standard error."""
    return [event["text"] for event in _events(run, "note") if "cannot be written" in event["text"]]


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    return trial.events(run, kind) if (run / "metrics.jsonl").exists() else []


def dead_output(bench: Bench) -> Outcome:
    """Standard output and error whose reader leaves, on a full disk, closed: finished as if undisturbed, noted once."""
    outcome = Outcome()
    cases = (
        partial(_dies_at, what="the reader left", arm=_a_pipe, reason="Broken pipe"),
        partial(_dies_at, what="a full disk", arm=_a_full_disk, reason="No space left on device"),
        _closed_by_the_shell,
        _head,
        _prepared,
    )
    for inject in cases[: bench.planned]:
        inject(bench, outcome)
    return outcome


def _a_pipe(step: int) -> None:
    """Both into a pipe whose reader leaves in that update."""
    reading, writing = os.pipe()
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    points.arm(BACKWARD, step, partial(os.close, reading)) if step else os.close(reading)


def _a_full_disk(step: int) -> None:
    def fill() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for number in (1, 2):
            os.dup2(full, number)
        os.close(full)

    points.arm(BACKWARD, step, fill)


def _dies_at(bench: Bench, outcome: Outcome, *, what: str, arm: Callable[[int], None], reason: str) -> None:
    """In the middle of a run, with its page to be drawn at the end."""
    run = bench.new("run")
    process = trial.start(bench, run, before=lambda: arm(STEP), page=True)
    outcome.fired(not (wrong := _finished(process.wait(), run, [reason])), f"{what}: {wrong}: {process.said[-300:]}")
    _same(bench, outcome, run, what)


def _closed_by_the_shell(bench: Bench, outcome: Outcome) -> None:
    """`<&- >&- 2>&-`: numbers 0 to 2 are free, and what the command opens must not get them."""
    run = bench.new("run")
    process = trial.start(bench, run, before=_close, page=True)
    outcome.fired(not (wrong := _finished(process.wait(), run, ["it is closed"])), f"closed by the shell: {wrong}")
    _same(bench, outcome, run, "closed by the shell")


def _close() -> None:
    """As the interpreter finds them, and says it: there is no such object."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.close(number)
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)


def _finished(code: int, run: Path, reasons: list[str]) -> list[str]:
    """To the end, with its page, and one note for each stream."""
    wrong = [] if code == 0 else [f"exit code {code}"]
    expected = [f"standard {name} cannot be written ({why}); the run continues" for why in reasons for name in _STREAMS]
    wrong += [] if sorted(_notes(run)) == sorted(expected) else [f"notes: {_notes(run)}"]
    wrong += [] if _reason(run) == "finished" else [f"its end is {_reason(run)!r}"]
    return wrong + ([] if (run / "report.html").exists() else ["no report"])


_STREAMS = ("error", "output")


def _head(bench: Bench, outcome: Outcome) -> None:
    """`regpt2 train ... | head -1`, the real command: the interpreter that ends does not complain either."""
    run = bench.new("run")
    process = bench.start(*trial.arguments(bench, run), env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said, code = process.stderr.read(), process.wait(60)
    wrong = [] if code == 0 else [f"exit code {code}"]
    wrong += [] if said.count("standard output cannot be written (Broken pipe)") == 1 else ["not said once"]
    wrong += ["a complaint"] if "Exception" in said or "Traceback" in said else []
    wrong += [] if len(_notes(run)) == 1 else [f"notes: {_notes(run)}"]
    outcome.fired(not wrong, f"head: {wrong}: {said[-500:]}")
    _same(bench, outcome, run, "head")


def _prepared(bench: Bench, outcome: Outcome) -> None:
    """Data that is prepared for nobody who looks is the same, byte for byte."""
    trial.prepare_data(bench)
    folder, options = bench.new("data"), ["--tokenizer", "bytes", "--workers", "1", "--shard-tokens", "50000"]
    argv = ["prepare", "text_files", "--input", str(bench.shared / "text" / "a.txt"), "--out", str(folder), *options]

    def work() -> int:
        _a_pipe(0)
        return cli.main(argv)

    process = bench.fork(work)
    outcome.fired(process.wait() == 0, f"prepare: exit code {process.exit_code}")
    outcome.same(trial.hashes(folder), trial.hashes(bench.shared / "data"), "prepare")


FAULTS = [
    Fault(37, "a closed terminal, SIGHUP", (4, 4), hangups),
    Fault(38, "standard output that is gone", (5, 5), dead_output),
]
