"""Times on a device. In: a function, or a training step; out: milliseconds, and the row that shows them.

python benchmarks/gpu_timing.py WORK      a training step as a side of a comparison (see sides.py)
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from gpu_items import Check
from regpt2.base.device import (
    choose_compute,
    compiles,
    device_name,
    peak_bytes,
    peak_flops,
    pick_device,
    synchronize,
)
from regpt2.base.ranks.world import World
from regpt2.machine.known_gpus import recognize
from regpt2.machine.planning.formulas import Place, step_seconds
from regpt2.machine.speed.lecture_steps import lecture_model
from regpt2.machine.speed.rates import attention_kernel
from regpt2.machine.speed.steps import DoesNotFit, StepTimes, StepWork, measure, read_work, time_steps
from regpt2.model.flops import flops_per_token, mfu, palm_flops_per_token
from regpt2.model.gpt import GPTConfig
from regpt2.training.memory import Setup, step_memory
from regpt2.training.optimizer import build_optimizer
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step
from sides import serve

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257)


def call_times(call: Callable[[], object], device: torch.device, *, calls: int = 20, warmup: int = 5) -> list[float]:
    """Milliseconds of each call; on a GPU by its own clock, with no wait between calls."""
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type != "cuda":
        return [_by_the_clock(call, device) for _ in range(calls)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def _by_the_clock(call: Callable[[], object], device: torch.device) -> float:
    started_at = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - started_at)


def spread(times: list[float], name: str = "ms") -> dict[str, float]:
    """Median, and the 10th and 90th percentile."""
    ordered, tenth = sorted(times), len(times) // 10
    return {name: statistics.median(times), f"{name}_p10": ordered[tenth], f"{name}_p90": ordered[-1 - tenth]}


def step_work(check: Check, **settings: Any) -> StepWork:
    """A training step as requested; in a smoke run a tiny one."""
    if check.smoke:
        settings |= {"model": TINY, "micro_batch": 1, "seq_len": 32, "warmup_steps": 1, "steps": 2, "compile": "off"}
        settings |= {"grad_accum_steps": min(2, settings.get("grad_accum_steps", 1))}
    return StepWork(device=check.device, **settings)


def keep_step(check: Check, name: str, work: StepWork) -> StepTimes | None:
    """Time a training step and keep its row; None, with the reason, if it does not fit."""
    try:
        times = time_step(check, work)
    except DoesNotFit as why:
        check.keep(name, does_not_fit=str(why)[:200])
        return None
    check.keep(name, **figures_of(check, work, times))
    return times


def time_step(check: Check, work: StepWork) -> StepTimes:
    """In a fresh process; in a smoke run in the item's own, which saves seconds."""
    if check.smoke:
        return time_steps(work, began_at=time.time(), on_step=lambda done: None)
    return measure(work, timeout_s=check.left_s + 60)  # beyond it the item is ended anyway


def predicted(work: StepWork, times: StepTimes, device: torch.device) -> dict[str, float]:
    """The plan of `regpt2 plan`; it does not apply to a lower rung of the ladder."""
    if work.as_lecture or device.type == "mps":
        return {}
    setup = Setup(
        model=work.model,
        micro_batch=work.micro_batch,
        seq_len=work.seq_len,
        grad_accum_steps=work.grad_accum_steps,
        precision=times.precision,
        device=device.type,
        compiled=times.compiled,
        optim=work.optim,
    )
    planned: dict[str, float] = {"planned_peak_bytes": sum(step_memory(setup).values())}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        machine = recognize(card.name, card.total_memory)
        if machine is not None and machine.precision == times.precision:
            planned["planned_step_ms"] = 1000 * sum(step_seconds(setup, Place(machine)).values())
    return planned


def figures_of(check: Check, work: StepWork, times: StepTimes) -> dict[str, Any]:
    """A row of a training step. MFU with causal attention counted once, and as PaLM and nanoGPT count."""
    device = pick_device(check.device)
    flops = {"mfu": times.flops_per_token, "mfu_palm": palm_flops_per_token(work.model, work.seq_len)}
    peak = peak_flops(device, times.precision)
    return {
        "tokens_per_s": times.tokens_per_s,
        **spread([1000 * s for s in times.step_s], "step_ms"),
        **{name: mfu(times.tokens_per_s, flop, peak, 1) for name, flop in flops.items()},
        "peak_bytes": times.peak_bytes,
        **predicted(work, times, device),
        "setup_s": times.setup_s,
        "precision": times.precision,
        "compiled": times.compiled,
        "attention": times.attention,
        "first_loss": times.losses[0],
        "last_loss": times.losses[-1],
        "each_step_s": times.step_s,
        "losses": times.losses,
        "work": [dataclasses.asdict(work)],
    }


def side_command(work: StepWork) -> list[str]:
    """The command that starts a training step as a side."""
    return [sys.executable, __file__, json.dumps(dataclasses.asdict(work))]


def serve_step(work: StepWork) -> None:
    """The step of `time_steps`, run once per request; it cannot scale the loss."""
    device = pick_device(work.device)
    compute, compiled = choose_compute(work.precision, device), compiles(work.compile, device)
    world = World(rank=0, local_rank=0, size=1, device=device)
    model = lecture_model(work.model, work.as_lecture, compute.dtype, work.seed).to(device)
    dtype = torch.float32 if "autocast" in work.as_lecture else compute.dtype
    trainable = make_trainable(model, dtype, world, compiled=compiled)
    optimizer = build_optimizer(model, work.optim, compiled=compiled)
    generator = torch.Generator().manual_seed(work.seed)
    size = (work.grad_accum_steps, work.micro_batch, work.seq_len + 1)
    ids = torch.randint(0, work.model.vocab_size, size, generator=generator).to(device)
    batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids]  # each (B, T)
    about: dict[str, Any] = {
        "device": device_name(device),
        "precision": compute.precision,
        "compiled": compiled,
        "flops_per_token": flops_per_token(work.model, work.seq_len),
        "torch": torch.__version__,
    }

    def once() -> dict[str, Any]:
        stats = train_step(trainable, optimizer, batches, lr=work.optim.lr, grad_clip=work.optim.grad_clip, world=world)
        synchronize(device)
        figures = {"loss": float(stats.loss), "grad_norm": float(stats.grad_norm), "peak_bytes": peak_bytes(device)}
        if "attention" not in about:  # read in the first step, which warms up
            about["attention"] = attention_kernel(lambda: trainable(*batches[0]))
        return figures | about

    serve(once)


if __name__ == "__main__":
    serve_step(read_work(json.loads(sys.argv[1])))
