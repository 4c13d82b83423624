"""The lecture's rungs, then ours: GPT-2 (124M), B=16, T=1024, each in a process of its own (as `regpt2 ladder`)."""

from gpu_items import Check
from gpu_timing import figures_of, step_work, time_step
from regpt2.base.device import pick_device
from regpt2.speed.rungs import climb, default_rungs, find_rungs


def run(check: Check) -> None:
    names = ["fp32", "ours"] if check.smoke else default_rungs(pick_device(check.device))
    before = None
    work = step_work(check, micro_batch=16, warmup_steps=5, steps=20)
    for row in climb(work, find_rungs(names), time=lambda rung, work: time_step(check, work)):
        if row.times is None:  # fatal for none but the last, which is what training does
            check.keep(row.title, lecture_ms=row.lecture_ms, ok=row.rung != "ours", why=row.why_not)
            continue
        gain = before and before / row.times.median_s
        check.keep(
            row.title,
            lecture_ms=row.lecture_ms,
            gain=gain,
            **figures_of(check, row.work, row.times),
            ok=not row.why_not,
            why=row.why_not,
        )
        before = row.times.median_s
