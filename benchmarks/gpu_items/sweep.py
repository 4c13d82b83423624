"""Micro-batches of GPT-2 (124M), 65,536 tokens an update where they fit: which size fills the card?"""

from gpu_items import Check
from gpu_timing import keep_step, step_work


def run(check: Check) -> None:
    for micro_batch in (4,) if check.smoke else (16, 256, 4, 128, 32, 8, 64):  # the most informative first
        accumulate = max(1, 64 // micro_batch)
        work = step_work(
            check, micro_batch=micro_batch, grad_accum_steps=accumulate, compile="on", warmup_steps=5, steps=20
        )
        keep_step(check, f"B={micro_batch} x {accumulate}", work)
