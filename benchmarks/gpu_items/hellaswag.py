"""HellaSwag's 10,042 scenes: our batches against one example at a time. Rows of random ids, about as long as its own.

A thousand scenes are scored first as in training, then without cuDNN's attention, which makes a plan for every
new shape. All are scored if time is left. 200 scenes, scored one at a time, represent all.
"""

import random

import torch

from gpu_items import Check, Skip
from gpu_timing import TINY, call_times
from hellaswag_cpu import one_at_a_time, ours
from regpt2.base.device import choose_compute, pick_device
from regpt2.base.ranks.world import World
from regpt2.evals import EvalContext
from regpt2.evals.scoring.endings import Question
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.strategy import in_compute_type


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
    n_all, n_part, n_some = (16, 16, 16) if check.smoke else (10_042, 1000, 200)
    questions = made_up(n_all, model.config.vocab_size, longest=24 if check.smoke else 110)
    some = questions[:n_some]
    try:
        ours(context, some[:20])  # starts cuBLAS and the allocator, and makes few plans
    except torch.OutOfMemoryError:
        if check.dry:
            raise Skip("the scorer takes a shape from a value, and a pretended GPU has none") from None
        raise
    per_s = our_speed(check, context, questions[:n_part], "ours")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        per_s = max(per_s, our_speed(check, context, questions[:n_part], "ours without cuDNN's attention"))
    if not check.smoke and n_all / per_s < check.left_s / 2:
        per_s = our_speed(check, context, questions, "ours")
    one_at_a_time(context, some[:10])
    [slow_ms] = call_times(lambda: one_at_a_time(context, some), device, calls=1, warmup=0)
    slow_per_s = 1000 * n_some / slow_ms
    check.keep(f"one at a time, {n_some} scenes", seconds=slow_ms / 1000, scenes_per_s=slow_per_s)
    pairs = zip(ours(context, some), one_at_a_time(context, some), strict=True)
    same = sum(a == b for a, b in pairs) / n_some
    few = 0.95  # rounding may change a few choices
    check.judge("together", faster_by=per_s / slow_per_s, all_take_s=n_all / per_s, same_choice=same, ok=same >= few)


def our_speed(check: Check, context: EvalContext, questions: list[Question], name: str) -> float:
    """Scenes per second, and a row."""
    [ms] = call_times(lambda: ours(context, questions), context.world.device, calls=1, warmup=0)
    per_s = 1000 * len(questions) / ms
    check.keep(f"{name}, {len(questions):,} scenes", seconds=ms / 1000, scenes_per_s=per_s)
    return per_s


def attentive(model: GPT) -> GPT:
    """An untrained model attends almost only to the last token, so mixed-up contexts would hardly show."""
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
