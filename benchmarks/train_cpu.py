"""Our training step beside build-nanogpt's, on a CPU. In: a path to build-nanogpt; out: a table and a JSON file.

    python benchmarks/train_cpu.py --build-nanogpt PATH [--work 124M-B4|124M-B1|small] [--precision bf16|fp32]

The steps alternate, so that the machine's drift meets both; what counts is the median of the ratios of neighbors.
build-nanogpt's classes are taken from the file at PATH, which is not part of this project; its loop (autocast to bf16,
clipping, its own configure_optimizers, no compile) is repeated here as shipped.
"""

import argparse
import ast
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sides import compare, keep, serve


@dataclass(frozen=True)
class Work:
    """What one step does."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    seq_len: int
    micro_batch: int


WORKS = {
    "124M-B4": Work(12, 12, 768, 50257, 1024, 4),
    "124M-B1": Work(12, 12, 768, 50257, 1024, 1),
    "small": Work(4, 4, 128, 65, 64, 12),  # nanoGPT's setting for a CPU
}


def our_step(work: Work, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The very `train_step` that `regpt2 train` calls."""
    from regpt2.base.device import choose_compute
    from regpt2.base.world import World
    from regpt2.model.gpt import GPT, GPTConfig
    from regpt2.training.optimizer import OptimConfig, build_optimizer
    from regpt2.training.parallel import make_trainable
    from regpt2.training.step import train_step

    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    compute = choose_compute(precision, world.device)
    shape = {key: getattr(work, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = GPT(GPTConfig(block_size=work.seq_len, **shape))
    trainable = make_trainable(model, compute.dtype, world, compiled=False)
    optimizer = build_optimizer(model, OptimConfig())
    return lambda x, y: train_step(trainable, optimizer, [(x, y)], lr=1e-4, grad_clip=1.0, world=world).loss


def their_step(work: Work, precision: str, source: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """build-nanogpt's model and loop, one micro-step."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "DataLoaderLite"]
    names: dict[str, object] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "math": math}
    names |= {"inspect": inspect, "dataclass": dataclass, "master_process": False}
    exec(compile(tree, str(source), "exec"), names)
    torch.set_float32_matmul_precision("high")
    padded = -(-work.vocab_size // 64) * 64
    shape = {key: getattr(work, key) for key in ("n_layer", "n_head", "n_embd")}
    model = names["GPT"](names["GPTConfig"](block_size=work.seq_len, vocab_size=padded, **shape))
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, device_type="cpu")

    def step(x: Tensor, y: Tensor) -> Tensor:
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
        return loss_accum

    return step


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
        is_ours = options.side == "ours"
        step = our_step(work, options.precision) if is_ours else their_step(work, options.precision, source)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, work.vocab_size, (work.micro_batch, work.seq_len + 1), generator=generator)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return serve(lambda: {"loss": step(x, y).item()})
    times = 1 if work.n_embd > 256 else 40
    result = compare(__file__, ["ours", "build-nanogpt"], sys.argv[1:], pairs=options.pairs, times=times)
    command = "python benchmarks/train_cpu.py " + " ".join(sys.argv[1:]).replace(str(options.build_nanogpt), "PATH")
    what = f"training step, {options.work}, {options.precision}: ours against build-nanogpt as shipped"
    keep(result, what, command, options.out)


if __name__ == "__main__":
    main()
