"""How fast text becomes shards. In: a parquet file or a folder of them; out: tokens/s with each encoder, and memory.

    python benchmarks/prepare.py PARQUET [--workers 1 2] [--encoders tiktoken gigatoken] [--out JSON]

Each turn is the whole command `regpt2 prepare` in processes of its own. Its start (1 to 2 s) counts too, so give it a
gigabyte of text or more (a folder of hard links to one file works). All must write the same shards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import keep


def prepare(parquet: Path, encoder: str, workers: int) -> dict[str, float | str]:
    """One run of the command: seconds, tokens, the largest process, and the SHA-256 of its shards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "shards")
        command = [sys.executable, "-m", "regpt2", "prepare", "text_files", "--input", str(parquet), "--out", str(out)]
        command += ["--encoder", encoder, "--workers", str(workers), "--val-tokens", "10000000"]
        began_at = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # with its workers, because it has waited for them
        wall_s = time.perf_counter() - began_at
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
        splits = json.loads((out / "manifest.json").read_text())["splits"].values()
    return {
        "wall_s": wall_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "tokens": sum(split["tokens"] for split in splits),
        "peak_bytes": 1024 * usage.ru_maxrss,
        "shards": " ".join(shard["sha256"] for split in splits for shard in split["shards"]),
    }


def summary(turns: list[dict[str, float]]) -> dict[str, object]:
    """Medians and spreads of a side's turns."""
    by_wall = [turn["tokens"] / turn["wall_s"] for turn in turns]
    by_cpu = [turn["tokens"] / turn["cpu_s"] for turn in turns]
    return {
        "tokens_per_s": statistics.median(by_wall),
        "tokens_per_s_spread": [min(by_wall), max(by_wall)],
        "tokens_per_cpu_s": statistics.median(by_cpu),
        "tokens_per_cpu_s_spread": [min(by_cpu), max(by_cpu)],
        "peak_bytes_of_a_process": max(turn["peak_bytes"] for turn in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--encoders", nargs="+", default=["tiktoken", "gigatoken"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    options = parser.parse_args()
    sides = [(encoder, workers) for workers in options.workers for encoder in options.encoders]
    turns: dict[tuple[str, int], list[dict]] = {side: [] for side in sides}
    for _ in range(options.turns):
        for side in sides:
            turns[side].append(prepare(options.parquet, *side))
            last = turns[side][-1]
            print(
                f"  {side[0]}, {side[1]} worker(s): {last['tokens'] / last['wall_s'] / 1e6:.2f}M tokens/s", flush=True
            )
    if len({turn["shards"] for side in sides for turn in turns[side]}) > 1:
        sys.exit("the shards differ")
    result: dict[str, object] = {"tokens": turns[sides[0]][0]["tokens"]}
    result |= {f"{encoder}, {workers} worker(s)": summary(turns[encoder, workers]) for encoder, workers in sides}
    keep(result, "parquet to shards", "python benchmarks/prepare.py " + " ".join(sys.argv[1:]), options.out)


if __name__ == "__main__":
    main()
