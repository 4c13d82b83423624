"""The dry GPU's measurements in tables. In: the folder that build.sh made; out: a JSON file, Markdown on the screen.

    python table.py DIR [--only TEXT ...] [--out FILE]      (make gpu-dry: builds DIR first)
    python table.py --show FILE                             (the tables of a file)

Each row is measured in a process of its own, one after the other, and written at once. With --only a row's name is
'SCRIPT: NAME', and the file keeps the other rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLOWEST_S = 1800  # the slowest row takes two minutes on one free core
Result = dict[str, Any]

# name -> script and its options; a step also names its row of head and loss
STEPS = {
    "GPT-2, eager": ("--mode eager", "ours, eager"),
    "GPT-2": ("", "ours"),
    "modern": ("--model modern", "ours, softcap"),
    "modern, document mask": ("--model document", "ours, softcap"),
    "modern, long windows": ("--model long --micro-batch 1 --optimizer muon", "ours, softcap"),
    "GPT-2, Muon": ("--optimizer muon", "ours"),
    "GPT-2, B=16": ("--micro-batch 16", "ours, B=16"),
    "GPT-2 350M, B=32": ("--model gpt2_350m --micro-batch 32", "ours, 350M, B=32"),
}
LOSSES = {
    "ours": "",
    "ours, eager": "--mode eager",
    "ours, softcap": "--softcap 15",
    "ours, B=16": "--tokens 16384",
    "ours, 350M, B=32": "--tokens 32768 --width 1024",
    "the lecture's": "--loss lecture",
    "the lecture's, eager": "--loss lecture --mode eager",
}
RANKS = {
    f"{strategy}, {mode}": f"--strategy {strategy} --mode {mode}"
    for strategy in ("ddp", "fsdp", "ordered")
    for mode in ("eager", "compiled")
}
JOBS = {
    **{("step", name): arguments for name, (arguments, _) in STEPS.items()},
    **{("loss_bytes", name): arguments for name, arguments in LOSSES.items()},
    **{("ranks", name): arguments for name, arguments in RANKS.items()},
}


def main() -> int:
    options = read_options(__doc__, "dry_gpu")
    if options.show:
        print(tables(json.loads(options.show.read_text())))
        return 0
    chosen = [job for job in JOBS if not options.only or any(text in ": ".join(job) for text in options.only)]
    rows = earlier_rows(options.out) if options.only else {}
    document = {"about": about(options.dir), "rows": []}
    for job in chosen:
        script, name = job
        rows[job] = {"script": script, "name": name, **measured(options.dir, script, JOBS[job].split())}
        outcome = f"{rows[job].get('failed') or 'done'}, {rows[job]['seconds']:.0f} s"
        print(f"{script}: {name}: {outcome}", file=sys.stderr, flush=True)
        document["rows"] = [rows[job] for job in JOBS if job in rows]
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(tables(document))
    return int(not chosen or any("failed" in row for row in document["rows"]))


def earlier_rows(path: Path) -> dict[tuple[str, str], Result]:
    """The rows of an earlier call with this file."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["script"], row["name"]): row for row in rows}


def read_options(description: str | None, name: str) -> argparse.Namespace:
    """The options of this script and of plan_memory.py; `name` ends the name of the result's file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, nargs="?", help="made by build.sh")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only rows with one of these in their name")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of FILE and measure nothing")
    default = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}_{name}.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if not options.show and (options.dir is None or not (options.dir / "libcuda.so.1").exists()):
        parser.error(f"{options.dir} holds no dry GPU: make one with build.sh DIR or make gpu-dry")
    return options


def measured(folder: Path, script: str, arguments: list[str]) -> Result:
    """The script's line of JSON, or why it failed."""
    command = [str(HERE / "run.sh"), str(folder), str(HERE / f"{script}.py"), *arguments]
    started_at = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLOWEST_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {SLOWEST_S} s", "seconds": SLOWEST_S}
    taken = {"arguments": arguments, "seconds": round(time.time() - started_at, 1)}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or [""]
        return {"failed": f"exit code {done.returncode}: {said[-1]}", **taken}
    return {**json.loads(lines[-1]), **taken}


def about(folder: Path) -> dict[str, str]:
    """Facts without which the rows have no meaning."""
    code = "import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)"
    python, torch, cuda = said_by(str(folder / "venv" / "bin" / "python"), "-c", code).split()
    source = Path(os.environ.get("PYTHONPATH", ROOT / "src"))
    git = ["git", "-C", str(source)]
    changed = said_by(*git, "status", "--porcelain", ".")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": said_by(*git, "rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "python": python,
        "torch": torch,
        "cuda": cuda,
        "device": "a pretended H200",
    }


def said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def tables(document: Result) -> str:
    """The three tables, each with its measured rows, then the failures."""
    about, rows = document["about"], document["rows"]
    good = [row for row in rows if "failed" not in row]
    losses = {row["name"]: row for row in good if row["script"] == "loss_bytes"}
    parts = [f"Commit {about['commit']}, Python {about['python']}, torch {about['torch']} for CUDA {about['cuda']}."]
    for script, columns, cells in (
        ("step", STEP_COLUMNS, lambda row: step_cells(row, losses.get(STEPS[row["name"]][1]))),
        ("loss_bytes", LOSS_COLUMNS, loss_cells),
        ("ranks", RANK_COLUMNS, rank_cells),
    ):
        if found := [row for row in good if row["script"] == script]:
            parts.append("\n".join([line(columns), line(["---"] * len(columns)), *(line(cells(row)) for row in found)]))
    parts += [f"{row['script']}: {row['name']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n\n".join(parts)


def line(texts: list[str]) -> str:
    """A table's row."""
    return f"| {' | '.join(texts)} |"


STEP_COLUMNS = ["step", "graphs", "breaks", "kernels of a micro-step, first / further", "products of them"]
STEP_COLUMNS += ["kernels of the update", "waits", "peak GB / planned", "head and loss: peak GB", "traffic, ms"]


def step_cells(row: Result, loss: Result | None) -> list[str]:
    """A step, and head and loss as a part of it. The graphs are the model's, then the optimizer's."""
    of_model, of_all = row["of_model"], row["of_all"]
    peak_bytes, planned_bytes = row["peak_bytes"], row["planned_bytes"]
    more = of_all["graphs"] - of_model["graphs"]
    return [
        row["name"],
        f"{of_model['graphs']} + {more}" if more else str(of_model["graphs"]),
        str(of_all["breaks"]),
        f"{kernels(row['first_micro_step'])} / {kernels(row['further_micro_step'])}",
        str(row["first_micro_step"]["gemms"]),
        str(kernels(row["update"])),
        waits(row),
        f"{peak_bytes / 1e9:.1f} / {planned_bytes / 1e9:.1f} = {peak_bytes / planned_bytes:.2f}",
        f"{loss['peak_bytes'] / 1e9:.2f}" if loss else "-",
        f"{loss['ms_per_update']:.1f}" if loss else "-",
    ]


LOSS_COLUMNS = ["head and loss", "tokens", "width", "peak GB", "at the first call"]
LOSS_COLUMNS += ["GB moved: Inductor's kernels / operators / our kernels", "traffic, ms"]


def loss_cells(row: Result) -> list[str]:
    kinds = ("generated_bytes", "operator_bytes", "own_kernel_bytes")
    return [
        row["name"],
        f"{row['tokens']:,}",
        str(row["width"]),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['first_peak_bytes'] / 1e9:.2f}",
        " / ".join(f"{row[kind] / 1e9:.1f}" for kind in kinds),
        f"{row['ms_per_update']:.1f}",
    ]


RANK_COLUMNS = ["8 ranks", "graphs", "breaks", "exchanges", "in the backward pass", "begin at, %", "waits"]


def rank_cells(row: Result) -> list[str]:
    return [
        row["name"],
        str(row["graphs"]),
        str(row["breaks"]),
        str(len(row["exchanges"])),
        str(row["during_backward"]),
        in_short([round(100 * exchange["at"]) for exchange in row["exchanges"]]),
        waits(row),
    ]


def in_short(shares: list[int]) -> str:
    """Shorten a series of equal numbers: 100 x 13."""
    runs: list[list[int]] = []
    for share in shares:
        if not runs or runs[-1][0] != share:
            runs.append([share, 0])
        runs[-1][1] += 1
    return ", ".join(f"{share} x {n}" if n > 1 else str(share) for share, n in runs)


def waits(row: Result) -> str:
    """Times that a step waits for the device, then torch's message about the first."""
    return f"{row['waits_in_step']}: {row['sync_error']}" if row["sync_error"] else str(row["waits_in_step"])


def kernels(counted: dict[str, int]) -> int:
    """Kernels of every kind; a matrix product or a cuDNN plan counts as one."""
    return sum(counted[name] for name in ("launches", "triton_launches", "gemms", "cudnn_plans"))


if __name__ == "__main__":
    sys.exit(main())
