"""The side of llm.c: its trainers in C and CUDA. In: a job as JSON; out: the step times that it prints, turn by turn.

Its source is copied to a temporary folder, built there by its own Makefile, and trains on the same tokens; in C
also from our weights, so its first loss must equal ours. It runs by itself, so it is stopped between turns.
"""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regpt2.data.tokens.shards import write_shard
from sides import serve
from works import PLACES, TrainingWork

STEP = {
    "cpu": re.compile(r"step \d+: train loss ([\d.]+|-?nan) \(took ([\d.]+) ms\)"),
    "cuda": re.compile(r"step +\d+/\d+ \| loss ([\d.]+|-?nan) .*\| ([\d.]+) ms \|"),
}
TOKENS = "dev/data/tinyshakespeare/tiny_shakespeare_{}.bin"  # where the program for a CPU looks for it
SHARED_MEMORY = re.compile(r"cudaCheck_\(cudaMallocManaged.*\n.*cudaMemAdvise.*\n\s*return 1;")


def build(source: Path, folder: Path, device: str) -> Path:
    """Copy and make; returns the program."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git"))
    target, options = "train_gpt2", ["CC=gcc"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        target, options = "train_gpt2cu", ["NO_MULTI_GPU=1", f"GPU_COMPUTE_CAPABILITY={major}{minor}"]
        header = folder / "llmc" / "cuda_utils.cuh"  # its last resort for memory does not compile with CUDA 13
        header.write_text(SHARED_MEMORY.sub("cudaCheck_(err, file, line); return 1;", header.read_text()))
    made = subprocess.run(["make", target, *options], cwd=folder, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr.strip() or "make failed")
    return folder / target


def command(program: Path, work: TrainingWork, exports: Path) -> list[str]:
    """Write its files and return its command; for a CPU all its settings are fixed."""
    folder = program.parent
    ids = np.array(work.token_ids(), dtype=np.uint16)
    (folder / TOKENS).parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        write_shard(folder / TOKENS.format(split), len(ids), [ids])
    if work.device == "cpu":
        (folder / "gpt2_124M.bin").symlink_to((exports / PLACES["llmc"] / "model.bin").resolve())
        return [str(program)]
    data = ["-i", TOKENS.format("train"), "-j", TOKENS.format("val")]
    size = ["-e", f"d{work.model.n_layer}", "-b", work.micro_batch, "-t", work.seq_len, "-d", work.tokens]
    quiet = ["-v", 0, "-s", 0, "-h", 0, "-x", 1000, "-l", 1e-4, "-c", 0.1]
    return [str(program), *map(str, [*data, *size, *quiet])]


def steps(process: subprocess.Popen[bytes], terminal: int, device: str) -> Iterator[dict[str, Any]]:
    """Seconds and loss of one step at a time, as it prints them; after the first, every other one.

    It is stopped just after the next step begins, so that step does not count.
    """
    with open(terminal, errors="replace") as lines, contextlib.suppress(OSError):  # as when its terminal is closed
        found = (match for line in lines if (match := STEP[device].search(line)))
        for whole in found:
            process.send_signal(signal.SIGSTOP)
            yield {"wall_s": float(whole[2]) / 1e3, "cpu_s": None, "loss": float(whole[1])}
            process.send_signal(signal.SIGCONT)
            next(found, None)


def peak_bytes(pid: int) -> int | None:
    """The most memory that the program held."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(match[1]) if match else None


def main() -> None:
    job = json.loads(sys.argv[1])
    work, folder = TrainingWork.from_json(job["work"]), Path(job["folder"])
    program = build(Path(job["peers"]) / "llm.c", folder / "llm.c", work.device)
    inner, outer = pty.openpty()  # it would write to a pipe only when its buffer is full
    process = subprocess.Popen(
        command(program, work, folder),
        cwd=program.parent,
        stdout=outer,
        env=os.environ | {"OMP_NUM_THREADS": str(job["threads"])},
    )
    os.close(outer)
    found = steps(process, inner, work.device)

    def once() -> dict[str, Any]:
        figures = next(found, None)
        if figures is None:
            sys.exit(f"llm.c ended with code {process.wait()}")
        return figures | {"peak_bytes": peak_bytes(process.pid) if work.device == "cpu" else None}

    try:
        serve(once)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
