"""Planned memory beside the allocator's. In: the folder that build.sh made; out: JSON, the table of docs/speed.md.

    python plan_memory.py DIR [--only TEXT ...] [--out FILE]
    python plan_memory.py --show FILE

torch's allocator counts the peak of an update of four micro-steps. Each row runs in a process of its own.
Exit code 1: a row failed, or the plan is more than 5 % off.
"""

import json
import sys

from table import Result, about, line, measured, read_options

WITHIN = 0.05
ROWS = {  # name -> options of step.py
    "124M, B=64": "",
    "124M, B=16": "--micro-batch 16",
    "124M, B=4": "--micro-batch 4",
    "124M, B=64, eager": "--mode eager",
    "124M, B=16, eager": "--mode eager --micro-batch 16",
    "124M, B=8, eager, TF32": "--mode eager --micro-batch 8 --precision tf32",
    "124M, B=16, Muon": "--micro-batch 16 --optimizer muon",
    "124M, B=16, dropout": "--model dropout --micro-batch 16",
    "350M, B=16": "--model gpt2_350m --micro-batch 16",
    "350M, B=32, eager": "--model gpt2_350m --micro-batch 32 --mode eager",
    "modern, B=64": "--model modern",
    "modern, B=16, eager": "--model modern --micro-batch 16 --mode eager",
    "modern, B=4, Muon": "--model modern --micro-batch 4 --optimizer muon",
    "document mask, B=16": "--model document --micro-batch 16",
    "document mask, B=8, eager": "--model document --micro-batch 8 --mode eager",
}


def main() -> int:
    options = read_options(__doc__, "dry_gpu_memory")
    if options.show:
        document = json.loads(options.show.read_text())
    else:
        document = {"about": about(options.dir), "rows": []}
        for name in (name for name in ROWS if not options.only or any(text in name for text in options.only)):
            row = {"name": name, **measured(options.dir, "step", ROWS[name].split())}
            document["rows"].append(row)
            options.out.write_text(json.dumps(document, indent=1) + "\n")
            print(
                f"{name}: {row.get('failed') or f'{off(row):+.1%}'}, {row['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(table(document))
    return int(not document["rows"] or any("failed" in row or abs(off(row)) > WITHIN for row in document["rows"]))


def off(row: Result) -> float:
    """How far the plan is above the allocated bytes, as a share of them."""
    return float(row["planned_bytes"] / row["peak_bytes"] - 1)


def table(document: Result) -> str:
    """A row for each shape; a failed one shows why."""
    columns = ["model, B x 1024 tokens x 4", "GB planned", "allocated", "error"]
    rows = [
        [row["name"], f"{row['planned_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{100 * off(row):+.1f} %"]
        if "failed" not in row
        else [row["name"], "", "", row["failed"]]
        for row in document["rows"]
    ]
    return "\n".join(line(cells) for cells in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    sys.exit(main())
