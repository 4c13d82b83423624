"""A busy machine: training and generation beside other processes, by the time that idle OpenMP threads spin.

    python benchmarks/busy.py --out benchmarks/results/DATE_cpu_busy.json
    python benchmarks/busy.py --peers DIR --out benchmarks/results/DATE_cpu_busy.json

In: how many processes keep a core busy; out: seconds of the sides, turn by turn in one run. Without --peers the sides
are ours with several GOMP_SPINCOUNT. With it they are ours as the command sets it, build-nanogpt and transformers as
shipped. DIR holds the clone build-nanogpt.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regpt2.base.threads import SPIN_COUNT
from run import command, export, version
from sides import SideFailed, keep, ratios, take_turns
from works import Comparison, GenerationWork, Shape, SideSpec, TrainingWork

DEFAULT = "default"  # GNU OpenMP's default: 300,000 turns
SPINS = (DEFAULT, "0", "1000", "5000", "20000")
DEMO = Shape("demo's shape", 4, 4, 128, 128, 257)
TRAINING = TrainingWork(model=DEMO, micro_batch=12, seq_len=128)
GENERATION = GenerationWork(model=Shape("4 layers, 128 wide", 4, 4, 128, 256, 50257), batch=1, new_tokens=64)


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """`n` other processes that each use a whole core."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def with_spin(started: list[str], spin: str) -> list[str]:
    """The command with this GOMP_SPINCOUNT, or with none."""
    setting = ["-u", "GOMP_SPINCOUNT"] if spin == DEFAULT else [f"GOMP_SPINCOUNT={spin}"]
    return ["env", "-u", "OMP_WAIT_POLICY", *setting, *started]


def sides(work: TrainingWork | GenerationWork, peers: Path | None, folder: Path) -> dict[str, list[str]]:
    """The others are divided by the first."""
    rivals = [SideSpec("transformers", "fp32")]
    if peers is not None and isinstance(work, TrainingWork):
        rivals.insert(0, SideSpec("build-nanogpt", "fp32"))
    comparison = Comparison(work, tuple(rivals))
    place = export(comparison, folder)
    ours = command(comparison, comparison.ours, peers, place)
    if peers is None:
        return {spin: with_spin(ours, spin) for spin in SPINS}
    theirs = {str(side): side for side in rivals if version(side.runtime, peers)}
    return {"regpt2": with_spin(ours, SPIN_COUNT)} | {
        name: with_spin(command(comparison, side, peers, place), DEFAULT) for name, side in theirs.items()
    }


def measure(work: TrainingWork | GenerationWork, n_busy: int, options: argparse.Namespace, folder: Path) -> None:
    """One table line: all sides beside `n_busy` processes."""
    print(f"{work.kind}, {work}, {n_busy} busy processes", flush=True)
    commands = sides(work, options.peers, folder)
    first = next(iter(commands))
    with busy_processes(n_busy):
        _, rows = take_turns(commands, least=options.turns, most=options.turns, seconds=0)
    result = {
        "work": f"{work.kind}, {work}",
        "busy": n_busy,
        "ms": {name: 1e3 * statistics.median(row[name]["wall_s"] for row in rows) for name in commands},
        f"times of {first}": {name: statistics.median(ratios(rows, first, name, "wall_s")) for name in commands},
        "turns_s": {name: [row[name]["wall_s"] for row in rows] for name in commands},
    }
    keep(result, "busy machine", " ".join(["python", *sys.argv]), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 4], help="other processes that want a core")
    parser.add_argument("--peers", type=Path, help="folder with the clone build-nanogpt: beside peers instead")
    parser.add_argument("--only", choices=["training", "generation"], help="one of the two works")
    parser.add_argument("--turns", type=int, default=9, help="turns of each side")
    parser.add_argument("--out", type=Path, help="the JSON file to add to")
    options = parser.parse_args()
    works = [work for work in (TRAINING, GENERATION) if options.only in (None, work.kind)]
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            for n_busy in options.busy:
                try:
                    measure(work, n_busy, options, Path(folder))
                except SideFailed as failed:
                    sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
