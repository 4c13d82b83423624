"""The headline: GPT-2 (124M), T=1024, 524,288 tokens per update in micro-batches of 64: compiled, then eager."""

from gpu_items import Check
from gpu_timing import keep_step, step_work


def run(check: Check) -> None:
    works = {
        "compiled": step_work(check, micro_batch=64, grad_accum_steps=8, compile="on", warmup_steps=5, steps=20),
        "eager": step_work(check, micro_batch=64, grad_accum_steps=8, compile="off", warmup_steps=2, steps=10),
    }
    if check.smoke:
        del works["compiled"]
    found = {name: keep_step(check, f"ours, {name}", work) for name, work in works.items()}
    compiled, eager = found.get("compiled"), found.get("eager")
    if compiled and eager:  # the same weights and tokens: what differs is rounding
        apart = max(abs(a - b) for a, b in zip(compiled.losses, eager.losses, strict=False))
        check.keep("compiled against eager", faster_by=eager.median_s / compiled.median_s, losses_apart=apart)
