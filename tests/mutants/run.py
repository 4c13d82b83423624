"""The mutants' lane. In: the list of mutants; out: one line for each, exit code 1 unless the tests killed them all.

    python tests/mutants/run.py [--only WORD,WORD] [--sample N] [--list] [--jobs N] [--timeout-s N]

The repository is copied, and the listed tests run on the copy: they have to pass. Then each mutant is planted alone,
in a copy of its own, and its tests run again. Killed: one of them fails. Anything else that is not a pass (a timeout,
an error while tests are collected, tests that are all skipped) is broken, which is red too.

Every run of pytest is a fork of this process, which has imported torch and nothing of regpt2.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from mutants import ROOT, Mutant, faults, judge, read, sample

sys.path.insert(0, str(ROOT / "tests" / "faults"))
from zygote import Trial, fork

COPIED = ("src", "tests", "benchmarks", "docs", "deploy", "pyproject.toml", "README.md", "CONTRIBUTING.md")
COPIED += (".dockerignore", "constraints.txt", "LICENSE")  # what deploy/Dockerfile takes, besides
WARM = ("torch._dynamo", "safetensors.torch", "matplotlib.pyplot", "tyro", "tiktoken", "huggingface_hub")


K = TypeVar("K")


@dataclass(frozen=True)
class Result:
    """How the tests of one copy ended."""

    verdict: str
    """passed, killed or broken."""
    reason: str
    """The test that failed, or what is broken."""
    seconds: float


class Recorder:
    """A plugin of pytest: what passed, and the first thing that failed."""

    def __init__(self) -> None:
        self.n_passed, self.failed = 0, ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.split("\n")[0] if crash else str(report.longrepr).strip().split("\n")[-1]
            self.failed = f"{report.nodeid}: {said}"
        self.n_passed += report.passed and report.when == "call"


def main() -> int:
    options = parse()
    mutants = chosen(read(), options)
    if options.list:
        print("\n".join(f"{mutant.area:<12} {mutant.name}" for mutant in mutants))
        return 0
    if found := [f"{mutant.area}: {mutant.name}: {fault}" for mutant in mutants for fault in faults(mutant)]:
        print("\n".join(found))
        return 2
    began_at = time.monotonic()
    for name in WARM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy(ROOT, folder / "plain")
        if not passes_without_a_bug(mutants, folder, options):
            return 2
        print(f"{time.monotonic() - began_at:.0f} s: without a bug all listed tests pass.", flush=True)
        results = plant_each(mutants, folder, options)
    return summarize(results, time.monotonic() - began_at)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words with commas between: of areas, files or names")
    parser.add_argument("--sample", type=int, default=0, help="only N of them, from as many areas as there are")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time; each uses about one core")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="for the tests of one mutant")
    parser.add_argument("--list", action="store_true", help="what there is")
    return parser.parse_args()


def chosen(mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Those that the options name; all, where they name none."""
    words = [word.strip() for word in options.only.split(",") if word.strip()]
    found = [m for m in mutants if not words or any(word in f"{m.area} {m.file} {m.name}" for word in words)]
    if not found:
        sys.exit(f"--only {options.only}: there is no such mutant; --list shows them.")
    return sample(found, options.sample) if options.sample else found


def copy(source: Path, target: Path) -> None:
    """What the tests need of a checkout; a copy's compiled files go along, and stay valid by their times."""
    for name in COPIED:
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__") if source == ROOT else None
            shutil.copytree(source / name, target / name, ignore=ignored)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(source / name, target / name)


def passes_without_a_bug(mutants: list[Mutant], folder: Path, options: argparse.Namespace) -> bool:
    """Run every listed test once, file by file; else a failure would say nothing of the bug."""
    tests: dict[str, list[str]] = {}
    for test in sorted({test for mutant in mutants for test in mutant.tests}):
        tests.setdefault(test.partition("::")[0], []).append(test)
    jobs = [(name, partial(start, folder / "plain", folder / f"plain-{i}", of_file))
            for i, (name, of_file) in enumerate(tests.items())]  # fmt: skip
    good = True
    for name, result in side_by_side(jobs, options.jobs, 10 * options.timeout_s):
        if result.verdict != "passed":
            print(f"without a bug, {name}: {result.reason}", flush=True)
            good = False
    return good


def plant_each(mutants: list[Mutant], folder: Path, options: argparse.Namespace) -> list[tuple[Mutant, Result]]:
    """The results, in the order in which they came."""

    def planted(mutant: Mutant, own: Path) -> "Running":
        copy(folder / "plain", own / "copy")
        mutant.plant(own / "copy")
        return start(own / "copy", own, mutant.tests)

    jobs = [(mutant, partial(planted, mutant, folder / str(i))) for i, mutant in enumerate(mutants)]
    results = []
    for mutant, result in side_by_side(jobs, options.jobs, options.timeout_s):
        results.append((mutant, result))
        show(mutant, result)
    return results


@dataclass
class Running:
    """A fork that runs pytest, and the folder with its answer."""

    trial: Trial
    folder: Path
    began_at: float

    def result(self, timeout_s: float) -> Result | None:
        """None while it runs, up to the timeout."""
        seconds = time.monotonic() - self.began_at
        if self.trial.running() and seconds < timeout_s:
            return None
        timed_out = self.trial.running()
        self.trial.end_group()
        answer = self.folder / "answer.json"
        if timed_out or not answer.exists():
            how = f"no answer in {timeout_s:.0f} s" if timed_out else "the process ended by itself"
            result = Result("broken", f"{how}: {self.trial.said[-2000:]}", seconds)
        else:
            verdict, reason = judge(**json.loads(answer.read_text()))
            result = Result(verdict, reason or self.trial.said[-2000:], seconds)
        shutil.rmtree(self.folder, ignore_errors=True)
        return result


def start(root: Path, folder: Path, tests: list[str] | tuple[str, ...]) -> Running:
    """Run tests on the copy at `root`, in a fork; `folder` is for its files."""
    folder.mkdir(exist_ok=True)
    return Running(fork(partial(run_pytest, root, folder, tests), folder / "log"), folder, time.monotonic())


def run_pytest(root: Path, folder: Path, tests: list[str] | tuple[str, ...]) -> int:
    """In the fork: pytest on the copy, with the copy's source; the answer goes into a file."""
    os.chdir(root)
    sys.path.insert(0, str(root / "src"))
    os.environ["PYTHONPATH"] = str(root / "src")  # for the processes that tests start
    package = importlib.import_module("regpt2")
    assert Path(str(package.__file__)).is_relative_to(root), f"{package.__file__} is not the copy"
    del sys.modules["__main__"].__file__  # or each process that a test starts would run this file
    recorder = Recorder()
    options = ["-x", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={root}", f"--basetemp={folder / 'tmp'}"]
    code = int(pytest.main([*options, *tests], plugins=[recorder]))
    answer = {"code": code, "n_passed": recorder.n_passed, "failed": recorder.failed}
    (folder / "answer.part").write_text(json.dumps(answer))
    (folder / "answer.part").rename(folder / "answer.json")
    return 0


def side_by_side(
    jobs: list[tuple[K, Callable[[], Running]]], at_a_time: int, timeout_s: float
) -> Iterator[tuple[K, Result]]:
    """Start a few at a time; each with its result as soon as it has one."""
    waiting, running = list(reversed(jobs)), list[tuple[K, Running]]()
    while waiting or running:
        while waiting and len(running) < at_a_time:
            key, begin = waiting.pop()
            running.append((key, begin()))
        time.sleep(0.02)
        for one in list(running):
            if (result := one[1].result(timeout_s)) is not None:
                running.remove(one)
                yield one[0], result


def show(mutant: Mutant, result: Result) -> None:
    verdict = "SURVIVED" if result.verdict == "passed" else result.verdict
    print(f"{verdict:<8} {result.seconds:5.1f} s  {mutant.area}: {mutant.name}", flush=True)
    print(f"                  {result.reason[:200] if result.verdict == 'killed' else result.reason}", flush=True)


def summarize(results: list[tuple[Mutant, Result]], seconds: float) -> int:
    """The total line, and the exit code."""
    n = {verdict: sum(result.verdict == verdict for _, result in results) for verdict in ("killed", "passed", "broken")}
    print(
        f"{len(results)} mutants: {n['killed']} killed, {n['passed']} survived, {n['broken']} broken, {seconds:.0f} s",
        flush=True,
    )
    for mutant, result in results:  # once more, at the end: a long log is read from there
        if result.verdict != "killed":
            show(mutant, result)
    return 0 if n["killed"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
