"""Time of a run. In: how each rank trains, and where; out: seconds of an update, by formula or measured; of the run.

Every figure comes with its spread: how far off it may be, as a share of it.
"""

import math
from dataclasses import dataclass, replace

import torch

from regpt2.base.console import ProgressLine
from regpt2.base.errors import UsageError
from regpt2.config.run import RunConfig
from regpt2.machine.planning.disk import best_bytes, checkpoint_bytes, n_saves
from regpt2.machine.planning.formulas import (
    EVAL_TOKENS,
    FORWARD,
    sharing_seconds,
    step_seconds,
    update_flops,
    update_rates,
    update_seconds,
)
from regpt2.machine.planning.target import Target
from regpt2.machine.speed.rates import copy_rate
from regpt2.machine.speed.steps import StepTimes, StepWork, measure
from regpt2.model.flops import flops_per_token
from regpt2.model.language_model import GPT2_CONTEXT
from regpt2.model.matmul_rate import matmul_rate, model_shapes
from regpt2.training.memory import Setup

COMPILE_S = 90.0  # one to two minutes on the GPUs seen so far
START_S = 15.0  # imports, weights, opening the data
HASH_RATE = 1e9  # bytes/s of SHA-256 on a core
HOST_COPY_RATE = 3e9  # bytes/s into fresh main memory, for a checkpoint
FULL_PASS = 4096  # tokens: above this a CPU gets no faster per token
NODES_SPREAD = 0.25  # over several nodes, where latencies are assumed and waiting is taken from others' runs
MEASURE_S = 15.0  # of timed steps, after the warm-up
OF_MATMULS = 0.6  # of a CPU's matmul rate, what a whole step reaches here; on other CPUs from half to nearly all


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of an update by part, their spread, and their source."""

    parts: dict[str, float]
    spread: float
    how: str

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def formula_time(setup: Setup, target: Target) -> StepEstimate | None:
    """From published runs and the data sheet, or roughly from this CPU's matmul rate; None: neither applies."""
    if target.place is not None and setup.width_bytes == 2:
        reached, many = target.place.machine.reached, target.place.nodes > 1
        spread = max(reached.spread, NODES_SPREAD) if many else reached.spread
        how = reached.source + "; the cost of several nodes by formula" * many
        return StepEstimate(step_seconds(setup, target.place), spread, how)
    if target.device.type != "cpu" or target.ranks > 1:
        return None
    dtype = torch.bfloat16 if setup.width_bytes == 2 else torch.float32
    rows = min(setup.n_tokens, 1024)
    rate = OF_MATMULS * matmul_rate(model_shapes(setup.model, rows), dtype, target.device, at_least_s=1.0)
    busy_s = setup.grad_accum_steps * setup.n_tokens * setup.flops_per_token / rate
    how = f"rough: a step at {OF_MATMULS:.0%} of the matmul rate timed here for a second; --measure times real steps"
    return StepEstimate(
        {"forward and backward": busy_s, **update_seconds(setup, *_update_rates(setup, target))}, 0.5, how
    )


def measured_time(config: RunConfig, setup: Setup, target: Target) -> tuple[StepEstimate, StepTimes, Setup]:
    """From about half a minute of real steps on this machine; also the raw times, and the setup that was timed.

    A few micro-steps are timed; an update is extrapolated from them.

    Raises:
        UsageError: the plan is for another machine.
        Problem: the step does not run.
    """
    if not target.here:
        raise UsageError("--measure times steps on this machine: run it on the target machine, without --machine.")
    on_cpu = target.device.type == "cpu"
    full = max(1, FULL_PASS // setup.seq_len) if on_cpu else setup.micro_batch
    micro_batch = min(setup.micro_batch, full)
    enough = max(1, FULL_PASS // (micro_batch * setup.seq_len)) if on_cpu else 4
    tried = replace(setup, micro_batch=micro_batch, grad_accum_steps=min(setup.grad_accum_steps, enough))
    work = StepWork(
        model=setup.model,
        micro_batch=micro_batch,
        seq_len=setup.seq_len,
        grad_accum_steps=tried.grad_accum_steps,
        device=str(target.device),
        precision=config.precision,
        compile=config.compile,
        optim=config.optim,
        lora=config.lora,
        warmup_steps=1 if on_cpu else 3,
        steps=3,
        seconds=MEASURE_S,
    )
    least = work.warmup_steps + work.steps  # short steps repeat until MEASURE_S is over
    with ProgressLine("measuring", least, "steps") as line:
        times = measure(work, on_step=lambda done: line.advance(min(done, least) - line.done))
    rates = _update_rates(setup, target)
    timed_s = sum(update_seconds(replace(setup, ranks=1), *rates).values())
    # The update's formula may exceed what was measured; at most half of a measured step is taken for the update.
    share = min(1.0, times.median_s / 2 / timed_s)
    micro_s = (times.median_s - share * timed_s) / times.tokens * setup.n_tokens
    parts = {"forward and backward": setup.grad_accum_steps * micro_s}
    parts |= {name: share * seconds for name, seconds in update_seconds(setup, *rates).items()}
    how = f"measured here: {len(times.step_s)} steps of {tried.grad_accum_steps} x {micro_batch} x {setup.seq_len}"
    if target.place is not None and target.ranks > 1:
        parts |= sharing_seconds(setup, target.place, micro_s)
        how += "; the exchange between ranks by formula"
    return StepEstimate(parts, 0.10, how), times, tried


def _update_rates(setup: Setup, target: Target) -> tuple[float, float]:
    """Bytes/s and FLOP/s for `update_seconds`: from the data sheet, or timed here."""
    if target.place is not None:
        return update_rates(setup, target.place.machine)
    bandwidth, C = copy_rate(target.device, 1 << 26, at_least_s=0.1), setup.model.n_embd
    if not update_flops(setup):
        return bandwidth, math.inf
    dtype = torch.bfloat16 if target.device.type == "cuda" else torch.float32  # as in training/optim/muon.py
    return bandwidth, matmul_rate([(C, C, C, 1)], dtype, target.device, at_least_s=0.2)


def run_seconds(
    config: RunConfig, setup: Setup, target: Target, step: StepEstimate, data_bytes: int
) -> dict[str, float]:
    """Of the whole run, by part."""
    tokens = n_evaluations(config) * sum(eval_tokens(config).values())
    pass_s = step.parts["forward and backward"] / (setup.grad_accum_steps * setup.n_tokens)  # per token of one rank
    forward = FORWARD * flops_per_token(setup.model, setup.seq_len) / setup.flops_per_token
    whole_updates = config.batch.tokens_until(config.max_steps) / config.batch.batch_tokens  # fewer with a batch ramp
    by_tokens = ("forward and backward", "gathering", "slowest rank")  # the others: once per update of any size
    return {
        "training": sum(
            seconds * (whole_updates if part in by_tokens else config.max_steps) for part, seconds in step.parts.items()
        ),
        "evaluations": tokens * forward * pass_s / target.ranks,
        "checkpoints": (
            n_saves(config) * checkpoint_bytes(setup) + n_evaluations(config) * best_bytes(config, setup) / 2
        )  # at most: as if each validation were the best so far
        / HOST_COPY_RATE,
        "start": START_S + COMPILE_S * target.compiled + config.verify_data * data_bytes / HASH_RATE / target.ranks,
    }


def n_evaluations(config: RunConfig) -> int:
    """Of one run: before the first update, every `eval_every` updates, and after the last."""
    return 1 + -(-config.max_steps // config.eval_every) if config.eval_every else 0


def eval_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens of each evaluation whose size is known."""
    twice = (
        getattr(config.model, "window", 0) and config.batch.seq_len > GPT2_CONTEXT
    )  # in windows of 1,024 tokens as well
    known = {**EVAL_TOKENS, "val_loss": config.evals.val_tokens * (2 if twice else 1)}
    return {name: known[name] for name in config.evals.names if name in known}
