"""What a run will take, before it starts. In: a recipe and a machine; out: hours, money, memory, disk, micro-batch.

regpt2 plan gpt2_124m --machine H100 --gpus 8 --price 2.5
regpt2 plan gpt2_1558m --machine H100 --gpus 64 --scaling
regpt2 plan gpt2_124m --measure
regpt2 plan demo

Exit code 1: it does not fit into the memory or on the disk.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt2.base.console import say, wrapped
from regpt2.base.errors import UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.config.run import RunConfig, defaults_for, recipe_rows
from regpt2.machine.planning.run_time import (
    StepTime,
    Target,
    checkpoints_bytes,
    choices,
    data_need,
    disk_lacks,
    find_target,
    formula_time,
    measured_time,
    run_seconds,
    setup_at,
)
from regpt2.machine.planning.scaling import Work, scaling_of
from regpt2.machine.planning.show import RunPlan, ScalingPlan, for_json, show
from regpt2.training.memory import Setup, step_memory


@dataclass(frozen=True)
class PlanOptions:
    """Hours, money, memory and disk of a run before it starts, and the micro-batch to take."""

    machine: str = ""
    """A GPU by name: A100-40, A100-80, H100, H200, B200, 4090, 3090, L4, T4, V100-16, ...; by default this machine."""
    gpus: int = 1
    """How many GPUs in all."""
    gpus_per_node: int = 8
    """GPUs in each node; more than these are spread over several nodes."""
    network_gbps: float | None = None
    """Gbit/s of the network between nodes for each GPU; by default 400 (H100, H200, B200), 200 (A100), else 12.5."""
    scaling: bool = False
    """Also print the same run on 1, 2, 4, ... 512 GPUs."""
    price: float | None = None
    """Price of one GPU for an hour; on a CPU, of the machine."""
    measure: bool = False
    """Time real steps on this machine for about half a minute, instead of formulas."""
    json: Path | None = None
    """Also write the plan to this JSON file."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


def main(arguments: list[str]) -> int:
    """`regpt2 plan RECIPE [options]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else UsageError.exit_code
    spec = arguments[0]
    if spec.startswith("-"):
        raise UsageError(f"the recipe comes first: regpt2 plan RECIPE {' '.join(arguments)}. {usage()}")
    options = parse(
        PlanOptions,
        arguments[1:],
        f"regpt2 plan {spec}",
        default=PlanOptions(config=defaults_for(spec, arguments[1:])),
    )
    _check(options)
    plan = make_plan(spec, options)
    show(plan)
    if options.json is not None:
        write_atomic(options.json, json.dumps(for_json(plan), indent=1) + "\n")
    return 1 if plan.out_of_memory or plan.lacks else 0


def usage() -> str:
    """What `regpt2 plan --help` prints: the recipes."""
    return wrapped(
        [
            "usage: regpt2 plan RECIPE [--machine NAME] [--gpus N] [--gpus-per-node N] [--network-gbps G] [--scaling] "
            "[--price P] [--measure] [--json FILE] [--data DIR | --mix DIR=WEIGHT ...] [--section.key VALUE ...]",
            "       regpt2 plan RECIPE --help  (every option, with the recipe's values)",
            "",
            "RECIPE is a TOML file of your own, or one of:",
            *recipe_rows(),
        ]
    )


def _check(options: PlanOptions) -> None:
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UsageError(f"--price {options.price} must be at least 0.")
    if options.scaling and options.measure:
        raise UsageError("--scaling goes by formulas alone; leave out --measure.")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")


def make_plan(recipe: str, options: PlanOptions) -> RunPlan:
    """All figures.

    Raises:
        Problem: an unknown machine, an update that does not divide, a step that cannot be measured.
    """
    config = options.config
    target = find_target(config, options.machine, options.gpus, options.gpus_per_node, options.network_gbps)
    setup, data = setup_at(config, target), data_need(config)
    if options.scaling and (target.place is None or target.free_bytes is None or setup.width_bytes != 2):
        raise UsageError("--scaling goes by published runs of GPUs in 16 bits; name a GPU with --machine.")
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
        scaling=_scaling(config, target, setup, data.shards_bytes) if options.scaling else None,
    )


def _scaling(config: RunConfig, target: Target, setup: Setup, data_bytes: int) -> ScalingPlan:
    """The same run on other numbers of GPUs."""
    assert target.place is not None and target.free_bytes is not None, "refused before"
    sequences = setup.ranks * setup.micro_batch * setup.grad_accum_steps
    one_gpu = replace(setup, micro_batch=1, grad_accum_steps=sequences, ranks=1)
    found = scaling_of(Work(one_gpu, config.batch.tokens_of(1), target.free_bytes), target.place)
    hours = []
    for row in found.rows:
        there, step = replace(target, place=row.place, ranks=row.place.gpus), StepTime(row.parts, 0.0, "")
        seconds = run_seconds(config, row.setup, there, step, data_bytes) if row.setup else {}
        hours.append(sum(seconds.values()) / 3600)
    return ScalingPlan(found, hours)
