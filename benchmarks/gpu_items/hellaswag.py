"""HellaSwag's 10,042 scenes: our batches against one example at a time. Rows of random ids, about as long as its own.

The one at a time are 200 of them, and the time for all is reckoned from these.
"""

import random

import torch

from gpu_items import Check
from gpu_timing import TINY, call_times
from hellaswag_cpu import one_at_a_time, ours
from regpt2.base.device import choose_compute, pick_device
from regpt2.base.world import World
from regpt2.evals import EvalContext
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.scoring.endings import Question
from regpt2.training.parallel import in_compute_type


def run(check: Check) -> None:
    device = pick_device(check.device)
    model = attentive(GPT(TINY if check.smoke else GPTConfig())).to(device).eval()
    context = EvalContext(
        model=in_compute_type(model, choose_compute("auto", device).dtype),
        world=World(rank=0, local_rank=0, size=1, device=device),
        data=None,
        seq_len=model.config.block_size,
        batch=64,
        val_tokens=1,
    )
    n_all, n_some = (16, 16) if check.smoke else (10_042, 200)
    questions = made_up(n_all, model.config.vocab_size, longest=24 if check.smoke else 110)
    some = questions[:n_some]
    ours(context, some)  # warm-up
    [ms] = call_times(lambda: ours(context, questions), device, calls=1, warmup=0)
    check.keep(f"ours, {n_all:,} scenes", seconds=ms / 1000, scenes_per_s=1000 * n_all / ms)
    one_at_a_time(context, some[:10])
    [slow_ms] = call_times(lambda: one_at_a_time(context, some), device, calls=1, warmup=0)
    slow_s = slow_ms / 1000 * n_all / n_some
    check.keep(f"one at a time, {n_some} scenes", seconds=slow_s, scenes_per_s=n_all / slow_s)
    pairs = zip(ours(context, some), one_at_a_time(context, some), strict=True)
    same = sum(a == b for a, b in pairs) / n_some
    check.keep("together", faster_by=slow_s / (ms / 1000), same_choice=same, ok=same >= 0.95)  # rounding may turn a few


def attentive(model: GPT) -> GPT:
    """As it begins, a model looks at little but the last token: mixed up contexts would hardly show."""
    with torch.no_grad():
        for p in model.h.parameters():
            if p.dim() == 2:
                p.normal_(std=2 / p.shape[1] ** 0.5, generator=torch.Generator().manual_seed(0))
    return model


def made_up(n: int, vocab_size: int, longest: int) -> list[Question]:
    """A third short scenes (of films), two thirds long ones (of instructions); four endings each."""
    chance = random.Random(0)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(vocab_size) for _ in range(chance.randint(least, most)))

    def scene() -> Question:
        most, ending = (longest, longest // 2) if chance.random() < 2 / 3 else (longest // 3, longest // 5)
        return Question(ids(most // 4, most), tuple(ids(ending // 4, ending) for _ in range(4)))

    return [scene() for _ in range(n)]
