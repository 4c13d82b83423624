"""Which micro-batch to use. In: how each rank trains, and where; out: every choice with its memory and step time."""

from dataclasses import dataclass

from regpt2.config.run import RunConfig
from regpt2.machine.planning.formulas import step_seconds
from regpt2.machine.planning.run_time import FULL_PASS, StepEstimate
from regpt2.machine.planning.target import Target
from regpt2.training.memory import Setup, fits, micro_batches, still_needed


@dataclass(frozen=True)
class Choice:
    """A micro-batch that divides the update."""

    setup: Setup
    step_s: float | None  # None: no formula for this machine
    fits: bool


def choices(config: RunConfig, setup: Setup, target: Target, step: StepEstimate | None) -> list[Choice]:
    """Every micro-batch that divides the update, the smallest first."""
    found = []
    for one in micro_batches(setup, config.batch.tokens_of(1)):
        step_s = None
        if step is not None and target.place is not None and setup.width_bytes == 2:
            scale = step.seconds / sum(step_seconds(setup, target.place).values())  # 1, unless the step was measured
            step_s = scale * sum(step_seconds(one, target.place).values())
        room = target.free_bytes is None or fits(still_needed(one), target.free_bytes, setup.device)
        found.append(Choice(one, step_s, room))
    return found


def best(found: list[Choice], wanted: Setup) -> Choice | None:
    """`wanted` if it fits and is within 1 % of the fastest; else the smallest that is; None: nothing fits."""
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        return None
    times = [choice.step_s for choice in fitting if choice.step_s is not None]
    if times:
        as_fast = [choice for choice in fitting if choice.step_s is not None and choice.step_s <= 1.01 * min(times)]
    else:
        as_fast = [choice for choice in fitting if choice.setup.n_tokens >= FULL_PASS] or fitting[-1:]
    return next((choice for choice in as_fast if choice.setup == wanted), as_fast[0])
