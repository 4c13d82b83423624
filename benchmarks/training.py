"""The sides of a training step: ours, and the peers'. In: a job as JSON; out: seconds and loss, turn by turn.

A job is the work (see works.py), the side (runtime, precision, compiled) and the folder with the peers' clones.
Classes of build-nanogpt and nanoGPT come from these clones; the loop around them repeats theirs, step by step.
"""

import ast
import contextlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.device import can_compile, choose_compute, peak_bytes, synchronize
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import OptimConfig, build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step
from sides import serve
from works import TrainingWork

Batches = list[tuple[Tensor, Tensor]]
LR, WEIGHT_DECAY, BETAS, GRAD_CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0


def batches(work: TrainingWork) -> Batches:
    """(B, T) inputs and targets for each micro-step."""
    ids = torch.tensor(work.token_ids())
    size = (work.grad_accum_steps, work.micro_batch, work.seq_len)
    x, y = (row.reshape(size).to(work.device) for row in (ids[:-1], ids[1:]))
    return list(zip(x.unbind(), y.unbind(), strict=True))


def ours(work: TrainingWork, precision: str) -> Callable[[Batches], Tensor]:
    """The same `train_step` that `regpt2 train` calls."""
    device = torch.device(work.device)
    world = World(rank=0, local_rank=0, size=1, device=device)
    compute = choose_compute(precision, device)
    model = GPT(GPTConfig(**work.model.sizes())).to(device)
    trainable = make_trainable(model, compute.dtype, world, compiled=can_compile(device))
    optimizer = build_optimizer(model, OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS))
    return lambda pairs: train_step(trainable, optimizer, pairs, lr=LR, grad_clip=GRAD_CLIP, world=world).loss


def build_nanogpt(work: TrainingWork, source: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Its classes alone, because importing the file starts training."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "DataLoaderLite"]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, "inspect": inspect}
    names |= {"dataclass": dataclass, "master_process": False}
    exec(compile(tree, str(source), "exec"), names)
    model = names["GPT"](names["GPTConfig"](**work.model.padded_sizes())).to(work.device)
    return model, model.configure_optimizers(WEIGHT_DECAY, LR, work.device)


def nano_gpt(work: TrainingWork, source: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Its model with GPT-2's biases."""
    spec = importlib.util.spec_from_file_location("nano_gpt_model", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**work.model.padded_sizes(), dropout=0.0, bias=True)).to(work.device)
    return model, model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, work.device)


def transformers(work: TrainingWork) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Its model without dropout, with its trainer's optimizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = work.model.sizes()
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = GPT2Config(n_positions=sizes.pop("block_size"), **sizes, **no_dropout, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    return model.train(), optimizer


def peer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[..., Tensor], autocast: torch.autocast
) -> Callable[[Batches], Tensor]:
    """The loop that build-nanogpt and nanoGPT share: accumulate, clip, set the learning rate, update."""

    def step(pairs: Batches) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=pairs[0][0].device)
        for x, y in pairs:
            with autocast:
                loss = loss_of(x, y) / len(pairs)
            total += loss.detach()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        return total

    return step


def theirs(
    work: TrainingWork, runtime: str, precision: str, compiled: bool, peers: Path
) -> Callable[[Batches], Tensor]:
    """A peer's step."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as build-nanogpt and nanoGPT set it: TF32 on a GPU
    if runtime == "build-nanogpt":
        model, optimizer = build_nanogpt(work, peers / "build-nanogpt" / "train_gpt2.py")
    elif runtime == "nanoGPT":
        model, optimizer = nano_gpt(work, peers / "nanoGPT" / "model.py")
    else:
        model, optimizer = transformers(work)
    called = torch.compile(model) if compiled else model
    autocast = torch.autocast(work.device, dtype=torch.bfloat16, enabled=precision == "bf16")
    if runtime == "transformers":  # it shifts the labels itself
        return peer_step(model, optimizer, lambda x, y: called(input_ids=x, labels=x).loss, autocast)
    return peer_step(model, optimizer, lambda x, y: called(x, y)[1], autocast)


def main() -> None:
    job = json.loads(sys.argv[1])
    work, side = TrainingWork.from_json(job["work"]), job["side"]
    with contextlib.redirect_stdout(sys.stderr):
        if side["runtime"] == "regpt2":
            step = ours(work, side["precision"])
        else:
            step = theirs(work, side["runtime"], side["precision"], side["compiled"], Path(job["peers"]))
    pairs, device = batches(work), torch.device(work.device)

    def once() -> dict[str, Any]:
        loss = step(pairs)
        synchronize(device)
        figures: dict[str, Any] = {"loss": float(loss)}
        if device.type == "cuda":
            figures["peak_bytes"] = peak_bytes(device)
        return figures

    serve(once)


if __name__ == "__main__":
    main()
