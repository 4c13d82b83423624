"""kill -9 and the order of writes (1, 2, 3). In: a bench; out: does every resumed run equal the undisturbed one?"""

import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import points
import trial
from suite import Bench, Fault, NotHere, Outcome

KILLED = 128 + signal.SIGKILL
# Two micro-steps in an update instead of four: these faults train more than all others together.
RECIPES = {name: recipe.replace("batch_tokens = 256", "batch_tokens = 128") for name, recipe in trial.RECIPES.items()}
MOST_S = 2.0  # until a kill: an idle machine needs under one for a whole run, a busy one must not take minutes


def at_random_times(bench: Bench) -> Outcome:
    """Kill, go on, kill again until so many kills were made; each run's end must be the undisturbed end."""
    outcome, lost = Outcome(), []
    for n, optimizer in enumerate(RECIPES, 1):
        _kill_and_go_on(bench, outcome, lost, bench.planned * n // len(RECIPES), optimizer)
    _through_the_command(bench, outcome)
    outcome.remark = (
        f"a third with Muon, one in windows; at most {max(lost)} updates lost, a checkpoint every {trial.SAVE_EVERY}"
    )
    return outcome


def _kill_and_go_on(bench: Bench, outcome: Outcome, lost: list[int], until: int, optimizer: str) -> None:
    """Runs with one optimizer until so many kills were made in all, each uniform over the time of a whole run."""
    recipe = RECIPES[optimizer]
    expected = trial.reference(bench, recipe)
    began_at = time.monotonic()
    trial.finish(bench, bench.new("timed"), recipe=recipe)
    whole_s = min(MOST_S, time.monotonic() - began_at)
    while outcome.injected < until:
        run = bench.new(optimizer)
        while outcome.injected < until:
            process = trial.start(bench, run, recipe=recipe)
            time.sleep(bench.rng.uniform(0, whole_s))
            if process.kill() != KILLED:
                break  # it was faster, and is done
            wrong = trial.unloadable(run) + _lost_too_much(run, lost)
            outcome.fired(not wrong, "; ".join(wrong))
        trial.finish(bench, run, recipe=recipe)
        outcome.same(trial.digest(run), expected, run.name)
        shutil.rmtree(run)


def _lost_too_much(run: Path, lost: list[int]) -> list[str]:
    """At most one save interval, and what was made while the next save was still being written."""
    lost.append(trial.last_logged(run) - trial.newest_step(run))
    saving = any((run / "checkpoints").glob("tmp-*"))
    allowed = trial.SAVE_EVERY * (2 if saving else 1)
    return [f"{lost[-1]} updates lost, {allowed} allowed"] if lost[-1] > allowed else []


def _through_the_command(bench: Bench, outcome: Outcome) -> None:
    """The same with the command line itself, so that nothing hides in the fork."""
    run = bench.new("run")
    for step in (3, 13)[: bench.planned]:
        process = bench.start(*trial.arguments(bench, run, recipe=RECIPES["adamw"]))
        while trial.last_logged(run) < step and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=60)
        wrong = trial.unloadable(run)
        outcome.fired(process.returncode == -signal.SIGKILL and not wrong, f"exit {process.returncode}; {wrong}")
    trial.finish(bench, run, recipe=RECIPES["adamw"])
    outcome.same(trial.digest(run), trial.reference(bench, RECIPES["adamw"]), "the run by the command line")


SAVED_AT, STEP_AT = 16, 11  # a save that also removes an old checkpoint; an update between saves
OBSERVED_AT = {"evaluation": 16, "sample": 24, "page": 24}  # a checkpoint is written at the same step


def at_each_point(bench: Bench) -> Outcome:
    """Die at every named point once, in writing, training, observing and going on."""
    outcome, missed = Outcome(), []
    expected = trial.reference(bench, RECIPES["adamw"])
    cases = (
        [("save", p) for p in points.SAVE] + [("step", p) for p in points.STEP] + [("go on", p) for p in points.RESUME]
    )
    stopped = _stopped_run(bench)
    chosen = cases if bench.planned >= len(cases) else bench.rng.sample(cases, bench.planned)
    for stage, point in chosen:
        run = Path(shutil.copytree(stopped, bench.new("run")))
        if not _dies_there(bench, run, stage, point):
            missed.append(point.name)
            continue
        wrong = trial.unloadable(run)
        outcome.fired(not wrong, f"{point.name}: {'; '.join(wrong)}")
        trial.finish(bench, run, recipe=RECIPES["adamw"])
        outcome.same(trial.digest(run), expected, point.name)
        shutil.rmtree(run)
    outcome.remark = f"{len(chosen) - len(missed)} of {len(chosen)} points reached"
    if missed:
        outcome.failures.append(f"never reached: {', '.join(missed)}")
    if bench.planned >= len(cases):
        _in_the_middle(bench, outcome)
    return outcome


N_POINTS = len(points.SAVE) + len(points.STEP) + len(points.RESUME) + len(points.MIDDLE)


def _stopped_run(bench: Bench) -> Path:
    """A run killed between two checkpoints. Every case begins with a copy of it, which spares the first updates."""
    run = bench.folder / "stopped"
    before = partial(points.arm, points.STEP[0], STEP_AT)
    process = trial.start(bench, run, recipe=RECIPES["adamw"], before=before)
    assert process.wait() == KILLED
    return run


def _dies_there(bench: Bench, run: Path, stage: str, point: points.Point) -> bool:
    observed_at = OBSERVED_AT.get(point.name.split()[-1])
    step = observed_at or {"save": SAVED_AT, "go on": 0}.get(stage, STEP_AT)

    def when_saved() -> None:
        """The hardest moment of observing: the next start begins after this step, and has to observe it."""
        deadline = time.monotonic() + 5
        while not (run / "checkpoints" / f"step-{step:08d}").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        points.die()

    before = partial(points.arm, point, step, when_saved if observed_at else None)
    process = trial.start(bench, run, recipe=RECIPES["adamw"], before=before, page="page" in point.name)
    return process.wait() == KILLED


def _in_the_middle(bench: Bench, outcome: Outcome) -> None:
    """Die in the write of a file of many megabytes: part of it is there, and it must not count."""
    expected = trial.reference(bench, trial.BIG_RECIPE)
    for point in points.MIDDLE:
        run, share = _dies_writing(bench, point)
        if run is None:
            outcome.failures.append(f"no kill fell {point.name}")
            continue
        wrong = trial.unloadable(run)
        outcome.fired(not wrong, f"{point.name}: {'; '.join(wrong)}")
        trial.finish(bench, run, recipe=trial.BIG_RECIPE)
        outcome.same(trial.digest(run), expected, point.name)
        outcome.remark += f"; killed with {share:.0%} of a large file written"


def _dies_writing(bench: Bench, point: points.Point) -> tuple[Path | None, float]:
    """A run that ended with a part of a file written, and how large that part is.

    A write takes a few milliseconds, more or fewer on another machine: the moment is found by trying.
    """
    after_s = 0.004
    for _ in range(16):
        run = bench.new("big")
        before = partial(points.arm_timer, point, SAVED_AT, after_s)
        code = trial.start(bench, run, recipe=trial.BIG_RECIPE, before=before).wait()
        folder = run / "checkpoints"
        unfinished = [path.stat() for path in folder.glob(f"tmp-step-{SAVED_AT:08d}*/.tmp*")]
        share = 512 * unfinished[0].st_blocks / max(1, unfinished[0].st_size) if unfinished else 0.0
        if code == 128 + signal.SIGALRM and 0 < share < 1:
            return run, share
        whole = any(folder.glob(f"*step-{SAVED_AT:08d}*/{point.name.split()[-1]}.safetensors"))
        too_late = code != 128 + signal.SIGALRM or whole or share >= 1
        after_s *= bench.rng.uniform(0.4, 0.9) if too_late else bench.rng.uniform(1.1, 1.9)
        shutil.rmtree(run)
    return None, 0.0


CALLS = "openat,creat,fsync,fdatasync,rename,renameat,renameat2"


def order_of_writes(bench: Bench) -> Outcome:
    """What would survive a power loss: contents are on disk before a rename, the rename before anything else."""
    if not shutil.which("strace"):
        raise NotHere("strace is not installed")
    outcome, run, folder = Outcome(), bench.new("run"), bench.new("trace")
    folder.mkdir()
    steps = 2 * bench.planned
    argv = bench.command(*trial.arguments(bench, run, "--max-steps", steps, "--save-every", 2, "--eval-every", 0))
    # a file for each thread: the calls of one save are in one of them, in order, and none is cut in two
    strace = ["strace", "-ff", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(folder / "thread")]
    done = subprocess.run([*strace, *argv], capture_output=True, text=True, timeout=120, check=False)
    if "ptrace" in done.stderr:
        raise NotHere("this machine does not allow tracing")
    assert done.returncode == 0, done.stderr[-2000:]
    threads = [path.read_text().splitlines() for path in folder.iterdir()]
    for step in range(2, steps + 1, 2):
        wrong = _out_of_order(threads, f"step-{step:08d}")
        outcome.fired(not wrong, f"step {step}: {'; '.join(wrong)}")
    outcome.remark = f"{sum(map(len, threads)):,} calls read"
    return outcome


def _out_of_order(threads: list[list[str]], name: str) -> list[str]:
    """What is not on disk yet when the folder of a checkpoint gets its final name, and what is not right after it."""
    for calls in threads:
        unsynced: set[str] = set()  # files and folders whose contents are in memory alone
        for n, call in enumerate(calls):
            if opened := re.match(r"openat\(.*O_(?:WRONLY|RDWR).*O_CREAT.* = \d+<(.*)>$", call):
                unsynced |= {opened[1], os.path.dirname(opened[1])}
            elif synced := re.match(r"f(?:data)?sync\(\d+<(.*)>\)", call):
                unsynced.discard(synced[1])
            elif renamed := re.match(r'rename\w*\([^"]*"(.*?)", [^"]*"(.*?)"', call):
                old, new = renamed[1], renamed[2]
                if os.path.basename(new) == name:
                    return _unsynced_below(old, unsynced) + _parent_not_synced(
                        os.path.dirname(new), calls[n + 1 : n + 3]
                    )
                unsynced = {new if path == old else path for path in unsynced} | {os.path.dirname(new)}
    return [f"nothing was renamed to {name}"]


def _unsynced_below(folder: str, unsynced: set[str]) -> list[str]:
    return [f"{path} is not on disk at the rename" for path in sorted(unsynced) if path.startswith(folder)]


def _parent_not_synced(folder: str, following: list[str]) -> list[str]:
    synced = any("fsync(" in call and f"<{folder}>" in call for call in following)
    return [] if synced else [f"{folder} is not fsynced right after the rename"]


FAULTS = [
    Fault(1, "kill -9 at random times", (40, 200), at_random_times),
    Fault(2, "kill -9 at each named point", (N_POINTS, N_POINTS), at_each_point),
    Fault(3, "order of writes under strace", (4, 12), order_of_writes),
]
