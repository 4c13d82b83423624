"""The rungs of the ladder. In: the work of a step; out: a `RungResult` for each rung, each with one change.

First the lecture's seven, in its order, then ours. The last is the step that `regpt2 train` makes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from regpt2.base.device import Precision, choose_compute, pick_device
from regpt2.base.errors import Problem, UsageError, did_you_mean
from regpt2.machine.speed.lecture_steps import LecturePart
from regpt2.machine.speed.steps import DoesNotFit, StepTimes, StepWork, measure
from regpt2.model.gpt import GPTConfig

Change = Callable[[StepWork], StepWork]


@dataclass(frozen=True)
class Rung:
    name: str  # on the command line
    title: str
    change: Change
    lecture_ms: float | None = None  # the lecture's step time after it: 124M, B=16, T=1024, on one A100 SXM 80 GB
    only_on: str = ""  # the type of device that it applies to; "" = all
    option: str = ""  # of `regpt2 train`, which sets it; "" = training always does it


@dataclass(frozen=True, kw_only=True)
class RungResult:
    rung: str
    title: str
    lecture_ms: float | None
    option: str = ""
    work: StepWork
    times: StepTimes | None = None
    why_not: str = ""  # why it does not count: it could not be measured, or its losses are wrong

    @property
    def is_wrong(self) -> bool:
        """It was measured, and does not count."""
        return self.times is not None and bool(self.why_not)

    @property
    def outcome(self) -> str:
        """Its speed, or why it has none, in words."""
        if self.times is None or self.is_wrong:
            return self.why_not
        return f"{1e3 * self.times.median_s:,.1f} ms/step, {self.times.tokens_per_s:,.0f} tokens/s"


def _without(part: LecturePart) -> Change:
    return lambda work: replace(work, as_lecture=tuple(one for one in work.as_lecture if one != part))


def _autocast(precision: Precision) -> Change:
    return lambda work: replace(work, precision=precision, as_lecture=(*work.as_lecture, "autocast"))


def _flash(work: StepWork) -> StepWork:
    """torch's kernel. On a GPU that is ours; on a CPU ours is another rung."""
    work = _without("plain_attention")(work)
    on_cpu = pick_device(work.device).type == "cpu"
    return replace(work, as_lecture=(*work.as_lecture, "torch_attention")) if on_cpu else work


def _padded(work: StepWork) -> StepWork:
    return replace(work, model=replace(work.model, vocab_multiple=PADDED))


PADDED = GPTConfig.vocab_multiple
RUNGS = (
    Rung("fp32", "fp32", lambda work: work, 1000, option="--precision fp32"),
    Rung("onednn", "fp32 through oneDNN", _without("default_matmul"), only_on="cpu"),
    Rung("tf32", "TF32", lambda work: replace(work, precision="tf32"), 333, option="--precision tf32"),
    Rung("bf16", "bf16 autocast", _autocast("bf16"), 300, option="--precision bf16"),
    Rung("fp16", "fp16 autocast", _autocast("fp16"), only_on="cuda", option="--precision fp16"),
    Rung("compile", "torch.compile", lambda work: replace(work, compile="on"), 130, option="--compile on"),
    Rung("flash", "flash attention", _flash, 96),
    Rung("vocab_multiple", "padded vocabulary", _padded, 93, option=f"--model.vocab-multiple {PADDED}"),
    Rung("adamw", "fused AdamW", _without("unfused_adamw"), 90, option="--optim.name adamw"),
    Rung("malloc", "freed memory kept", _without("default_malloc"), only_on="cpu"),
    Rung("blocks", "attention in blocks", _without("torch_attention"), only_on="cpu"),
    Rung("stream", "16-bit residual stream", _without("autocast")),
    Rung("gelu", "GELU computed again", _without("kept_gelu"), only_on="cpu"),
    Rung("train", "loss in chunks", lambda work: replace(_padded(work), precision="auto", as_lecture=())),
)

COMPARED = 3
"""Steps whose losses are compared: rounding grows with each step until it hides errors."""


# How far a precision may be from fp32: the loss at step 1, on equal weights; the losses after updates; the norm of the
# gradient at step 1, relative. A few times what 124M showed on a CPU. A planted bug, attention without its mask, moved
# the norm of the gradient by 4 % and the loss at step 2 by 0.06.
TOLERANCES = {
    "fp32": (2e-5, 1e-3, 1e-4),
    "tf32": (5e-4, 2e-2, 3e-3),
    "bf16": (2e-3, 2e-2, 1e-2),
    "fp16": (5e-4, 2e-2, 3e-3),
}


def default_rungs(device: torch.device) -> list[str]:
    """The names of the rungs that apply to this device."""
    names = [rung.name for rung in RUNGS if rung.only_on in ("", device.type)]
    if device.type == "cpu":
        names.remove("compile")  # training does not compile there: it takes minutes
    elif "fp16" in names and choose_compute("auto", device).precision != "fp16":
        names.remove("fp16")  # only for GPUs without bf16
    return names


def find_rungs(names: Sequence[str]) -> list[Rung]:
    """The rungs of these names, in the ladder's order.

    Raises:
        UsageError: an unknown name.
    """
    known = [rung.name for rung in RUNGS]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no rung {name!r}{did_you_mean(name, known)} Available: {', '.join(known)}.")
    return [rung for rung in RUNGS if rung.name in names]


def lowest(work: StepWork) -> StepWork:
    """The same step with everything as at the lecture's start: below the first rung."""
    parts: tuple[LecturePart, ...] = ("plain_attention", "whole_logits", "unfused_adamw")
    if pick_device(work.device).type == "cpu":
        parts += ("kept_gelu", "default_matmul", "default_malloc")
    model = replace(work.model, vocab_multiple=1)
    return replace(work, model=model, precision="fp32", compile="off", as_lecture=parts)


def key_of(work: Mapping[str, object]) -> str:
    """Equal for equal works, from `dataclasses.asdict` or from JSON."""
    return json.dumps(work, sort_keys=True)


def climb(
    work: StepWork,
    rungs: Sequence[Rung],
    *,
    known: Mapping[str, StepTimes] | None = None,
    time: Callable[[Rung, StepWork], StepTimes] = lambda _, work: measure(work),
) -> Iterator[RungResult]:
    """Measure each rung, on top of those before it that were correct.

    Args:
        work: the sizes of the step; the rungs set how it is computed.
        known: earlier measurements, by `key_of` their work.
        time: measures a rung.
    """
    known = known or {}
    work, first = lowest(work), True
    right: StepTimes | None = None
    for rung in rungs:
        tried = rung.change(work)
        row = RungResult(rung=rung.name, title=rung.title, lecture_ms=rung.lecture_ms, option=rung.option, work=tried)
        if tried == work and not first:
            yield replace(row, why_not="the rungs before it already include it.")
            continue
        first = False
        try:
            times = known.get(key_of(asdict(tried))) or time(rung, tried)
        except DoesNotFit as problem:
            yield replace(row, why_not=f"out of memory: {problem}")
            work = tried  # the next rung may need less
            continue
        except Problem as problem:
            yield replace(row, why_not=str(problem))
            continue
        right = right or times
        why_not = _where_wrong(times, right)
        yield replace(row, times=times, why_not=why_not)
        if not why_not:
            work = tried


def _where_wrong(times: StepTimes, right: StepTimes) -> str:
    """Where losses or gradient differ from the first rung's by more than rounding explains; "" if nowhere."""
    (at_once, later, of_norm), norm = TOLERANCES[times.precision], right.grad_norms[0]
    checks = [("the norm of the gradient at step 1", times.grad_norms[0], norm, of_norm * norm)]
    n_compared = COMPARED
    if times.precision == "fp16" and not math.isfinite(times.grad_norms[0]):
        checks, n_compared = [], 1  # an overflow: the update is skipped and the scale halved, as intended
    for step, (loss, expected) in enumerate(zip(times.losses[:n_compared], right.losses, strict=False), start=1):
        checks.append((f"the loss at step {step}", loss, expected, at_once if step == 1 else later))
    for what, got, expected, bound in checks:
        if not abs(got - expected) <= bound:  # NaN is wrong too
            return f"WRONG: {what} is {got:.5f}, expected {expected:.5f} within {bound:.1g}."
    return ""
