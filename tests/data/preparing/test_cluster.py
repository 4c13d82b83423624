"""Parts encoded on a cluster: the same bytes as by our own workers, with real processes, kills and a real Ray.

Scripts in the place of sbatch, squeue and scancel play Slurm: they run the job array with real processes. The tests of
Ray use two nodes on this machine; they run with the slow tests where Ray is installed.
"""

import contextlib
import dataclasses
import gzip
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regpt2.base.errors import Problem, UsageError
from regpt2.data.preparing import cluster
from regpt2.data.preparing.encode_part import EncodeJob
from regpt2.data.preparing.hold_out import HoldOut
from regpt2.data.preparing.ledger import Ledger
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.sources import plan
from regpt2.data.sources.filters import Filters

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
from regpt2.data.preparing import cluster
from regpt2.data.sources import plan

if __name__ == "__main__":
    plan.PART_BYTES = {PART_BYTES}
    cluster.LOOK_EVERY_S = cluster.ASK_EVERY_S = 0.2
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
"""

SBATCH = """#!/bin/bash
# Queues the script of its standard input; the tasks run in a session of their own, as many at a time as it says.
for option; do
  case $option in
    --array=0-*) array=${option#--array=0-} ;;
    --output=*) output=${option#--output=} ;;
  esac
done
id=$((4000 + $(ls "$SLURM_HOME" | wc -l)))
printf '%s\\n' "$@" > "$SLURM_HOME/$id.options"
export output=${output/\\%A/$id} script=$SLURM_HOME/$id.sh
cat > "$script"
task='SLURM_ARRAY_TASK_ID=@ bash "$script" > "${output/\\%a/@}" 2>&1'
cd "$SLURM_HOME"  # another machine
touch "$SLURM_HOME/$id.queued"
setsid bash -c "seq 0 ${array%\\%*} | xargs -P ${array#*%} -I@ bash -c '$task'; sleep 0.3; rm $id.queued" &> /dev/null &
echo $! > "$SLURM_HOME/$id.queued"
echo "$id;here"
"""
SQUEUE = """#!/bin/bash
[[ $1 == -h && $2 == -j ]] || exit 2
touch "$SLURM_HOME/asked"
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
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
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
def test_a_problem_of_a_task_is_one_message_and_mended_is_resumed(
    tmp_path: Path, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    rng = random.Random(0)
    for n in range(4):
        lines = [json.dumps({"text": rng.randbytes(10_000).hex()}) for _ in range(30)]
        (texts / f"{n}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    whole = (texts / "2.jsonl.gz").read_bytes()
    replace_quietly(texts / "2.jsonl.gz", whole[:1000] + bytes(len(whole) - 1000))
    options = options_for(texts, tmp_path / "out", engine="slurm", engine_options=SLURM)
    with pytest.raises(Problem, match=r"2\.jsonl\.gz") as caught:
        prepare(options)
    assert "\n" not in str(caught.value)
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err
    replace_quietly(texts / "2.jsonl.gz", whole)
    assert prepare(options).splits["train"].documents > 40
    assert len(list(slurm.glob("*.sh"))) == 2


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
    prepare(options_for(corpus_from_here, Path("o u t"), engine="slurm", tasks=3, engine_options=more))
    assert folder_bytes(tmp_path / "o u t") == plain
    assert not list(slurm.glob("*.queued"))
    (options,) = slurm.glob("*.options")
    given = options.read_text().splitlines()
    for option in ("partition=cpu", "time=01:00:00", "mem-per-cpu=3G", "qos=high", "array=0-2%2", "cpus-per-task=1"):
        assert f"--{option}" in given


def test_a_task_that_runs_again_leaves_alone_what_is_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.chdir(tmp_path)
    Path(".parts").mkdir()
    Ledger({}, "plan", folded=2).write(tmp_path)
    start = lambda: lambda task, report: made.append(task[0])  # noqa: E731
    parts = [(index, None) for index in range(6)]
    for hold_out in (HoldOut("ab"), HoldOut()):  # of another rule than the ledger's, which is done with; of the same
        job = SimpleNamespace(folder=Path(".parts"), hold_out=hold_out, start=start)
        cluster.SharedWork(job, parts, n_tasks=2, at_once=1, start_folder=str(tmp_path)).encode(1)  # type: ignore
    assert made == [3, 5]


def test_work_for_other_processes_survives_its_file(tmp_path: Path) -> None:
    file = plan.InputFile(os.fsdecode(b"/a/\xff.txt"), os.fsdecode(b"\xff.txt"), 5, 7, "https://x", "00")
    part = plan.Part((plan.Slice(file, 3), plan.Slice(file, 4, 5)), 2, "meta.text")
    filters = Filters(min_chars=3, max_repeated_lines=0.5)
    job = EncodeJob("text_files", "gpt2", tmp_path / "vocab.bpe", "tiktoken", 0.05, filters, True, tmp_path / ".parts")
    for one in (job, dataclasses.replace(job, vocab=None, val_fraction=None)):
        work = cluster.SharedWork(one, [(4, part), (9, part)], 2, 1, "/here")
        assert cluster.SharedWork.from_json(work.to_json()) == work


def test_a_slurm_job_outlives_the_command_and_is_found_again(
    start: Start, tmp_path: Path, plain: dict[str, bytes], slurm: Path
) -> None:
    out = tmp_path / "out"
    command = start("slurm")
    wait_for(lambda: finished(out), "the first part")
    (queued,) = slurm.glob("*.queued")
    job = int(queued.read_text())
    os.killpg(job, signal.SIGSTOP)  # the second command finds it at work
    command.kill()
    command.communicate()
    (slurm / "asked").unlink(missing_ok=True)
    command = start("slurm")
    wait_for((slurm / "asked").exists, "a look at the queue")
    os.killpg(job, signal.SIGCONT)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 0, output
    assert "of an earlier call is still in the queue" in output
    assert folder_bytes(out) == plain
    assert len(list(slurm.glob("*.sh"))) == 1


def test_a_slurm_job_that_ends_early_is_reported_and_resumed(
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
    with pytest.raises(Problem, match=r"sbatch refused the job: .*invalid partition"):
        prepare(options_for(corpus, tmp_path / "out", engine="slurm", engine_options=SLURM))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", ("time=1:00:00",), "needs --engine-options partition="),
        ("slurm", (*SLURM, "mem_per_cpu=2"), "did you mean 'mem_per_cpu_gb'"),
        ("slurm", (*SLURM, "cpus_per_task=two"), "cpus_per_task=two must be a whole number"),
        ("ray", ("partition=cpu",), "ray has cpus_per_task, mem_per_cpu_gb"),
        ("slrum", (), "did you mean 'slurm'"),
        ("datatrove", (), "expected processes, slurm or ray. On one machine leave --engine out"),
    ],
)
def test_wrong_options_are_refused(
    name: str,
    options: tuple[str, ...],
    message: str,
    corpus: Path,
    tmp_path: Path,
    slurm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: wanted == "ray" or find_spec(wanted))
    with pytest.raises(UsageError, match=message):
        prepare(options_for(corpus, tmp_path / "out", engine=name, engine_options=options))


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'regpt2\[ray\]'"):
        cluster.check_options("ray", {})


def test_without_slurm_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="sbatch and squeue"):
        cluster.check_options("slurm", {"partition": "cpu", "time": "01:00:00"})


# Ray, where it is installed.


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[None]:
    """A cluster of two nodes with one CPU each, named by RAY_ADDRESS."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = cluster_utils.Cluster(True, head_node_args={"num_cpus": 1, "temp_dir": folder})
        cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        cluster.shutdown()


def ray_tasks() -> list[int]:
    """Workers of Ray that are encoding."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::encode"):
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_nodes")
def test_two_nodes_of_ray_give_the_same_bytes_when_their_workers_are_killed(
    start: Start, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    command = start("ray")
    wait_for(ray_tasks, "a task", 120)
    for pid in ray_tasks():
        os.kill(pid, signal.SIGKILL)
    output, _ = command.communicate(timeout=120)
    assert command.returncode == 0 and "Traceback" not in output, output
    assert folder_bytes(tmp_path / "out") == plain


@pytest.mark.slow
@pytest.mark.usefixtures("ray_nodes")
def test_stopped_and_killed_on_ray_and_resumed_by_our_own_workers(
    start: Start, corpus: Path, tmp_path: Path, plain: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = finished(out)
        command = start("ray")
        wait_for(lambda: finished(out) > before, "another part", 120)
        command.send_signal(number)
        command.communicate(timeout=30)
        wait_for(lambda: not ray_tasks(), "the end of its tasks")
    prepare(options_for(corpus, out))
    done, planned = re.findall(r"Resuming: (\d+) of (\d+) parts", capfd.readouterr().out)[0]
    assert 2 <= int(done) < int(planned)
    assert folder_bytes(out) == plain


@pytest.mark.slow
@pytest.mark.usefixtures("ray_nodes")
def test_a_task_that_crashes_on_ray_is_one_message(tmp_path: Path) -> None:
    job = EncodeJob("text_files", "bytes", None, "tiktoken", 0.05, Filters(), False, tmp_path)
    no_part: Any = None
    with pytest.raises(Problem, match=r"a Ray task failed: AttributeError: .*resume\.$"):
        cluster.encode("ray", job, [(0, no_part)], n_tasks=1, workers=1, options={}, on_done=print)
