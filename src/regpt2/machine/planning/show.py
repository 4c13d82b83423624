"""A plan, and how it is shown. In: its figures; out: lines for a person, JSON for tools."""

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from regpt2.base.console import count, duration, say
from regpt2.config.run import RunConfig
from regpt2.machine.planning.run_time import (
    Choice,
    DataNeed,
    StepTime,
    Target,
    best,
    checkpoint_bytes,
    checkpoints_bytes,
    eval_tokens,
    n_evaluations,
)
from regpt2.machine.planning.scaling import LARGER, LOW_EFFICIENCY, Scaling
from regpt2.model.flops import flops_per_token
from regpt2.training.memory import MARGIN, Setup, cannot_fit, step_memory, still_needed

COLUMNS = 110
GB = 1e9
GAIN = 0.02  # of efficiency, that is worth a word


@dataclass(frozen=True)
class ScalingPlan:
    """The run on other numbers of GPUs, and its hours on each."""

    found: Scaling
    hours: list[float]


@dataclass(frozen=True)
class RunPlan:
    """What was found."""

    recipe: str
    config: RunConfig
    target: Target
    setup: Setup
    memory: dict[str, int]
    step: StepTime | None
    seconds: dict[str, float]
    """Of the run by part; empty where no time is known."""
    data: DataNeed
    lacks: list[str]
    choices: list[Choice]
    price: float | None
    measured: dict[str, Any]
    """Peak memory of the measured step, beside its prediction."""
    scaling: ScalingPlan | None = None

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(self.seconds.values()) / 3600

    @property
    def other_micro_batch(self) -> bool:
        """True if the recipe's micro-batch did not divide an update over the ranks, so another was taken."""
        return self.setup.micro_batch != self.config.batch.micro_batch

    @property
    def out_of_memory(self) -> bool:
        """It will not run: even if the prediction is too high by its margin."""
        return self.target.free_bytes is not None and cannot_fit(still_needed(self.setup), self.target.free_bytes)


def show(plan: RunPlan) -> None:
    """Print it."""
    config = plan.config
    tokens = config.batch.tokens_until(config.max_steps)
    say(
        f"{plan.recipe} on {plan.target.name}: {count(tokens)} tokens, {config.max_steps:,} updates of "
        f"{config.batch.batch_tokens:,}{config.batch.growth}"
    )
    _show_micro_batch(plan)
    _show_time(plan)
    _show_memory(plan)
    _show_disk(plan)
    _show_choices(plan)
    if plan.scaling is not None:
        _show_scaling(plan, plan.scaling)


def _row(name: str, value: str, how: str = "") -> None:
    """A name, its value, and how it is known, which goes on below itself if it is long."""
    head = f"  {name:<24} {value:>12}   "
    for line in wrap(how, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]:
        say(line)


def _show_micro_batch(plan: RunPlan) -> None:
    """Say which micro-batch replaces the recipe's, if that does not divide an update over the ranks."""
    batch = plan.config.batch
    if not plan.other_micro_batch:
        return
    tokens, ranks = batch.tokens_of(1), plan.target.ranks
    each = tokens // (batch.seq_len * ranks)
    say(
        f"  micro_batch {batch.micro_batch} -> {plan.setup.micro_batch}: {tokens:,} tokens over {ranks} "
        f"GPU{'s' * (ranks > 1)} are {each:,} sequence{'s' * (each > 1)} each"
    )


def _show_time(plan: RunPlan) -> None:
    step, config, setup = plan.step, plan.config, plan.setup
    say()
    if step is None:
        _row(
            "time", "unknown", f"nothing is published of {plan.target.name} in {plan.target.precision}; run this there"
        )
        _row("", "", "with --measure: half a minute of real steps tells")
        return
    spread = f"+-{step.spread:.0%}"
    _row("time", duration(3600 * plan.hours), spread)
    known = eval_tokens(config)
    left_out = [name for name in config.evals.names if name not in known]
    evaluated = f"{n_evaluations(config)} x {', '.join(f'{name} {count(n)} tokens' for name, n in known.items())}"
    hows = {
        "training": step.how,
        "evaluations": evaluated + (f"; not counted: {', '.join(left_out)}" if left_out else ""),
        "checkpoints": "copied to main memory; written to disk while training continues",
        "start": "imports, the check of the data" + (", the compiler" if plan.target.compiled else ""),
    }
    for name, seconds in plan.seconds.items():
        _row(f"  {name}", duration(seconds), hows[name])
    gpu_hours = plan.hours * plan.target.ranks
    unit = "GPU-hours" if setup.device == "cuda" else "hours"
    if plan.price is not None:
        _row("money", f"{gpu_hours * plan.price:,.2f}", f"{spread}: {gpu_hours:,.1f} {unit} at {plan.price:g}")
    else:
        _row(unit, f"{gpu_hours:,.1f}", "--price tells the money")
    parts = ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in step.parts.items() if seconds)
    _row("an update", f"{1e3 * step.seconds:,.0f} ms", parts)
    tokens_per_s = config.batch.batch_tokens / step.seconds
    flops = tokens_per_s * flops_per_token(setup.model, setup.seq_len) / plan.target.ranks
    place = plan.target.place
    used = (
        f", {flops / place.machine.peak:.0%} of the data sheet's {place.machine.peak / 1e12:,.0f} TFLOP/s"
        if place
        else ""
    )
    _row("tokens per second", count(tokens_per_s), f"{flops / 1e12:,.3g} TFLOP/s for each rank{used}")


def _show_memory(plan: RunPlan) -> None:
    free, total = plan.target.free_bytes, sum(plan.memory.values())
    place = (
        "of each GPU" if plan.target.ranks > 1 else "of the GPU" if plan.setup.device == "cuda" else "of this process"
    )
    if free is None:
        verdict = "how much is free is not known"
    elif plan.out_of_memory:
        verdict = f"DOES NOT FIT: {free / GB:.1f} GB are free"
    else:
        fitting = any(choice.fits and choice.setup == plan.setup for choice in plan.choices)
        verdict = f"fits into {free / GB:.1f} GB" if fitting else f"may just not fit into {free / GB:.1f} GB"
    say()
    _row(f"memory {place}", f"{total / GB:.2f} GB", f"+-{MARGIN:.0%} by formula; {verdict}")
    for name, n_bytes in plan.memory.items():
        _row(f"  {name}", f"{n_bytes / GB:.2f} GB")
    if plan.measured:
        peak, predicted = plan.measured["peak_bytes"], plan.measured["predicted_bytes"]
        off = f"predicted {predicted / GB:.2f} GB, {predicted / peak - 1:+.0%}" if peak else "not known here"
        _row("  measured here", f"{peak / GB:.2f} GB", f"with micro_batch {plan.measured['micro_batch']}: {off}")


def _show_disk(plan: RunPlan) -> None:
    most, n_bytes = checkpoints_bytes(plan.config, plan.setup)
    say()
    _row("disk for data", f"{plan.data.shards_bytes / GB:.2f} GB", f"2 bytes a token; {plan.data.said}")
    if plan.data.missing_bytes:
        _row("  while preparing", f"{plan.data.missing_bytes / GB:.2f} GB", "at most, as for FineWeb-Edu's files")
    one_bytes = checkpoint_bytes(plan.setup)
    each = f"at most {most} of {one_bytes / GB:.2f} GB: {one_bytes / plan.setup.n_params:.3g} bytes a parameter"
    _row("disk for checkpoints", f"{n_bytes / GB:.2f} GB", each)
    for lack in plan.lacks:
        _row("  TOO LITTLE", "", lack)


def _show_choices(plan: RunPlan) -> None:
    """The micro-batches around the edge of what fits."""
    taken = best(plan.choices, plan.setup)
    planned = "planned" if plan.other_micro_batch else "the recipe's"
    fitting = [choice for choice in plan.choices if choice.fits]
    wanted = next(choice for choice in plan.choices if choice.setup == plan.setup)
    near = [*fitting[-5:], *[choice for choice in plan.choices if not choice.fits][:1], wanted]
    shown = [choice for choice in plan.choices if choice in near or choice == taken]
    say()
    say(f"  {'micro_batch':>12} {'micro-steps':>12} {'memory':>10} {'update':>10}")
    for one in shown:
        marks = [planned] * (one == wanted) + ["best"] * (one == taken)
        marks += [] if one.fits else ["does not surely fit"]
        time = "" if one.step_s is None else f"{1e3 * one.step_s:,.0f} ms"
        memory = f"{sum(step_memory(one.setup).values()) / GB:.2f} GB"
        row = f"  {one.setup.micro_batch:>12} {one.setup.grad_accum_steps:>12} {memory:>10} {time:>10}"
        say(f"{row}   {', '.join(marks)}".rstrip())
    if taken is None:
        say("\n  no micro-batch fits: a smaller model, shorter sequences, or --parallel.strategy fsdp on more GPUs")
    elif taken != wanted or plan.other_micro_batch:
        say(f"\n  train it with --batch.micro-batch {taken.setup.micro_batch}; the update stays the same")


def _show_scaling(plan: RunPlan, scaling: ScalingPlan) -> None:
    """The table, and in words what follows from it."""
    batch = plan.config.batch
    say()
    money = f" {'money':>10}" if plan.price is not None else ""
    say(f"  {'GPUs':>5} {'nodes':>6} {'micro-batch':>14} {'update':>12} {'exposed':>10} {'waiting':>9} {'tokens/s':>9} "
        f"{'efficiency':>11} {'hours':>8}{money}")  # fmt: skip
    for row, hours in zip(scaling.found.rows, scaling.hours, strict=True):
        start = f"  {row.place.gpus:>5} {row.place.nodes:>6}"
        if row.setup is None:
            say(f"{start}   no micro-batch fits")
            continue
        passes = f"{row.setup.micro_batch} x {row.setup.grad_accum_steps}"
        times = [f"{1e3 * s:,.1f} ms" for s in (row.step_s, row.exposed_s, row.parts["slowest rank"])]
        cost = f" {hours * row.place.gpus * plan.price:>10,.2f}" if plan.price is not None else ""
        say(
            f"{start} {passes:>14} {times[0]:>12} {times[1]:>10} {times[2]:>9} {count(row.tokens_per_s):>9} "
            f"{row.efficiency:>11.0%} {hours:>8.2f}{cost}"
        )
    say()
    for line in _conclusions(scaling.found, batch.batch_tokens):
        for part in wrap(line, COLUMNS - 2):
            say(f"  {part}")


def _conclusions(found: Scaling, batch_tokens: int) -> list[str]:
    """From the table."""
    lines = []
    if found.base.setup:
        base = found.base.place.gpus
        each = "one GPU's" if base == 1 else f"those on {base} GPUs"
        lines.append(
            "The batch stays the same. micro-batch: sequences x micro-steps of each GPU. exposed: what of the exchange "
            "the backward pass does not hide. waiting: for the slowest GPU. efficiency: tokens/s of each GPU beside "
            f"{each}. hours: with evaluations, checkpoints and the start."
        )
    if found.low is not None:
        there = f"with updates of {LARGER * batch_tokens:,} tokens it would be {found.low_at_larger_batch:.0%}"
        pays = found.low_at_larger_batch > found.low.efficiency + GAIN
        end = "a larger batch begins to pay, if its updates teach as much" if pays else "a larger batch does not help"
        lines.append(
            f"Efficiency first falls below {LOW_EFFICIENCY:.0%} at {found.low.place.gpus} GPUs, to "
            f"{found.low.efficiency:.1%}; {there}: {end}."
        )
    elif found.base.setup:
        lines.append(f"Efficiency stays above {LOW_EFFICIENCY:.0%}: a larger batch is not needed.")
    if found.fsdp is None or found.ddp_there is None:
        lines.append("FSDP does not pay at any of these numbers: DDP fits and is about as fast, or neither fits.")
    elif found.ddp_there.setup is None:
        gpus = found.fsdp.place.gpus
        lines.append(f"FSDP begins to pay at {gpus} GPUs, where DDP does not fit: --parallel.strategy fsdp.")
    else:
        times = f"{1e3 * found.fsdp.step_s:,.1f} ms an update instead of DDP's {1e3 * found.ddp_there.step_s:,.1f} ms"
        lines.append(f"FSDP begins to pay at {found.fsdp.place.gpus} GPUs: {times}.")
    return lines


def _scaling_json(plan: RunPlan, scaling: ScalingPlan) -> dict[str, Any]:
    found = scaling.found
    return {
        "rows": [
            {
                "gpus": row.place.gpus,
                "nodes": row.place.nodes,
                "micro_batch": row.setup.micro_batch if row.setup else None,
                "grad_accum_steps": row.setup.grad_accum_steps if row.setup else None,
                "update_s": row.step_s if row.setup else None,
                "exposed_s": row.exposed_s if row.setup else None,
                "waiting_s": row.parts.get("slowest rank"),
                "tokens_per_s": row.tokens_per_s if row.setup else None,
                "efficiency": row.efficiency if row.setup else None,
                "hours": hours if row.setup else None,
                "money": hours * row.place.gpus * plan.price if row.setup and plan.price is not None else None,
            }
            for row, hours in zip(found.rows, scaling.hours, strict=True)
        ],
        "larger_batch_pays_at": found.low.place.gpus if found.low else None,
        "larger_batch_tokens": LARGER * plan.config.batch.batch_tokens,
        "larger_batch_efficiency": found.low_at_larger_batch if found.low else None,
        "fsdp_pays_at": found.fsdp.place.gpus if found.fsdp else None,
    }


def for_json(plan: RunPlan) -> dict[str, Any]:
    """The same for tools: seconds, bytes, and how each is known."""
    taken = best(plan.choices, plan.setup)
    most, checkpoints = checkpoints_bytes(plan.config, plan.setup)
    gpu_hours = plan.hours * plan.target.ranks if plan.step else None
    return {
        "recipe": plan.recipe,
        "machine": plan.target.name,
        "ranks": plan.target.ranks,
        "nodes": plan.target.place.nodes if plan.target.place else 1,
        "precision": plan.target.precision,
        "compiled": plan.target.compiled,
        "tokens": plan.config.batch.tokens_until(plan.config.max_steps),
        "step": None if plan.step is None else {**asdict(plan.step), "seconds": plan.step.seconds},
        "seconds": plan.seconds,
        "gpu_hours": gpu_hours,
        "money": None if plan.price is None or gpu_hours is None else gpu_hours * plan.price,
        "memory": {"parts": plan.memory, "bytes": sum(plan.memory.values()), "spread": MARGIN, "how": "formula"},
        "free_bytes": plan.target.free_bytes,
        "measured": plan.measured,
        "disk": {
            "data_bytes": plan.data.shards_bytes,
            "to_prepare_bytes": plan.data.missing_bytes,
            "checkpoints": most,
            "checkpoints_bytes": checkpoints,
            "lacks": plan.lacks,
        },
        "micro_batch": plan.setup.micro_batch,
        "best_micro_batch": None if taken is None else taken.setup.micro_batch,
        "micro_batches": [
            {
                "micro_batch": one.setup.micro_batch,
                "grad_accum_steps": one.setup.grad_accum_steps,
                "bytes": sum(step_memory(one.setup).values()),
                "step_s": one.step_s,
                "fits": one.fits,
            }
            for one in plan.choices
        ],
        "fits": not plan.out_of_memory and not plan.lacks,
        "scaling": None if plan.scaling is None else _scaling_json(plan, plan.scaling),
    }
