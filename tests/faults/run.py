"""The fault suite. In: a lane; out: one line for each fault, exit code 1 if any is red.

    python tests/faults/run.py [--full] [--only 1,9,retention] [--plant BUG] [--strict] [--list] [--json FILE]

Red: a fault was not met as promised, a final state differs, or fewer fired than planned.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # bits are promised for one number of threads; read when torch is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import damage
import disks
import guards
import kills
import memory
import outputs
import plants
import preparing
import ranks
import screens
import stops
import streams
import zygote
from suite import LANES, Bench, Fault, NotHere, Outcome

import serving
from regpt2.base.console import safe_text

GROUPS = (kills, stops, disks, damage, guards, preparing, memory, outputs, streams, ranks, screens, serving)
FAULTS = sorted((fault for group in GROUPS for fault in group.FAULTS), key=lambda fault: fault.number)
HEAD = f"{'#':>2}  {'fault':<38} {'injected':>11} {'detected':>9} {'mismatches':>11} {'seconds':>8}"


def main() -> int:
    options = parse()
    if options.list:
        print("\n".join(f"{f.number:>2}  {f.name:<38} {planned(f, options):>5}  {f.absent}" for f in FAULTS))
        return 0
    zygote.warm_up()
    began_at = time.monotonic()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        (Path(folder) / "shared").mkdir()
        results = side_by_side(
            [f for f in chosen(options.only) if f.inject and planned(f, options)], Path(folder), options
        )
    return summarize(results, time.monotonic() - began_at, options)


def side_by_side(faults: list[Fault], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Inject `--jobs` faults at a time, each in a fork that forks its own trials; the results in order."""
    waiting, running, results = list(faults), [], []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            fault, answer = waiting[0], folder / f"{waiting.pop(0).number}.json"
            work = partial(write_result, fault, folder, options, answer)
            running.append((fault, answer, zygote.fork(work, folder / f"{fault.number}.log")))
        time.sleep(0.02)
        for each in [each for each in running if not each[2].running()]:
            running.remove(each)
            fault, answer, process = each
            results.append(json.loads(answer.read_text()) if answer.exists() else crashed(fault, process.said))
            show(results[-1])
    return sorted(results, key=lambda result: result["number"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full lane (up to 20 minutes) instead of the fast one")
    parser.add_argument("--only", default="", help="numbers, or parts of names, with commas between")
    parser.add_argument("--plant", choices=list(plants.PLANTS), help="put a known bug into every trial")
    parser.add_argument("--count", type=int, help="inject at most so many of each fault")
    parser.add_argument("--seed", type=int, default=0, help="of the random times and places")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time; each uses about one core")
    parser.add_argument("--strict", action="store_true", help="a fault that this machine cannot inject is red")
    parser.add_argument("--list", action="store_true", help="what there is, and how many are planned")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def chosen(only: str) -> list[Fault]:
    """The faults named by number or by part of a name; all, where none is named."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    found = {
        word: [f for f in FAULTS if word == str(f.number) or (not word.isdigit() and word in f.name)] for word in words
    }
    for word, faults in found.items():
        if not faults:
            sys.exit(f"--only {word}: there is no such fault; --list shows them.")
    return [f for f in FAULTS if not words or any(f in faults for faults in found.values())]


def lane(options: argparse.Namespace) -> str:
    return "full" if options.full else "fast"


def planned(fault: Fault, options: argparse.Namespace) -> int:
    n = fault.planned[LANES.index(lane(options))]
    return min(n, options.count) if options.count else n


def write_result(fault: Fault, folder: Path, options: argparse.Namespace, answer: Path) -> int:
    """Inject one fault and write its row."""
    own = folder / str(fault.number)
    own.mkdir()
    rng = random.Random(f"{fault.number} {options.seed}")
    bench = Bench(own, folder / "shared", planned(fault, options), rng, lane(options), options.plant)
    started_at, skipped = time.monotonic(), ""
    assert fault.inject is not None
    try:
        outcome = fault.inject(bench)
    except NotHere as reason:
        outcome, skipped = Outcome(), str(reason)
    except Exception as error:  # the suite goes on; this fault is red
        outcome = Outcome(failures=[f"{type(error).__name__}: {error}"])
    shutil.rmtree(own, ignore_errors=True)
    red = options.strict if skipped else outcome.is_red(bench.planned)
    seconds = round(time.monotonic() - started_at, 1)
    about = {"number": fault.number, "name": fault.name, "planned": bench.planned}
    row = about | dataclasses.asdict(outcome) | {"seconds": seconds, "skipped": skipped, "red": red}
    answer.with_suffix(".part").write_text(json.dumps(row))
    answer.with_suffix(".part").rename(answer)
    return 0


def crashed(fault: Fault, said: str) -> dict[str, Any]:
    """The row of a fault whose own process ended."""
    about = {"number": fault.number, "name": fault.name, "planned": 1, "seconds": 0.0, "skipped": "", "red": True}
    return about | dataclasses.asdict(Outcome(failures=[f"the injection itself ended: {said[-1000:]}"]))


def show(row: dict[str, Any]) -> None:
    """The line of a fault, and what went wrong."""
    fired = f"{row['injected']} / {row['planned']}"
    verdict = f"skipped: {row['skipped']}" if row["skipped"] else "RED" if row["red"] else "ok"
    print(
        f"{row['number']:>2}  {row['name']:<38} {fired:>11} {row['detected']:>9} {row['mismatches']:>11} "
        f"{row['seconds']:>8.1f}  {verdict}{': ' if row['remark'] else ''}{row['remark']}",
        flush=True,
    )
    for failure in row["failures"][:5]:
        print(f"      {safe_text(failure[:1000])}")
    if len(row["failures"]) > 5:
        print(f"      and {len(row['failures']) - 5} more", flush=True)


def summarize(results: list[dict[str, Any]], seconds: float, options: argparse.Namespace) -> int:
    """The total line, the file, and the exit code."""

    def total(key: str) -> int:
        return sum(int(result[key]) for result in results)

    red = [result for result in results if result["red"]]
    skipped = sum(bool(result["skipped"]) for result in results)
    absent = [f"{fault.number} ({fault.absent})" for fault in FAULTS if fault.inject is None]
    print(
        f"{len(results)} faults: {total('injected')} / {total('planned')} injected, {total('detected')} detected, "
        f"{total('mismatches')} mismatches, {skipped} skipped, {seconds:.0f} s; "
        + (f"RED: {', '.join(str(result['number']) for result in red)}" if red else "all ok")
    )
    for result in red:  # once more, at the end: a long log is read from there
        show(result)
    if absent and not options.only:
        print(f"not there yet: {', '.join(absent)}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": round(seconds, 1), "faults": results}, indent=1) + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
