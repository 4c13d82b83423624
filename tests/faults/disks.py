"""A full disk, and folders that are none (7, 8). In: a bench; out: said in one message, and nothing lost?"""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import points
import trial
from suite import Bench, Fault, NotHere, Outcome

from regpt2.training import checkpoint


@contextmanager
def mounted(folder: Path, size: str, *more: str) -> Iterator[Path]:
    """A file system in memory of a given size.

    Raises:
        NotHere: this user may not mount.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *more)), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise NotHere(f"no mount command ({error})") from None
    if done.returncode:
        raise NotHere("tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def disk_full(bench: Bench) -> Outcome:
    """Checkpoints fill the disk, or the record does: what was good stays good, and the run goes on from it."""
    outcome = Outcome()
    cases = (_too_small, _others_fill_it, _full_in_the_middle, _file_size_limit, _record_fills_it)
    for inject in cases[: bench.planned]:
        inject(bench, outcome)
    return outcome


def _too_small(bench: Bench, outcome: Outcome) -> None:
    """Room for three checkpoints where all are to be kept: said with figures, at the latest when it is full."""
    _on_a_disk(bench, outcome, "a disk too small", "6m", lambda disk: None)


def _others_fill_it(bench: Bench, outcome: Outcome) -> None:
    """Another program takes the room while the run is under way."""
    _on_a_disk(
        bench, outcome, "a disk filled by others", "60m", lambda disk: points.arm(_BACKWARD, 10, lambda: fill(disk))
    )


def _full_in_the_middle(bench: Bench, outcome: Outcome) -> None:
    """As before, but the room goes between the check for it and the write."""

    def arm(disk: Path) -> None:
        points.patch("regpt2.training.checkpoint:require_free_space", lambda check: lambda *_: None)
        points.arm(_BACKWARD, 10, lambda: fill(disk))

    _on_a_disk(bench, outcome, "a disk full in the middle of a write", "60m", arm)


_BACKWARD = points.STEP[0]


def fill(disk: Path) -> None:
    """Take all but one megabyte."""
    free = shutil.disk_usage(disk).free
    (disk / "others").write_bytes(bytes(max(0, free - (1 << 20))))


def _on_a_disk(bench: Bench, outcome: Outcome, what: str, size: str, arm: Callable[[Path], None]) -> None:
    """A run ends with a message, keeps what was good, and ends as undisturbed once there is room."""
    with mounted(bench.new("disk"), size) as disk:
        run = disk / "run"
        process = trial.start(bench, run, "--keep-checkpoints", 0, before=lambda: arm(disk))
        code, said = process.wait(), process.said
        wrong = [] if code == 1 and "Traceback" not in said else [f"exit code {code}"]
        wrong += [] if str(run) in said and re.search("free|No space|space", said) else ["no message that names it"]
        wrong += ["a temporary folder is left"] if any((run / "checkpoints").glob("tmp-*")) else []
        wrong += trial.unloadable(run, keep=0)
        started = trial.last_logged(run) > 0
        wrong += ["no checkpoint is left"] if started and not trial.newest_step(run) else []
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}: {said[-400:]}")
        (disk / "others").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=120m", str(disk)], check=True)
        trial.finish(bench, run, "--keep-checkpoints", 0)
        outcome.same(trial.digest(run), trial.reference(bench), what)


def _file_size_limit(bench: Bench, outcome: Outcome) -> None:
    """RLIMIT_FSIZE from update 10 on: no more checkpoint can be written, and training goes on to its end."""
    run = bench.new("run")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    process = trial.start(bench, run, before=lambda: points.arm(points.STEP[0], 10, limit))
    code, said = process.wait(), process.said
    wrong = [] if code == 1 and "Traceback" not in said else [f"exit code {code}"]
    wrong += [] if trial.last_logged(run) == trial.STEPS else ["training did not go on"]
    wrong += [] if trial.newest_step(run) == 8 else [f"the newest checkpoint is of {trial.newest_step(run)}"]
    wrong += ["a temporary folder is left"] if any((run / "checkpoints").glob("tmp-*")) else []
    outcome.fired(not wrong, f"file size limit: {'; '.join(wrong)}: {said[-300:]}")
    trial.finish(bench, run)
    outcome.same(trial.digest(run), trial.reference(bench), "file size limit")


def _record_fills_it(bench: Bench, outcome: Outcome) -> None:
    """No room for the record alone: said once, and the model is the same."""
    run = bench.new("run")
    run.mkdir()
    with mounted(bench.new("disk"), "4k") as disk:
        (run / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")
        process = trial.start(bench, run)
        code, said = process.wait(), process.said
        wrong = [] if code == 0 else [f"exit code {code}"]
        wrong += [] if said.count("the record is not being written") == 1 else ["not said once"]
        outcome.fired(not wrong, f"record full: {'; '.join(wrong)}: {said[-300:]}")
        got, expected = trial.digest(run), trial.reference(bench)
        names = (checkpoint.MODEL, checkpoint.OPTIMIZER, "state")
        outcome.same({n: got[n] for n in names}, {n: expected[n] for n in names}, "record full")


def wrong_folders(bench: Bench) -> Outcome:
    """What should be a folder is a file, a dead link, read-only: one message, exit code 1 or 2, nothing trained."""
    outcome, slowest = Outcome(), 0.0
    trial.prepare_data(bench)
    for what, build in FOLDERS[: bench.planned]:
        place = bench.new("place")
        place.mkdir()
        run = build(place)
        there = _listing(place)
        process = trial.start(bench, run)
        code, said = process.wait(), process.said
        wrong = [] if code in (1, 2) and "Traceback" not in said else [f"exit code {code}"]
        wrong += [] if "regpt2: " in said else ["no message"]
        wrong += ["trained on"] if "loss" in said else []
        wrong += [f"left behind: {new}"] if (new := _listing(place) - there) else []
        outcome.fired(not wrong, f"{what}: {'; '.join(wrong)}: {said[-400:]}")
    if bench.planned > len(FOLDERS):
        _read_only(bench, outcome)
        _missing_parent(bench, outcome)
        slowest = _by_command(bench, outcome)
    outcome.remark = f"the command refused within {slowest:.1f} s"
    return outcome


def _listing(place: Path) -> set[str]:
    """All files that say what is not so. A lock and the recipe may be there: they are whole."""
    innocent = (".lock", "config.toml")
    return {
        str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir() and path.name not in innocent
    }


def _a_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a folder")
    return path


def _a_dead_link(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")
    return path


def _a_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


FOLDERS: list[tuple[str, Callable[[Path], Path]]] = [
    ("a file in the place of the run folder", lambda place: _a_file(place / "run")),
    ("a file in the place of its parent", lambda place: _a_file(place / "runs") / "run"),
    ("a dead link in the place of the run folder", lambda place: _a_dead_link(place / "run")),
    ("a dead link in the place of its parent", lambda place: _a_dead_link(place / "runs") / "run"),
    ("a file in the place of checkpoints/", lambda place: _a_file(place / "run" / "checkpoints").parent),
    ("a dead link in the place of checkpoints/", lambda place: _a_dead_link(place / "run" / "checkpoints").parent),
    ("a folder in the place of config.toml", lambda place: _a_folder(place / "run" / "config.toml").parent),
    ("a folder in the place of metrics.jsonl", lambda place: _a_folder(place / "run" / "metrics.jsonl").parent),
    ("a folder in the place of .lock", lambda place: _a_folder(place / "run" / ".lock").parent),
    ("a name too long", lambda place: place / ("x" * 300)),
]


def _read_only(bench: Bench, outcome: Outcome) -> None:
    """A file system that takes nothing: a mount, for root may write into any folder."""
    with mounted(bench.new("disk"), "1m", "ro") as disk:
        process = trial.start(bench, disk / "run")
        code, said = process.wait(), process.said
        ok = code == 1 and "Traceback" not in said and "read-only" in said.lower()
        outcome.fired(ok, f"read-only: exit code {code}: {said[-300:]}")


def _missing_parent(bench: Bench, outcome: Outcome) -> None:
    """Folders that are not there yet are made."""
    run = bench.new("place") / "a" / "b" / "run"
    process = trial.start(bench, run, "--max-steps", 2)
    outcome.fired(process.wait() == 0 and trial.newest_step(run) == 2, f"missing parent: {process.said[-300:]}")


def _by_command(bench: Bench, outcome: Outcome) -> float:
    """The command line itself on the first case; seconds it took."""
    run = FOLDERS[0][1](bench.new("place"))
    process = bench.start(*trial.arguments(bench, run))
    started_at = os.times().elapsed
    _, errors = process.communicate(timeout=60)
    outcome.fired(process.returncode in (1, 2) and "Traceback" not in errors, f"by command: {errors[-300:]}")
    return os.times().elapsed - started_at


FAULTS = [
    Fault(7, "full disk", (5, 5), disk_full),
    Fault(8, "folders that are not", (len(FOLDERS) + 3, len(FOLDERS) + 3), wrong_folders),
]
