"""Parts on datatrove's executors: the same bytes as by our own workers, with real processes, kills and a small Slurm.

Slurm is played by scripts in the place of sbatch, squeue, scancel, srun and scontrol: they run the job array that
datatrove writes, with as many processes.
"""

import contextlib
import gzip
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regpt2.base.errors import Problem, UsageError
from regpt2.commands.prepare import PrepareOptions, prepare
from regpt2.data.preparing import cluster
from regpt2.data.preparing.pack_shards import Ledger
from regpt2.data.sources import plan

pytest.importorskip("datatrove")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

N_FILES = 30
PART_BYTES = 40_000
SHARD_TOKENS = 200_000
Start = Callable[[str], "subprocess.Popen[str]"]
SLURM = ("partition=cpu", "time=01:00:00")

# The command, with parts small and looks quick, in a file without suffix like the installed one.
COMMAND = f"""
import sys
from regpt2 import cli
from regpt2.data import documents, engine

if __name__ == "__main__":
    documents.PART_BYTES = {PART_BYTES}
    engine.LOOK_EVERY_S = engine.ASK_EVERY_S = 0.2
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
"""

SBATCH = """#!/bin/bash
# Queues the array of the script; its tasks run in a session of their own, as many at a time as it says.
script=${!#}
id=$((4000 + $(ls "$SLURM_HOME" | wc -l)))
cp "$script" "$SLURM_HOME/$id.sh"
read -r last at_once < <(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%\\([0-9]*\\)$/\\1 \\2/p' "$script")
for ((task = 0; task <= last; task++)); do echo $task; done > "$SLURM_HOME/$id.tasks"
export SLURM_JOB_ID=$id SLURM_NODELIST=here script=$SLURM_HOME/$id.sh
cd "$SLURM_HOME"
work="xargs -P $at_once -I@ env SLURM_ARRAY_TASK_ID=@ bash $script < $id.tasks; sleep 0.3; rm $id.queued"
touch "$SLURM_HOME/$id.queued"
setsid bash -c "$work" > "$SLURM_HOME/$id.log" 2>&1 &
echo $! > "$SLURM_HOME/$id.queued"
echo "Submitted batch job $id"
"""
SQUEUE = """#!/bin/bash
[[ $1 == -h && $2 == -j ]] || exit 2
if [[ -s $SLURM_HOME/busy ]]; then
  sed -i 1d "$SLURM_HOME/busy"  # one line for each time
  echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
  exit 1
fi
[[ -e $SLURM_HOME/$3.queued ]] && echo "$3 cpu regpt2" && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
SCANCEL = """#!/bin/bash
# A job is in the queue a little longer than its processes.
kill -KILL -- -$(cat "$SLURM_HOME/$1.queued")
(sleep 1; rm "$SLURM_HOME/$1.queued") > /dev/null 2>&1 &
"""
SRUN = """#!/bin/bash
[[ "$1 $2 $3" == "-l -n 1" ]] && shift 3
cd /  # another machine
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && echo "$3"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    words = ["the", "of", "GPT-2", "naïve", "中文", "2024", "<|endoftext|>", "it's", "\n", "👍", "transformer"]
    for n in range(N_FILES):
        texts = [" ".join(rng.choices(words, k=rng.choice([0, 3, 300, 2000]))) for _ in range(25)]
        texts += ["x" * PART_BYTES]
        (folder / f"{n:02}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(cluster, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(cluster, "ASK_EVERY_S", 0.2)


def options_for(corpus: Path, out: Path, **engine_options: Any) -> PrepareOptions:
    sizes = {"shard_tokens": SHARD_TOKENS, "workers": 2 if engine_options else 1}
    return PrepareOptions(dataset="text_files", out=out, input=corpus, tokenizer="bytes", **sizes, **engine_options)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """By our own workers."""
    out = tmp_path_factory.mktemp("plain") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PART_BYTES", PART_BYTES)
        prepare(options_for(corpus, out))
    return folder_bytes(out)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a small Slurm on PATH; what is in its queue is ended with the test."""
    home, stubs = tmp_path / "slurm", tmp_path / "bin"
    home.mkdir()
    stubs.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "squeue": SQUEUE,
        "scancel": SCANCEL,
        "srun": SRUN,
        "scontrol": SCONTROL,
    }.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("SLURM_HOME", str(home))
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    yield home
    for queued in home.glob("*.queued"):
        os.killpg(int(queued.read_text()), signal.SIGKILL)


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the command; what is left of it is ended with the test."""
    out = tmp_path / "out"
    path = tmp_path / "regpt2"
    path.write_text(COMMAND)
    words = ["text_files", "--input", corpus, "--out", out, "--tokenizer", "bytes", "--shard-tokens", SHARD_TOKENS]
    words += ["--workers", 2, "--tasks", 4]

    def start_command(name: str) -> "subprocess.Popen[str]":
        more = ["--engine", name, *(["--engine-options", *SLURM] if name == "slurm" else [])]
        return subprocess.Popen(
            [sys.executable, path, *map(str, words), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"MARK": str(out)},
        )

    yield start_command
    for pid in of_command(out):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def of_command(out: Path) -> list[int]:
    """Processes that descend from the command, whoever their parents are by now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={out}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # ended, or somebody else's
            continue
    return found


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s} s"
        time.sleep(0.01)


def finished(out: Path) -> int:
    """How many parts are done, in shards already or not."""
    ledger = Ledger.read(out) if out.exists() else None
    folded = ledger.folded if ledger else 0
    return folded + sum(int(path.stem) >= folded for path in (out / ".parts").glob("[0-9]*.json"))


@pytest.mark.process
def test_two_workers_of_datatrove_give_the_same_bytes(
    corpus: Path, tmp_path: Path, plain: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(options_for(corpus, tmp_path / "out", engine="datatrove", tasks=4))
    assert folder_bytes(tmp_path / "out") == plain
    output = capfd.readouterr()
    assert not output.err
    assert output.out.startswith("text_files (corpus) with")


def test_stopped_and_killed_with_all_its_processes_and_gone_on_by_datatrove(
    start: Start, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = finished(out)
        command = start("datatrove")
        wait_for(lambda: finished(out) > before, "another part")
        command.send_signal(number)
        command.communicate(timeout=30)
        wait_for(lambda: not of_command(out), "the end of all processes")
    command = start("datatrove")
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 0, output
    done, planned = re.findall(r"Going on: (\d+) of (\d+) parts", output)[0]
    assert int(done) < int(planned)
    assert folder_bytes(out) == plain


def test_a_killed_worker_of_datatrove_is_no_endless_wait(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = start("datatrove")
    wait_for(lambda: finished(out), "the first part")
    workers = [pid for pid in of_command(out) if b"multiprocess.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    output, _ = command.communicate(timeout=30)
    assert command.returncode == 1
    assert "parts are missing" in output and "Run the same command again" in output
    assert "Traceback" not in output
    assert not of_command(out)


@pytest.mark.process
@pytest.mark.parametrize("name", ["datatrove", "slurm"])
def test_a_problem_of_a_rank_is_one_message_and_mended_is_gone_on_with(
    name: str, tmp_path: Path, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = random.Random(0)
    for n in range(4):
        lines = [json.dumps({"text": rng.randbytes(10_000).hex()}) for _ in range(30)]
        (texts / f"{n}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    whole = (texts / "2.jsonl.gz").read_bytes()
    replace_quietly(texts / "2.jsonl.gz", whole[:1000] + bytes(len(whole) - 1000))
    options = options_for(texts, tmp_path / "out", engine=name, engine_options=SLURM if name == "slurm" else ())
    with pytest.raises(Problem, match=r"2\.jsonl\.gz") as caught:
        prepare(options)
    assert "\n" not in str(caught.value)
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err
    replace_quietly(texts / "2.jsonl.gz", whole)
    assert prepare(options).splits["train"].documents > 40
    assert len(list(slurm.glob("*.sh"))) == (2 if name == "slurm" else 0)


def replace_quietly(file: Path, content: bytes) -> None:
    """As a disk's error does, and its repair: size and time stay."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_slurm_array_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, plain: dict[str, bytes], slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "busy").write_text("\n" * 5)
    monkeypatch.chdir(tmp_path)
    more = (*SLURM, "mem_per_cpu_gb=3", "qos=high")
    corpus_from_here = Path(os.path.relpath(corpus))
    prepare(options_for(corpus_from_here, Path("out"), engine="slurm", tasks=3, engine_options=more))
    assert folder_bytes(tmp_path / "out") == plain
    assert not list(slurm.glob("*.queued"))
    (script,) = slurm.glob("*.sh")
    lines = script.read_text().splitlines()
    for line in ("partition=cpu", "time=01:00:00", "mem-per-cpu=3G", "qos=high", "array=0-2%2"):
        assert f"#SBATCH --{line}" in lines


def test_a_rank_that_is_started_again_leaves_alone_what_is_in_shards(tmp_path: Path) -> None:
    made: list[int] = []
    folder = tmp_path / ".parts"
    folder.mkdir()
    Ledger({}, "plan", folded=2).write(tmp_path)
    job = SimpleNamespace(folder=folder, start=lambda: lambda task, report: made.append(task[0]))
    cluster.Share(job, [(index, None) for index in range(6)])(None, rank=1, world_size=2)  # type: ignore
    assert made == [3, 5]


def test_a_slurm_job_outlives_the_command_and_is_found_again(
    start: Start, tmp_path: Path, plain: dict[str, bytes], slurm: Path
) -> None:
    out = tmp_path / "out"
    command = start("slurm")
    wait_for(lambda: finished(out), "the first part")
    command.kill()
    command.communicate()
    command = start("slurm")
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 0, output
    assert "of an earlier call is at work" in output
    assert folder_bytes(out) == plain
    assert len(list(slurm.glob("*.sh"))) == 1


def test_a_slurm_job_that_ends_early_is_said_and_gone_on_with(
    start: Start, tmp_path: Path, plain: dict[str, bytes], slurm: Path
) -> None:
    out = tmp_path / "out"
    command = start("slurm")
    wait_for(lambda: finished(out), "the first part")
    subprocess.run(["scancel", "4000"], check=True)
    output, _ = command.communicate(timeout=30)
    assert command.returncode == 1
    assert "parts are missing" in output and "Traceback" not in output
    command = start("slurm")
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 0, output
    assert folder_bytes(out) == plain
    assert len(list(slurm.glob("*.sh"))) == 2


def test_sbatch_that_refuses(corpus: Path, tmp_path: Path, slurm: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: cpu' >&2\nexit 1\n")
    with pytest.raises(Problem, match="sbatch did not take the job"):
        prepare(options_for(corpus, tmp_path / "out", engine="slurm", engine_options=SLURM))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", ("time=1:00:00",), "needs --engine-options partition="),
        ("slurm", (*SLURM, "mem_per_cpu=2"), "did you mean 'mem_per_cpu_gb'"),
        ("slurm", (*SLURM, "cpus_per_task=two"), "cpus_per_task=two must be a whole number"),
        ("datatrove", ("partition=cpu",), "datatrove has none"),
    ],
)
def test_wrong_options_are_refused(
    name: str, options: tuple[str, ...], message: str, corpus: Path, tmp_path: Path, slurm: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(options_for(corpus, tmp_path / "out", engine=name, engine_options=options))


@pytest.mark.parametrize(("name", "package"), [("datatrove", "datatrove"), ("ray", "ray")])
def test_a_missing_package_is_named(name: cluster.Engine, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find_spec(wanted))
    with pytest.raises(UsageError, match="pip install"):
        cluster.check_options(name, {})


def test_without_slurm_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch and squeue"):
        cluster.check_options("slurm", {"partition": "cpu", "time": "01:00:00"})


@pytest.mark.slow
def test_two_workers_of_ray_give_the_same_bytes(corpus: Path, tmp_path: Path, plain: dict[str, bytes]) -> None:
    pytest.importorskip("ray")
    prepare(options_for(corpus, tmp_path / "out", engine="ray", tasks=3, engine_options=("mem_per_cpu_gb=0.5",)))
    assert folder_bytes(tmp_path / "out") == plain
