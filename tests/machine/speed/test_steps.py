"""A step timed in a process of its own is training's own step; what cannot be timed is said in a sentence."""

from dataclasses import replace

import pytest
import torch

from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.machine.speed import steps
from regpt2.machine.speed.steps import DoesNotFit, StepWork, measure
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.optimizer import build_optimizer
from regpt2.training.step import train_step

TINY = StepWork(
    model=GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257),
    micro_batch=2,
    seq_len=16,
    grad_accum_steps=2,
    device="cpu",
    precision="fp32",
    warmup_steps=1,
    steps=3,
)


@pytest.mark.process
def test_the_timed_step_is_the_step_of_a_run() -> None:
    told: list[int] = []
    times = measure(TINY, on_step=told.append)
    assert told == [1, 2, 3, 4] and len(times.step_s) == 3 and times.tokens == 64
    assert times.tokens_per_s == 64 / times.median_s and 0 < max(times.step_s) < times.setup_s
    assert (times.precision, times.compiled, times.attention) == ("fp32", False, "matmul")
    assert 1e8 < times.peak_bytes < 4e9

    device = torch.device("cpu")
    world, model = World(rank=0, local_rank=0, size=1, device=device), GPT(TINY.model, seed=TINY.seed)
    optimizer, batches = build_optimizer(model, TINY.optim), steps._random_batches(TINY, device)
    for loss, norm in zip(times.losses, times.grad_norms, strict=True):
        stats = train_step(model, optimizer, batches, lr=6e-4, grad_clip=1.0, world=world)
        assert loss == pytest.approx(float(stats.loss), rel=1e-5)
        assert norm == pytest.approx(float(stats.grad_norm), rel=1e-3)


@pytest.mark.process
def test_what_needs_more_memory_than_there_is_does_not_fit() -> None:
    huge = replace(TINY, model=replace(TINY.model, vocab_size=1 << 40))  # an embedding of 140 TB
    with pytest.raises(DoesNotFit, match="memory"):
        measure(huge)


@pytest.mark.process
def test_a_process_that_fails_or_hangs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Problem, match=r"not timed within 0 s"):
        measure(TINY, timeout_s=0.2)
    monkeypatch.setattr(steps.sys, "executable", "/bin/false")
    with pytest.raises(Problem, match="ended with exit code 1"):
        measure(TINY)
