"""The predictions of `regpt2 plan` beside real steps. In: nothing; out: a table and a JSON file.

    python benchmarks/plan_check.py [--only 124M ...] [--out FILE] [--device auto]

Memory is by formula. Time is predicted as in `plan --measure`, from few micro-steps, and compared with the whole
update. Each step runs in a process of its own. On a GPU the formulas for time are shown too.
"""

import argparse
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from regpt2.base.device import device_name, pick_device
from regpt2.base.version import commit
from regpt2.config.run import RunConfig
from regpt2.data.loader import BatchConfig
from regpt2.machine.planning.run_time import formula_time, measured_time
from regpt2.machine.planning.target import find_target, setup_at
from regpt2.machine.speed.steps import StepWork, measure
from regpt2.model.gpt import GPTConfig
from regpt2.training.memory import step_memory

BYTES = {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 257}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384}
MEDIUM = {"n_layer": 24, "n_head": 16, "n_embd": 1024}
LARGE = {"n_layer": 36, "n_head": 20, "n_embd": 1280}
XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600}
# (name, shape, micro-batch, tokens per sequence, micro-steps, precision)
ON_CPU = [
    ("124M", {}, 1, 1024, 4, "bf16"),
    ("124M", {}, 4, 1024, 1, "bf16"),
    ("124M", {}, 2, 1024, 4, "bf16"),
    ("124M", {}, 1, 1024, 1, "fp32"),
    ("124M", {}, 8, 256, 2, "bf16"),
    ("350M", MEDIUM, 1, 1024, 1, "bf16"),
    ("small", SMALL, 4, 256, 8, "bf16"),
    ("small", SMALL, 4, 512, 4, "fp32"),
    ("bytes", BYTES, 8, 512, 4, "bf16"),
    ("bytes", BYTES, 16, 256, 4, "fp32"),
]
ON_GPU = [
    ("124M", {}, 64, 1024, 8, "bf16"),
    ("124M", {}, 16, 1024, 32, "bf16"),
    ("124M", {}, 128, 1024, 4, "bf16"),
    ("124M", {}, 16, 1024, 8, "fp32"),
    ("350M", MEDIUM, 32, 1024, 16, "bf16"),
    ("350M", MEDIUM, 8, 1024, 16, "bf16"),
    ("774M", LARGE, 16, 1024, 16, "bf16"),
    ("1558M", XL, 8, 1024, 16, "bf16"),
]


def check(work: tuple[str, dict[str, int], int, int, int, str], device: str) -> dict[str, object]:
    """Predict, then measure the whole update."""
    name, shape, micro_batch, seq_len, accum, precision = work
    model = GPTConfig(**shape, block_size=seq_len)
    batch = BatchConfig(batch_tokens=micro_batch * seq_len * accum, micro_batch=micro_batch, seq_len=seq_len)
    config = RunConfig(model=model, batch=batch, precision=precision, device=device)
    target = find_target(config, "", 1, 1)
    setup = setup_at(config, target)
    by_formula = formula_time(setup, target) if target.place else None
    predicted, _, tried = measured_time(config, setup, target)
    whole = StepWork(
        model=model,
        micro_batch=micro_batch,
        seq_len=seq_len,
        grad_accum_steps=accum,
        device=device,
        precision=precision,
        warmup_steps=3 if target.device.type == "cuda" else 1,
        steps=5,
    )
    times = measure(whole)
    return {
        "name": name,
        "micro_batch": micro_batch,
        "seq_len": seq_len,
        "grad_accum_steps": accum,
        "precision": precision,
        "tried": [tried.micro_batch, tried.grad_accum_steps],
        "predicted_bytes": sum(step_memory(setup).values()),
        "measured_bytes": times.peak_bytes,
        "predicted_s": predicted.seconds,
        "formula_s": by_formula.seconds if by_formula else None,
        "measured_s": times.median_s,
        "steps_s": times.step_s,
    }


def row(one: dict[str, object]) -> str:
    """A line of the table."""
    shape = f"{one['micro_batch']} x {one['seq_len']} x {one['grad_accum_steps']}"
    memory = [1e-9 * float(one[key]) for key in ("predicted_bytes", "measured_bytes")]  # type: ignore[arg-type]
    time = [float(one[key]) for key in ("predicted_s", "measured_s")]  # type: ignore[arg-type]
    cells = [f"{a:.3g} | {b:.3g} | {a / b - 1:+.1%}" for a, b in (memory, time)]
    formula = "" if one["formula_s"] is None else f" {one['formula_s']:.3g} ({one['formula_s'] / time[1] - 1:+.1%}) |"  # type: ignore[operator]
    return f"| {one['name']} | {shape} | {one['precision']} | {cells[0]} | {cells[1]} |{formula}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of works: 124M 350M small bytes ...")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    works = [
        work
        for work in (ON_GPU if device.type == "cuda" else ON_CPU)
        if options.only in ([], None) or work[0] in options.only
    ]
    print("| model | B x T x micro-steps | precision | GB predicted | measured | off | s predicted | measured | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for work in works:
        results.append(check(work, options.device))
        print(row(results[-1]), flush=True)
    kind = "gpu" if device.type == "cuda" else "cpu"
    today = datetime.now(UTC).date().isoformat()
    out = options.out or Path(__file__).parent / "results" / f"{today}_{kind}_plan.json"
    about = {"device": device_name(device), "torch": torch.__version__, "python": platform.python_version()}
    about |= {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
