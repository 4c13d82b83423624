"""Four rungs of the lecture's ladder, each in a fresh process: GPT-2 (124M), B=16, T=1024.

The upper rung of two includes the lecture's changes between them. `regpt2 ladder` runs all rungs one by one.
"""

import dataclasses

from gpu_items import Check
from gpu_timing import figures_of, step_work, time_step
from regpt2.machine.speed.rungs import RUNGS, Change, Rung, climb, find_rungs
from regpt2.machine.speed.steps import StepWork

MEASURED = ["bf16", "compile", "stream", "train"]


def run(check: Check) -> None:
    before = None
    work = step_work(check, micro_batch=16, warmup_steps=5, steps=20)
    rungs = find_rungs(["fp32", "train"]) if check.smoke else merged(MEASURED)
    for row in climb(work, rungs, time=lambda rung, work: time_step(check, work)):
        if row.times is None:  # only fatal for the last, which is training's own step
            check.keep(row.title, lecture_ms=row.lecture_ms, ok=row.rung != "train", why=row.why_not)
            continue
        check.judge(
            row.title,
            lecture_ms=row.lecture_ms,
            gain=before and before / row.times.median_s,
            **figures_of(check, row.work, row.times),
            ok=not row.why_not,
            why=row.why_not,
        )
        before = row.times.median_s


def merged(names: list[str]) -> list[Rung]:
    """The rungs of these names, each with the changes of the unmeasured ones below it."""
    found, waiting = [], list[Rung]()
    for rung in RUNGS:
        if rung.only_on not in ("", "cuda") or rung.name == "fp16":
            continue
        waiting.append(rung)
        if rung.name in names:
            title = ", ".join(each.title for each in waiting if each.name != "fp32")
            found.append(dataclasses.replace(rung, title=title, change=one_after_another(waiting)))
            waiting = []
    return found


def one_after_another(rungs: list[Rung]) -> Change:
    def change(work: StepWork) -> StepWork:
        for rung in rungs:
            work = rung.change(work)
        return work

    return change
