"""A checkpoint during training: how long does the loop wait, and does the writing slow down the steps?"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpu_items import Check
from gpu_timing import TINY
from regpt2.base.device import choose_compute, pick_device, synchronize
from regpt2.base.ranks.world import World
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training import checkpoint
from regpt2.training.optimizer import OptimConfig, build_optimizer, state_tensors
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step


def run(check: Check) -> None:
    device = pick_device(check.device)
    world = World(rank=0, local_rank=0, size=1, device=device)
    model = GPT(TINY if check.smoke else GPTConfig()).to(device)
    trainable = make_trainable(model, choose_compute("auto", device).dtype, world, compiled=False)
    optimizer = build_optimizer(model, OptimConfig())
    shape = (1, 33) if check.smoke else (16, 1025)
    ids = torch.randint(0, model.config.vocab_size, shape, device=device)

    def step_s() -> float:
        started_at = time.perf_counter()
        train_step(trainable, optimizer, [(ids[:, :-1], ids[:, 1:])], lr=1e-4, grad_clip=1.0, world=world)
        synchronize(device)
        return time.perf_counter() - started_at

    def take(number: int, saver: checkpoint.Saver) -> checkpoint.Snapshot:
        weights, moments = dict(model.named_parameters()), state_tensors(optimizer, model)
        return checkpoint.snapshot(number, "{}\n", weights, moments, {}, saver.copies)

    before = [step_s() for _ in range(3 if check.smoke else 25)]  # the first fifth warms up
    with tempfile.TemporaryDirectory(dir=check.folder) as folder:
        saver = checkpoint.Saver(Path(folder), keep=1)
        for number in (1, 2):  # the first also has to allocate its memory
            written = Path(folder) / f"step-{number:08d}"
            started_at = time.perf_counter()
            saver.save(lambda number=number: take(number, saver))
            stall_s = time.perf_counter() - started_at
            beside = [step_s()]
            while not written.exists() and time.perf_counter() - started_at < 60:
                beside.append(step_s())
            failure = saver.wait()
            check.keep(
                f"checkpoint {number}",
                loop_waits_s=stall_s,
                on_disk_after_s=time.perf_counter() - started_at,
                step_ms_before=1000 * statistics.median(before[len(before) // 5 :]),
                step_ms_beside=1000 * statistics.median(beside),
                on_disk_bytes=sum(path.stat().st_size for path in written.glob("*")),
                ok=failure is None,
                why=str(failure or ""),
            )
