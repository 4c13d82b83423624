"""Parts on datatrove's executors: planned parts in, their files in the job's folder out, made by other processes.

`datatrove` works on this machine, `slurm` by a job array, `ray` on a Ray cluster. Each starts ranks, and a rank encodes
its share of the parts as a worker of ours does. The files of a part alone say that it is done, whoever made them: the
shards are the same, and a preparation may be gone on with by another engine.
"""

import importlib
import importlib.util
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from regpt2.base.console import say
from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.base.files import describe_os_error, write_atomic
from regpt2.data.preparing.encode_part import Job, PartResult
from regpt2.data.preparing.pack_shards import Ledger
from regpt2.data.sources.plan import Part

Engine = Literal["datatrove", "slurm", "ray"]
EXECUTORS = {"datatrove": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
OPTIONS: dict[str, dict[str, type]] = {  # parameters of the executor that a user may want to set
    "datatrove": {},
    "slurm": {
        "partition": str,
        "time": str,
        "qos": str,
        "cpus_per_task": int,
        "mem_per_cpu_gb": int,
        "job_name": str,
        "env_command": str,
    },
    "ray": {"cpus_per_task": int, "mem_per_cpu_gb": float},
}
REQUIRED = {"slurm": ("partition", "time")}
MOST_TASKS = 1000  # what an array holds where Slurm is configured as usual; datatrove would submit several

FOLDER_NAME = "engine"  # beside the parts: what the engine and its ranks write
LOOK_EVERY_S = 1.0  # at the parts
ASK_EVERY_S = 30.0  # Slurm's queue, which does not like to be asked more often


class Share:
    """The one step of the pipeline: rank r of n encodes the parts r, r + n, r + 2n, ... that are not done."""

    def __init__(self, job: Job, tasks: list[tuple[int, Part]]) -> None:
        self.job, self.tasks = job, tasks

    def __repr__(self) -> str:
        """For datatrove's logs; the tasks themselves may be thousands."""
        return f"regpt2: {len(self.tasks)} parts of {self.job.dataset}"

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Encode; a problem is noted where the command looks for it."""
        folder = self.job.folder
        try:
            ledger = Ledger.read(folder.parent)
            folded = ledger.folded if ledger else 0  # a rank that Slurm starts again has parts in shards already
            encode_part = self.job.start()
            for index, part in self.tasks[rank::world_size]:
                if index >= folded and PartResult.read(folder, index) is None:
                    encode_part((index, part), _told_by_files)
        except Problem as problem:
            write_atomic(failure_file(folder), str(problem))
        except OSError as error:
            write_atomic(failure_file(folder), describe_os_error(error))


def _told_by_files(n_bytes: int) -> None:
    """Progress within a part: there is no way from a rank to the command but finished files."""


def failure_file(folder: Path) -> Path:
    """Where a rank says why it cannot go on."""
    return folder / FOLDER_NAME / "failure"


def encode(
    engine: Engine,
    job: Job,
    tasks: list[tuple[int, Part]],
    *,
    n_tasks: int,
    workers: int,
    options: dict[str, str],
    on_done: Callable[[int], object],
) -> None:
    """Have the parts encoded by `n_tasks` ranks, `workers` at a time; `on_done(index)` is called for each part.

    Raises:
        UsageError: the engine is not installed, or an option is wrong.
        Problem: a rank failed, or the engine ended without having done all parts.
    """
    settings = check_options(engine, options)
    job = replace(job, folder=job.folder.resolve(), vocab=job.vocab and job.vocab.resolve())
    folder = job.folder / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    n_tasks = min(n_tasks, len(tasks), MOST_TASKS)
    settings |= {
        "pipeline": [Share(job, [(index, _absolute(part)) for index, part in tasks])],
        "tasks": n_tasks,
        "workers": min(workers, n_tasks),
        "logging_dir": str(folder),
        "skip_completed": False,  # datatrove's own marks; a part's files are ours
    }
    with _started(engine, settings, folder) as is_working:
        _wait(job.folder, {index for index, _ in tasks}, is_working, on_done)


def check_options(engine: Engine, options: dict[str, str]) -> dict[str, Any]:
    """The options in their types.

    Raises:
        UsageError: one is unknown, missing or no number, or the engine is not installed.
    """
    known = OPTIONS[engine]
    if sys.platform == "win32":
        raise UsageError(f"--engine {engine} is for Linux; on Windows leave --engine out.")
    if importlib.util.find_spec("datatrove") is None:
        raise UsageError(f"--engine {engine} needs datatrove: pip install 'regpt2[cluster]'")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install ray")
    for name in options:
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has none"
            raise UsageError(f"--engine-options {name}: {engine} {has}{did_you_mean(name, known)}")
    for name in REQUIRED.get(engine, ()):
        if not options.get(name):
            raise UsageError(f"--engine {engine} needs --engine-options {name}=..., as your cluster has it.")
    if engine == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
        raise UsageError("--engine slurm needs sbatch and squeue; run the command where you submit jobs to Slurm.")
    return {name: _typed(name, known[name], text) for name, text in options.items()}


def _typed(name: str, kind: type, text: str) -> object:
    try:
        return kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise UsageError(f"--engine-options {name}={text} must be {number}.") from None


def _absolute(part: Part) -> Part:
    """The part with paths that a rank finds from any folder."""
    slices = (
        replace(piece, file=replace(piece.file, path=piece.file.path and os.path.abspath(piece.file.path)))
        for piece in part.slices
    )
    return replace(part, slices=tuple(slices))


def _wait(folder: Path, missing: set[int], is_working: Callable[[], bool], on_done: Callable[[int], object]) -> None:
    """Look at the folder until all parts are there."""
    n_parts = len(missing)
    while missing:
        has_ended = not is_working()  # asked first: all that was written until then is seen below
        there = {int(path.stem) for path in folder.glob("[0-9]*.json")}
        for index in sorted(missing & there):
            missing.remove(index)
            on_done(index)
        if failure_file(folder).exists():
            raise Problem(failure_file(folder).read_text(encoding="utf-8"))
        if missing and has_ended:
            raise Problem(
                f"{len(missing):,} of {n_parts:,} parts are missing, but their processes have ended: out of time or "
                f"memory, perhaps; the logs are in {folder / FOLDER_NAME}. Run the same command again to go on."
            )
        if missing:
            time.sleep(LOOK_EVERY_S)


def _started(engine: Engine, settings: dict[str, Any], folder: Path) -> AbstractContextManager[Callable[[], bool]]:
    return _slurm_job(settings, folder) if engine == "slurm" else _child(engine, settings, folder)


def _executor(engine: Engine, settings: dict[str, Any]) -> Any:
    module = importlib.import_module("datatrove.executor")
    return getattr(module, EXECUTORS[engine])(**settings)


def _begin_anew(folder: Path) -> None:
    """Forget what ranks that are no more have left."""
    failure_file(folder.parent).unlink(missing_ok=True)
    for left_by_a_kill in folder.parent.glob(".*.tmp"):
        left_by_a_kill.unlink()


# On this machine, and as a client of Ray: the executor works for as long as its process does.


@contextmanager
def _child(engine: Engine, settings: dict[str, Any], folder: Path) -> Iterator[Callable[[], bool]]:
    """The executor in a process group of its own, which is gone when the context is left, however it is left."""
    _begin_anew(folder)
    if engine == "datatrove":
        settings = settings | {"start_method": "spawn"}
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(engine, settings, folder / "output.log", theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process.is_alive
    finally:
        assert process.pid is not None, "a started process has an id"
        with suppress(ProcessLookupError):  # it has no group yet
            os.killpg(process.pid, signal.SIGKILL)  # parts are atomic, so nothing has to be tidied up
        process.kill()
        process.join()
        ours.close()


def _run(engine: Engine, settings: dict[str, Any], log: Path, leash: Connection) -> None:
    """Life of the child. What the engine has to say goes into a file: the command speaks for it."""
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    threading.Thread(target=_guard, args=(leash,), daemon=True).start()
    _executor(engine, settings).run()


def _guard(leash: Connection) -> None:
    """End the group when the command is gone, or a worker: the pool would wait for a killed one's task for ever.

    A worker that is killed between two looks, unseen, has no task yet: it imports for longer.
    """
    pool = importlib.import_module("multiprocess")
    workers: set[Any] = set()
    while not leash.poll(0.1):
        alive = set(pool.active_children())
        if workers - alive:
            break
        workers |= alive
    os.killpg(0, signal.SIGKILL)


# On Slurm: a killed command leaves the job at work, and the next one finds it.


@contextmanager
def _slurm_job(settings: dict[str, Any], folder: Path) -> Iterator[Callable[[], bool]]:
    """A job array; or the one that an earlier call submitted, if it is still there."""
    note = folder / "slurm_job"
    job_id = note.read_text(encoding="utf-8") if note.exists() else ""
    if job_id and _is_queued(job_id):
        say(f"Slurm job {job_id} of an earlier call is at work; waiting for it.")
    else:
        _begin_anew(folder)
        job_id = _submit(settings, folder)
        write_atomic(note, job_id)
        say(f"Slurm job {job_id} with {settings['tasks']:,} tasks; its logs are in {folder / 'slurm_logs'}.")
    try:
        yield _Queue(job_id).has_job
    except BaseException:  # a problem, or Ctrl-C
        subprocess.run(["scancel", job_id], capture_output=True, check=False)
        note.unlink(missing_ok=True)
        raise
    while _is_queued(job_id):  # the last ranks write their logs
        time.sleep(ASK_EVERY_S)


def _submit(settings: dict[str, Any], folder: Path) -> str:
    importlib.import_module("loguru").logger.disable("datatrove")
    if any(character.isspace() for character in str(folder)):
        raise UsageError(f"{folder}: datatrove's Slurm script takes no path with blanks; choose another --out.")
    here = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"  # datatrove's command and ours
    usual = {"job_name": "regpt2-prepare", "qos": "", "env_command": here}
    executor = _executor("slurm", usual | settings)
    executor.launch_merge_stats = _nothing  # a second job for statistics that we do not have
    try:
        executor.launch_job()
    except subprocess.CalledProcessError as error:
        raise Problem(f"sbatch did not take the job ({error}); what it said stands above.") from None
    return str(executor.job_id)


def _nothing() -> None:
    pass


class _Queue:
    """Slurm's queue, asked now and then."""

    def __init__(self, job_id: str) -> None:
        self.job_id, self.asked_at, self.absences = job_id, time.monotonic(), 0

    def has_job(self) -> bool:
        """No after two answers in a row: a network disk shows files of another machine only after a while."""
        if time.monotonic() - self.asked_at >= ASK_EVERY_S:
            self.asked_at = time.monotonic()
            self.absences = 0 if _is_queued(self.job_id) else self.absences + 1
        return self.absences < 2


def _is_queued(job_id: str) -> bool:
    """Whether the job waits or works; yes if Slurm cannot say, as when its controller is too busy."""
    asked = subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True, check=False)
    return bool(asked.stdout.strip()) if asked.returncode == 0 else "Invalid job id" not in asked.stderr
