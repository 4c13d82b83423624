"""Parts encoded on a cluster. In: planned parts; out: their files in the job's folder, written by other machines.

`slurm` submits a job array, `ray` starts tasks on a Ray cluster. Task t of n encodes the parts t, t + n, t + 2n, ... as
one of our own workers does. A part is done when its files exist, whichever engine wrote them, so you can switch engines
midway.
"""

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regpt2.base.console import say
from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.base.files import describe_os_error, write_atomic
from regpt2.data.preparing.encode_part import EncodeJob, PartResult
from regpt2.data.preparing.hold_out import HoldOut
from regpt2.data.preparing.ledger import Ledger
from regpt2.data.sources.filters import Filters
from regpt2.data.sources.plan import InputFile, Part, Slice

OPTIONS: dict[str, dict[str, type]] = {  # what a user may set for each engine
    "slurm": dict.fromkeys(("partition", "time", "qos", "job_name", "env_command"), str)
    | {"cpus_per_task": int, "mem_per_cpu_gb": int},
    "ray": {"cpus_per_task": int, "mem_per_cpu_gb": float},
}
REQUIRED = {"slurm": ("partition", "time"), "ray": ()}
MEM_PER_CPU_GB = 2
MOST_TASKS = 1000  # Slurm's usual limit for an array (MaxArraySize = 1001)

FOLDER_NAME = "engine"  # beside the parts: the logs, and what the tasks read
LOOK_EVERY_S = 1.0  # at the parts
ASK_EVERY_S = 30.0  # Slurm's queue: its controller serves the whole cluster


@dataclass(frozen=True)
class SharedWork:
    """The parts to encode, dealt to `n_tasks` tasks, of which `at_once` run at the same time."""

    job: EncodeJob
    parts: list[tuple[int, Part]]
    n_tasks: int
    at_once: int
    start_folder: str
    """Where paths begin: the current folder of the command."""

    def encode(self, task: int) -> None:
        """Encode this task's parts that are not done; a problem goes into the file where the command looks for it."""
        os.chdir(self.start_folder)
        folder = self.job.folder
        try:
            ledger = Ledger.read(folder.parent)
            if ledger and ledger.hold_out != self.job.hold_out:
                return  # a task that runs again, when all parts are encoded anew by another rule
            folded = ledger.folded if ledger else 0  # when a task runs again, shards may already hold some of its parts
            encode_part = self.job.start()
            for index, part in self.parts[task :: self.n_tasks]:
                if index >= folded and PartResult.read(folder, index) is None:
                    encode_part((index, part), lambda n_bytes: None)  # the command learns of finished parts alone
        except (Problem, OSError) as error:
            text = describe_os_error(error) if isinstance(error, OSError) else str(error)
            write_atomic(failure_file(folder), text)

    def to_json(self) -> str:
        """For tasks that read it from a file. ASCII, so that undecodable file names survive."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "SharedWork":
        content = json.loads(text)
        job, vocab = content["job"], content["job"]["vocab"]
        places = {"folder": Path(job["folder"]), "vocab": vocab and Path(vocab), "filters": Filters(**job["filters"])}
        places |= {"hold_out": HoldOut(**job["hold_out"])}
        parts = []
        for index, part in content["parts"]:
            slices = tuple(Slice(**piece | {"file": InputFile(**piece["file"])}) for piece in part["slices"])
            parts.append((index, Part(**part | {"slices": slices})))
        return cls(**content | {"job": EncodeJob(**job | places), "parts": parts})


def failure_file(folder: Path) -> Path:
    return folder / FOLDER_NAME / "failure"


def encode(
    engine: str,
    job: EncodeJob,
    parts: list[tuple[int, Part]],
    *,
    n_tasks: int,
    workers: int,
    options: dict[str, str],
    on_done: Callable[[int], object],
) -> None:
    """Encode the parts in `n_tasks` tasks, `workers` at a time; `on_done(index)` is called for each finished part.

    Raises:
        UsageError: the engine is not installed, or an option is wrong.
        Problem: a task failed, or all tasks ended and parts are missing.
    """
    settings = check_options(engine, options)
    n_tasks = min(n_tasks, len(parts), MOST_TASKS)
    work = SharedWork(job, parts, n_tasks, min(workers, n_tasks), os.getcwd())
    (job.folder / FOLDER_NAME).mkdir(exist_ok=True)
    start = _slurm_job if engine == "slurm" else _ray_tasks
    with start(work, settings) as is_working:
        _wait(job.folder, {index for index, _ in parts}, is_working, on_done)


def check_options(engine: str, options: dict[str, str]) -> dict[str, Any]:
    """The options in their types.

    Raises:
        UsageError: the engine is unknown or not installed, or an option is unknown, missing or not a number.
    """
    if engine not in OPTIONS:
        raise UsageError(
            f"--engine {engine}: expected processes, {' or '.join(OPTIONS)}{did_you_mean(engine, OPTIONS)} On one "
            "machine leave --engine out: our own processes write the same shards."
        )
    known, settings = OPTIONS[engine], {}
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray: pip install 'regpt2[ray]'")
    for name in options:
        if name not in known:
            raise UsageError(f"--engine-options {name}: {engine} has {', '.join(known)}{did_you_mean(name, known)}")
    for name in REQUIRED[engine]:
        if not options.get(name):
            raise UsageError(f"--engine {engine} needs --engine-options {name}=...; your cluster's pages name yours.")
    if engine == "slurm" and not (shutil.which("sbatch") and shutil.which("squeue")):
        raise UsageError("--engine slurm needs sbatch and squeue; run the command where you submit jobs to Slurm.")
    for name, text in options.items():
        try:
            settings[name] = known[name](text)
        except ValueError:
            number = "a whole number" if known[name] is int else "a number"
            raise UsageError(f"--engine-options {name}={text} must be {number}.") from None
    return settings


def _wait(folder: Path, missing: set[int], is_working: Callable[[], bool], on_done: Callable[[int], object]) -> None:
    n_parts = len(missing)
    while missing:
        has_ended = not is_working()  # asked first: the look below then sees all that the tasks wrote
        existing = {int(path.stem) for path in folder.glob("[0-9]*.json")}
        for index in sorted(missing & existing):
            missing.remove(index)
            on_done(index)
        if failure_file(folder).exists():
            raise Problem(failure_file(folder).read_text(encoding="utf-8"))
        if missing and has_ended:
            raise Problem(
                f"{len(missing):,} of {n_parts:,} parts are missing, but all tasks have ended: perhaps they ran out of "
                f"time or memory; see the logs in {folder / FOLDER_NAME}. Run the same command again to resume."
            )
        if missing:
            time.sleep(LOOK_EVERY_S)


def _remove_leftovers(folder: Path) -> None:
    failure_file(folder).unlink(missing_ok=True)
    for left_by_a_kill in folder.glob(".*.tmp"):
        left_by_a_kill.unlink()


# Ray: its tasks end with this process, however it ends.


@contextmanager
def _ray_tasks(work: SharedWork, settings: dict[str, Any]) -> Iterator[Callable[[], bool]]:
    """Tasks on the cluster that RAY_ADDRESS names, or on this machine."""
    _remove_leftovers(work.job.folder)
    ray = importlib.import_module("ray")
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise Problem(f"Ray did not start, or RAY_ADDRESS is wrong: {_last_line(error)}") from None
    cpus = settings.get("cpus_per_task", 1)
    memory = int(cpus * settings.get("mem_per_cpu_gb", MEM_PER_CPU_GB) * 2**30)
    encode_remotely = ray.remote(num_cpus=cpus, memory=memory)(SharedWork.encode)
    shared, waiting = ray.put(work), iter(range(work.n_tasks))
    running: list[Any] = []

    def is_working() -> bool:
        try:
            done = ray.wait(running, num_returns=len(running), timeout=0)[0] if running else []
            ray.get(done)
        except ray.exceptions.RayError as error:
            raise Problem(f"a Ray task failed: {_last_line(error)}. Run the same command again to resume.") from None
        running[:] = [task for task in running if task not in done]
        while len(running) < work.at_once and (task := next(waiting, None)) is not None:
            running.append(encode_remotely.remote(shared, task))
        return bool(running)

    try:
        yield is_working
    finally:
        for task in running:
            ray.cancel(task, force=True)
        if is_ours:
            ray.shutdown()


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


# Slurm: a job outlives a killed command, and the next call finds it.


@contextmanager
def _slurm_job(work: SharedWork, settings: dict[str, Any]) -> Iterator[Callable[[], bool]]:
    """A job array; or the one that an earlier call submitted, if it is still in the queue."""
    folder = work.job.folder.resolve() / FOLDER_NAME
    note = folder / "slurm_job"
    job_id = note.read_text(encoding="utf-8") if note.exists() else ""
    if job_id and _is_queued(job_id):
        say(f"Slurm job {job_id} of an earlier call is still in the queue; waiting for it.")
    else:
        _remove_leftovers(work.job.folder)
        job_id = _submit(work, settings, folder)
        write_atomic(note, job_id)
        say(f"Slurm job {job_id} with {work.n_tasks:,} tasks; its logs are in {folder}.")
    try:
        yield _Queue(job_id).has_job
    except BaseException:  # a problem, or Ctrl-C
        subprocess.run(["scancel", job_id], capture_output=True, check=False)
        note.unlink(missing_ok=True)
        raise
    while _is_queued(job_id):  # the last tasks are writing their logs
        time.sleep(ASK_EVERY_S)


def _submit(work: SharedWork, settings: dict[str, Any], folder: Path) -> str:
    """The id of a new job array, each of whose tasks runs this file."""
    path = folder / "work.json"
    write_atomic(path, work.to_json())
    settings = {"job_name": "regpt2-prepare", "cpus_per_task": 1, "mem_per_cpu_gb": MEM_PER_CPU_GB} | settings
    env_command, gb = settings.pop("env_command", ""), settings.pop("mem_per_cpu_gb")
    python = "python3" if env_command else shlex.quote(sys.executable)  # env_command chooses the environment
    command = [
        *("sbatch", "--parsable", "--requeue", "--nodes=1", "--ntasks=1", f"--mem-per-cpu={gb}G"),
        *(f"--array=0-{work.n_tasks - 1}%{work.at_once}", f"--output={folder / '%A_%a.log'}"),
        *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items()),
    ]
    script = f'#!/bin/bash\n{env_command}\n{python} -P -m {__name__} {shlex.quote(str(path))} "$SLURM_ARRAY_TASK_ID"\n'
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Problem(f"sbatch refused the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]  # "ID" or "ID;CLUSTER"


class _Queue:
    """Slurm's queue, asked now and then."""

    def __init__(self, job_id: str) -> None:
        self.job_id, self.asked_at, self.absences = job_id, time.monotonic(), 0

    def has_job(self) -> bool:
        """False after two answers in a row: a network disk shows files of another machine only after a while."""
        if time.monotonic() - self.asked_at >= ASK_EVERY_S:
            self.asked_at = time.monotonic()
            self.absences = 0 if _is_queued(self.job_id) else self.absences + 1
        return self.absences < 2


def _is_queued(job_id: str) -> bool:
    """Whether the job waits or runs; True if Slurm cannot answer, as when its controller is too busy."""
    asked = subprocess.run(["squeue", "-h", "-j", job_id], capture_output=True, text=True, check=False)
    return bool(asked.stdout.strip()) if asked.returncode == 0 else "Invalid job id" not in asked.stderr


if __name__ == "__main__":  # a task of the array
    SharedWork.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")).encode(int(sys.argv[2]))
