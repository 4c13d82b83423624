"""Our training step beside build-nanogpt's, on a CPU. In: a path to build-nanogpt; out: a table and a JSON file.

    python benchmarks/train_cpu.py --build-nanogpt PATH [--work 124M-B4|124M-B1|small] [--precision bf16|fp32]

Each side lives in a process of its own (two OpenMP pools in one process would leave one core active) and makes one
step when asked; the steps alternate, ours and theirs, so that the machine's drift meets both. What counts is the
median of the ratios of neighbors. build-nanogpt's classes are taken from the file at PATH, which is not part of this
project; its loop (autocast to bf16, clipping, its own configure_optimizers, no compile) is repeated here as shipped.
"""

import argparse
import ast
import inspect
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What one step does."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    seq_len: int
    micro_batch: int

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len


WORKS = {
    "124M-B4": Work(12, 12, 768, 50257, 1024, 4),
    "124M-B1": Work(12, 12, 768, 50257, 1024, 1),
    "small": Work(4, 4, 128, 65, 64, 12),  # nanoGPT's setting for a CPU
}


def our_step(work: Work, precision: str) -> Callable[[Tensor, Tensor], float]:
    """The very `train_step` that `regpt2 train` calls."""
    from regpt2.base.device import choose_compute, pick_device
    from regpt2.base.world import start_world
    from regpt2.model.gpt import GPT, GPTConfig
    from regpt2.training.optimizer import OptimConfig, build_optimizer
    from regpt2.training.parallel import make_trainable
    from regpt2.training.step import train_step

    compute = choose_compute(precision, pick_device("cpu"))
    with start_world(torch.device("cpu")) as world:
        pass
    shape = {key: getattr(work, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = GPT(GPTConfig(block_size=work.seq_len, **shape))
    trainable = make_trainable(model, compute.dtype, world, compiled=False)
    optimizer = build_optimizer(model, OptimConfig())

    def step(x: Tensor, y: Tensor) -> float:
        return float(train_step(trainable, optimizer, [(x, y)], lr=1e-4, grad_clip=1.0, world=world).loss)

    return step


def their_step(work: Work, precision: str, source: Path) -> Callable[[Tensor, Tensor], float]:
    """build-nanogpt's model and loop, one micro-step."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "DataLoaderLite"]
    names: dict[str, object] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math}
    names |= {"inspect": inspect, "dataclass": dataclass, "master_process": False}
    exec(compile(tree, str(source), "exec"), names)
    torch.set_float32_matmul_precision("high")
    padded = -(-work.vocab_size // 64) * 64
    model = names["GPT"](
        names["GPTConfig"](
            block_size=work.seq_len, vocab_size=padded, n_layer=work.n_layer, n_head=work.n_head, n_embd=work.n_embd
        )
    )
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type="cpu")

    def step(x: Tensor, y: Tensor) -> float:
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            _, loss = model(x, y)
        loss_accum = loss.detach()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        optimizer.step()
        return float(loss_accum)

    return step


def serve(side: str, work: Work, precision: str, source: Path) -> None:
    """A child: make a step for each line on standard input, answer with its seconds."""
    make = our_step(work, precision) if side == "ours" else their_step(work, precision, source)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, work.vocab_size, (work.micro_batch, work.seq_len + 1), generator=generator)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for line in sys.stdin:
        wall_at, cpu_at = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = make(x, y)
        answer = {"wall_s": time.perf_counter() - wall_at, "cpu_s": time.process_time() - cpu_at, "loss": loss}
        answer["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(answer), flush=True)


class Side:
    """The parent's end of a child."""

    def __init__(self, side: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--side", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps(self, n: int) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(work: Work, pairs: int, arguments: list[str]) -> dict[str, object]:
    sides = {name: Side(name, arguments) for name in ("ours", "build-nanogpt")}
    per_turn = 1 if work.n_embd > 256 else 40
    for side in sides.values():
        side.steps(per_turn)  # warm-up
    rows = []
    for _ in range(pairs):
        rows.append({name: side.steps(per_turn) for name, side in sides.items()})
        ratio = rows[-1]["build-nanogpt"]["wall_s"] / rows[-1]["ours"]["wall_s"]
        print(
            f"  {ratio:.2f}x  " + ", ".join(f"{n} {r['wall_s'] / per_turn:.3f} s" for n, r in rows[-1].items()),
            flush=True,
        )
    for side in sides.values():
        side.end()

    def ratios(key: str) -> list[float]:
        return [row["build-nanogpt"][key] / row["ours"][key] for row in rows]

    return {
        "tokens_per_s": {
            name: work.tokens * per_turn / statistics.median(row[name]["wall_s"] for row in rows) for name in sides
        },
        "wall_ratio": statistics.median(ratios("wall_s")),
        "wall_ratio_spread": [min(ratios("wall_s")), max(ratios("wall_s"))],
        "cpu_ratio": statistics.median(ratios("cpu_s")),
        "peak_bytes": {name: rows[-1][name]["peak_bytes"] for name in sides},
        "loss": {name: rows[-1][name]["loss"] for name in sides},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-nanogpt", type=Path, required=True, help="folder that holds its train_gpt2.py")
    parser.add_argument("--work", choices=list(WORKS), default="124M-B4")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    parser.add_argument("--side", choices=["ours", "build-nanogpt"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    work, source = WORKS[options.work], options.build_nanogpt / "train_gpt2.py"
    if options.side:
        return serve(options.side, work, options.precision, source)
    print(f"{options.work}, {options.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    result = measure(work, options.pairs, sys.argv[1:])
    about = {
        "what": "training step: ours against build-nanogpt as shipped",
        "command": "python benchmarks/train_cpu.py "
        + " ".join(sys.argv[1:]).replace(str(options.build_nanogpt), "PATH"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        former = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*former, {**about, **result}], indent=1) + "\n")


if __name__ == "__main__":
    main()
