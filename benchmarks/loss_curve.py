"""Is the fast path the same training? In: a prepared data folder; out: its loss curve beside that of plain fp32.

    python benchmarks/loss_curve.py data/python_library_bytes [--build-nanogpt PATH] [--steps 100]
                                                             [--micro-steps 1] [--out FILE]

The same weights, batches and learning rates, GPT-2's width: plain fp32 (a softmax over whole rows, whole logits,
F.cross_entropy, AdamW not fused), ours in fp32 and bf16, and with PATH build-nanogpt's model under its bf16 autocast.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regpt2.base.device import choose_compute
from regpt2.base.ranks.world import World
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.tokens.shards import open_tokens
from regpt2.machine.speed.lecture_steps import lecture_model, unfused_adamw
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step
from sides import keep
from training import build_nanogpt
from works import Shape, TrainingWork

SHAPE = Shape("2 layers, 768 wide", n_layer=2, block_size=512, vocab_size=320)  # no padding, which theirs would learn
MICRO_BATCH, SEQ_LEN = 2, 512
LR, WARMUP_STEPS, GRAD_CLIP, SEED = 6e-4, 10, 1.0, 1337
CPU = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))

Step = Callable[[list[tuple[Tensor, Tensor]], float], Tensor]


def plain() -> Step:
    """As in the lecture, before any speed-up."""
    torch.set_float32_matmul_precision("highest")
    parts = ("plain_attention", "kept_gelu", "whole_logits")
    model = lecture_model(GPTConfig(**SHAPE.sizes()), parts, torch.float32, SEED)
    optimizer = unfused_adamw(model, OptimConfig())
    return lambda batches, lr: train_step(model, optimizer, batches, lr=lr, grad_clip=GRAD_CLIP, world=CPU).loss


def ours(precision: str) -> Step:
    """As in `regpt2 train`."""
    compute = choose_compute(precision, CPU.device)
    model = GPT(GPTConfig(**SHAPE.sizes()), seed=SEED)
    trainable = make_trainable(model, compute.dtype, CPU, compiled=False)
    optimizer = build_optimizer(model, OptimConfig())
    return lambda batches, lr: train_step(trainable, optimizer, batches, lr=lr, grad_clip=GRAD_CLIP, world=CPU).loss


def theirs(source: Path) -> Step:
    """build-nanogpt's model and optimizer, its loop's autocast."""
    work = TrainingWork(model=SHAPE, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN)
    model, optimizer = build_nanogpt(work, source)
    weights = GPT(GPTConfig(**SHAPE.sizes()), seed=SEED).state_dict()
    model.load_state_dict({f"transformer.{name}": value for name, value in weights.items()}, strict=False)

    def step(batches: list[tuple[Tensor, Tensor]], lr: float) -> Tensor:
        optimizer.zero_grad()
        loss_sum = torch.zeros(())
        for x, y in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                _, loss = model(x, y)
            (loss / len(batches)).backward()
            loss_sum += loss.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return loss_sum

    return step


def tensor(ids: NDArray[np.int64]) -> Tensor:
    """Contiguous, as build-nanogpt's loss requires."""
    return torch.from_numpy(np.ascontiguousarray(ids))


def curve(step: Step, data: Path, batch: BatchConfig, steps: int) -> list[float]:
    """The loss of each step."""

    def losses() -> Iterator[float]:
        with open_tokens(data, "train") as tokens:
            loader = Loader(tokens, batch, seed=SEED)
            for i in range(1, steps + 1):
                pairs = [(tensor(x), tensor(y)) for x, y in loader.batch(i).micro_batches]
                yield float(step(pairs, LR * min(1.0, i / WARMUP_STEPS)))

    return list(losses())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--build-nanogpt", type=Path, help="folder that holds its train_gpt2.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-steps", type=int, default=1, help=f"of {MICRO_BATCH * SEQ_LEN:,} tokens, in each step")
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    options = parser.parse_args()
    sides: dict[str, Callable[[], Step]] = {"ours, fp32": lambda: ours("fp32"), "ours, bf16": lambda: ours("bf16")}
    if options.build_nanogpt:
        sides["build-nanogpt, bf16 autocast"] = lambda: theirs(options.build_nanogpt / "train_gpt2.py")
    batch_tokens = options.micro_steps * MICRO_BATCH * SEQ_LEN
    batch = BatchConfig(batch_tokens=batch_tokens, micro_batch=MICRO_BATCH, seq_len=SEQ_LEN)
    expected = curve(plain(), options.data, batch, options.steps)
    print(f"plain fp32: {expected[0]:.4f} -> {expected[-1]:.4f}", flush=True)
    result: dict[str, object] = {"plain_fp32": expected}
    for name, make in sides.items():
        losses = curve(make(), options.data, batch, options.steps)
        apart = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
        result[name] = {"mean": sum(apart) / len(apart), "largest": max(apart), "at_step": 1 + apart.index(max(apart))}
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    what = f"loss curve, {SHAPE.name}, {options.steps} steps of {batch_tokens} tokens: nats from plain fp32"
    command = f"python benchmarks/loss_curve.py DATA --steps {options.steps} --micro-steps {options.micro_steps}"
    keep(result, what, command + " --build-nanogpt PATH" * bool(options.build_nanogpt), options.out)


if __name__ == "__main__":
    main()
