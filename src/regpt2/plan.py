"""What a run will take, before it starts. In: a recipe and a machine; out: hours, money, memory, disk, micro-batch.

regpt2 plan gpt2_124m --machine H100 --gpus 8 --price 2.5
regpt2 plan gpt2_124m --measure
regpt2 plan demo

Exit code 1: it does not fit into the memory or on the disk.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import tyro

from regpt2.base.console import count, duration, say
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.config import RunConfig, defaults_for, recipe_rows
from regpt2.estimate import (
    Choice,
    DataNeed,
    StepTime,
    Target,
    best,
    checkpoint_bytes,
    checkpoints_bytes,
    choices,
    data_need,
    disk_lacks,
    eval_tokens,
    find_target,
    formula_time,
    measured_time,
    n_evaluations,
    run_seconds,
    setup_at,
)
from regpt2.model.flops import flops_per_token
from regpt2.speed.memory import MARGIN, Setup, cannot_fit, step_memory, still_needed

COLUMNS = 110
GB = 1e9


@dataclass(frozen=True)
class PlanOptions:
    """Hours, money, memory and disk of a run before it starts, and the micro-batch to take."""

    machine: str = ""
    """A GPU by name: A100-40, A100-80, H100, H200, B200, 4090, 3090, L4, T4, V100-16, ...; by default this machine."""
    gpus: int = 1
    """So many in each node."""
    nodes: int = 1
    """So many nodes."""
    price: float | None = None
    """Of one GPU for an hour; on a CPU, of the machine."""
    measure: bool = False
    """Time real steps on this machine for about half a minute, instead of formulas."""
    json: Path | None = None
    """Also write the plan to this JSON file."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


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

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(self.seconds.values()) / 3600

    @property
    def out_of_memory(self) -> bool:
        """It will not run: even if the prediction is too high by its margin."""
        return self.target.free_bytes is not None and cannot_fit(still_needed(self.setup), self.target.free_bytes)


def main(arguments: list[str]) -> int:
    """`regpt2 plan RECIPE [options]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else UsageError.exit_code
    spec = arguments[0]
    if spec.startswith("-"):
        raise UsageError(f"the recipe comes first: regpt2 plan RECIPE {' '.join(arguments)}. {usage()}")
    options = tyro.cli(
        PlanOptions,
        prog=f"regpt2 plan {spec}",
        default=PlanOptions(config=defaults_for(spec, arguments[1:])),
        args=arguments[1:],
    )
    _check(options)
    plan = make_plan(spec, options)
    show(plan)
    if options.json is not None:
        write_atomic(options.json, json.dumps(for_json(plan), indent=1) + "\n")
    return 1 if plan.out_of_memory or plan.lacks else 0


def usage() -> str:
    """What `regpt2 plan --help` prints: the recipes."""
    return "\n".join(
        [
            "usage: regpt2 plan RECIPE [--machine NAME] [--gpus N] [--nodes N] [--price P] [--measure] [--json FILE]",
            "                          [--data DIR | --mix DIR=WEIGHT ...] [--section.key VALUE ...]",
            "       regpt2 plan RECIPE --help    every option, with the recipe's values",
            "",
            "RECIPE is a TOML file of your own, or one of:",
            *recipe_rows(),
        ]
    )


def _check(options: PlanOptions) -> None:
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UsageError(f"--price {options.price} must be at least 0.")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")


def make_plan(recipe: str, options: PlanOptions) -> RunPlan:
    """All figures.

    Raises:
        Problem: an unknown machine, an update that does not divide, a step that cannot be measured.
    """
    config = options.config
    target = find_target(config, options.machine, options.gpus, options.nodes)
    setup, data = setup_at(config, target), data_need(config)
    step: StepTime | None
    measured: dict[str, Any] = {}
    if options.measure:
        step, times, tried = measured_time(config, setup, target)
        tried_bytes = sum(step_memory(tried).values())
        measured = {"peak_bytes": times.peak_bytes, "predicted_bytes": tried_bytes, "micro_batch": tried.micro_batch}
    else:
        step = formula_time(setup, target)
    return RunPlan(
        recipe=recipe,
        config=config,
        target=target,
        setup=setup,
        memory=step_memory(setup),
        step=step,
        seconds=run_seconds(config, setup, target, step, data.shards_bytes) if step else {},
        data=data,
        lacks=disk_lacks(config, data, checkpoints_bytes(config, setup)[1]) if target.here else [],
        choices=choices(config, setup, target, step),
        price=options.price,
        measured=measured,
    )


def show(plan: RunPlan) -> None:
    """Print it."""
    config = plan.config
    tokens = config.batch.tokens_until(config.max_steps)
    say(
        f"{plan.recipe} on {plan.target.name}: {count(tokens)} tokens, {config.max_steps:,} updates of "
        f"{config.batch.batch_tokens:,}{config.batch.growth}"
    )
    _show_time(plan)
    _show_memory(plan)
    _show_disk(plan)
    _show_choices(plan)


def _row(name: str, value: str, how: str = "") -> None:
    """A name, its value, and how it is known, which goes on below itself if it is long."""
    head = f"  {name:<24} {value:>12}   "
    for line in wrap(how, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]:
        say(line)


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
        "checkpoints": "copied to main memory; the disk is written while training goes on",
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
    fitting = [choice for choice in plan.choices if choice.fits]
    wanted = next(choice for choice in plan.choices if choice.setup == plan.setup)
    near = [*fitting[-5:], *[choice for choice in plan.choices if not choice.fits][:1], wanted]
    shown = [choice for choice in plan.choices if choice in near or choice == taken]
    say()
    say(f"  {'micro_batch':>12} {'micro-steps':>12} {'memory':>10} {'update':>10}")
    for one in shown:
        marks = ["the recipe's"] * (one == wanted) + ["best"] * (one == taken)
        marks += [] if one.fits else ["does not surely fit"]
        time = "" if one.step_s is None else f"{1e3 * one.step_s:,.0f} ms"
        memory = f"{sum(step_memory(one.setup).values()) / GB:.2f} GB"
        row = f"  {one.setup.micro_batch:>12} {one.setup.grad_accum_steps:>12} {memory:>10} {time:>10}"
        say(f"{row}   {', '.join(marks)}".rstrip())
    if taken is None:
        say("\n  no micro-batch fits: a smaller model, shorter sequences, or --parallel.strategy fsdp on more GPUs")
    elif taken != wanted:
        say(f"\n  train it with --batch.micro-batch {taken.setup.micro_batch}; the update stays the same")


def for_json(plan: RunPlan) -> dict[str, Any]:
    """The same for tools: seconds, bytes, and how each is known."""
    taken = best(plan.choices, plan.setup)
    most, checkpoints = checkpoints_bytes(plan.config, plan.setup)
    gpu_hours = plan.hours * plan.target.ranks if plan.step else None
    return {
        "recipe": plan.recipe,
        "machine": plan.target.name,
        "ranks": plan.target.ranks,
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
    }
