"""One training run by nanoGPT's train.py and by `regpt2 train`. In: a data folder; out: both curves, as JSON.

    python benchmarks/beside_nanogpt.py DATA --nanogpt CLONE --work FOLDER --out JSON [--steps 600] [--seeds 1 2]

DATA is a folder of nanoGPT's kind (train.bin, val.bin), which both read. GPT-2's own shape at 12.4M parameters with
GPT-2's tokenizer, the same batch sizes, learning rates and AdamW, fp32, nothing compiled. Both run at the same time,
each on a core of its own. nanoGPT draws its windows at random, with replacement, from one fixed seed; regpt2 reads
each window once, in an order that the seed chooses.

Every EVERY updates the weights of both are scored by `regpt2 evaluate`, on the same validation tokens. Once stopped,
the same command resumes both, each by its own means: regpt2 exactly, nanoGPT with its random numbers from the start.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import regpt2
from sides import keep

N_LAYER, N_HEAD, N_EMBD, CONTEXT = 6, 6, 192, 256
MICRO_BATCH, MICRO_STEPS = 4, 2
LR, WARMUP_STEPS, WEIGHT_DECAY = 1e-3, 50, 0.1
VAL_TOKENS = 131_072
EVERY = 100
UNSETTLED = 10  # updates at the start of a process, whose time does not count
_SAVING, _STEP = "saving checkpoint", re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--work", type=Path, required=True, help="a folder for runs and checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="of regpt2's runs, one after another")
    options = parser.parse_args()
    for needed in (options.nanogpt / "train.py", options.data / "train.bin", options.data / "val.bin"):
        if not needed.is_file():
            parser.error(f"{needed} is missing; --nanogpt is a clone of nanoGPT, DATA has train.bin and val.bin.")
    data, work = options.data.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as both:
        theirs = both.submit(run_theirs, options.nanogpt.resolve(), data, work / "nanogpt", options.steps)
        ours = both.submit(lambda: [run_ours(data, work, options.steps, seed) for seed in options.seeds])
    sides = {"nanoGPT": theirs.result(), **{f"regpt2, seed {run['seed']}": run for run in ours.result()}}
    for name, side in sides.items():
        print(f"{name:22} {side['ms_per_step']:8.0f} ms per update, {side['peak_bytes'] / 2**20:6.0f} MiB")
    for step in sides["nanoGPT"]["val_loss"]:
        losses = (side["val_loss"].get(step, float("nan")) for side in sides.values())
        print(f"update {step:>5}: ", *(f"{loss:.4f}" for loss in losses))
    result: dict[str, object] = {"steps": options.steps, "val_tokens": VAL_TOKENS, "sides": sides}
    keep(result, "nanoGPT's train.py beside regpt2 train", " ".join(sys.argv), options.out)


def run_theirs(clone: Path, data: Path, out: Path, n_steps: int) -> dict[str, Any]:
    """nanoGPT's train.py; its only checkpoint is copied each time that it has been written."""
    out.mkdir(exist_ok=True)
    settings = {
        "out_dir": out, "dataset": data, "device": "cpu", "dtype": "float32", "compile": False,
        "init_from": "resume" if (out / "ckpt.pt").exists() else "scratch",
        "n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": N_EMBD, "block_size": CONTEXT, "bias": True, "dropout": 0.0,
        "batch_size": MICRO_BATCH, "gradient_accumulation_steps": MICRO_STEPS,
        "learning_rate": LR, "min_lr": LR / 10, "warmup_iters": WARMUP_STEPS, "weight_decay": WEIGHT_DECAY,
        "max_iters": n_steps, "lr_decay_iters": n_steps,
        "eval_interval": EVERY, "eval_iters": 1, "log_interval": 1,
    }  # fmt: skip
    command = [sys.executable, "-u", "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    times, saved = {}, False
    with (out / "log.txt").open("a") as log:
        process = started(command, core=0, cwd=clone)
        for line in lines_of(process, log):
            if found := _STEP.match(line):
                step, _, ms = int(found[1]), *map(float, found.groups()[1:])
                times[step] = ms
                if saved:
                    shutil.copyfile(out / "ckpt.pt", out / f"{step:06d}.pt")
            saved = line.startswith(_SAVING)
        peak = finished(process)
    settled = [ms for step, ms in times.items() if step >= min(times) + UNSETTLED and step % EVERY]
    score = partial(regpt2.evaluate, data=data, val_tokens=VAL_TOKENS, precision="fp32")
    return {
        "command": command[1:],
        "ms_per_step": statistics.median(settled),
        "peak_bytes": peak,
        "val_loss": {int(path.stem): score(f"{path}:gelu")["val_loss"]["loss"] for path in sorted(out.glob("0*.pt"))},
    }


def run_ours(data: Path, work: Path, n_steps: int, seed: int) -> dict[str, Any]:
    """`regpt2 train` with the same settings."""
    run = work / f"regpt2-{seed}"
    settings = {
        "data": data, "run": run, "seed": seed, "precision": "fp32", "compile": "off",
        "model.n-layer": N_LAYER, "model.n-head": N_HEAD, "model.n-embd": N_EMBD, "model.block-size": CONTEXT,
        "model.activation": "gelu",
        "batch.batch-tokens": MICRO_BATCH * MICRO_STEPS * CONTEXT, "batch.micro-batch": MICRO_BATCH,
        "batch.seq-len": CONTEXT,
        "optim.lr": LR, "optim.weight-decay": WEIGHT_DECAY, "schedule.warmup-steps": WARMUP_STEPS,
        "max-steps": n_steps, "save-every": EVERY, "sample-every": 0, "log-every": 1,
        "eval-every": EVERY, "evals.names": "val_loss", "evals.val-tokens": VAL_TOKENS,
    }  # fmt: skip
    pairs = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "regpt2", "train", "gpt2_124m", *pairs]
    with (work / f"regpt2-{seed}.txt").open("a") as log:
        process = started(command, core=1)
        for _ in lines_of(process, log):
            pass
        peak = finished(process)
    record = regpt2.read_record(run)
    losses = zip(record["step"], record["val_loss.loss"], strict=True)
    return {
        "seed": seed,
        "command": command[1:],
        "ms_per_step": float(np.nanmedian(record["step_ms"][UNSETTLED:])),
        "peak_bytes": peak,
        "val_loss": {int(step): float(loss) for step, loss in losses if loss == loss},
    }


def started(command: list[str], core: int, cwd: Path | None = None) -> "subprocess.Popen[str]":
    one_thread = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
    return subprocess.Popen(
        ["taskset", "-c", str(core), *command],
        cwd=cwd, env=os.environ | one_thread, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def lines_of(process: "subprocess.Popen[str]", log: Any) -> Iterator[str]:
    """What it prints, kept in the log too."""
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        yield line


def finished(process: "subprocess.Popen[str]") -> int:
    """Its peak memory in bytes, when it has ended well."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, process.args))} ended with {process.returncode}; see its log.")
    return 1024 * usage.ru_maxrss


if __name__ == "__main__":
    main()
