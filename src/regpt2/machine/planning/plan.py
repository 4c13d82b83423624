"""The plan of a run. In: options; out: a `RunPlan` with all figures, also as JSON."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt2.base.errors import Problem, UsageError
from regpt2.config.passes import settle
from regpt2.config.run import RunConfig
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.machine.planning.disk import DataNeed, data_need, disk_lacks, most_checkpoints, run_bytes
from regpt2.machine.planning.micro_batch import Choice, best, choices
from regpt2.machine.planning.run_time import StepEstimate, formula_time, measured_time, run_seconds
from regpt2.machine.planning.scaling import LARGER, Scaling, Work, scaling_of
from regpt2.machine.planning.target import Target, find_target, setup_at
from regpt2.training.memory import AVERAGE, MARGIN, Setup, cannot_fit, step_memory, still_needed


@dataclass(frozen=True)
class PlanOptions:
    """Estimate hours, cost, memory and disk of a run before it starts, and choose the micro-batch."""

    machine: str = ""
    """A GPU by name: A100-40, A100-80, H100, H200, B200, 4090, 3090, L4, T4, V100-16, ...; default: this machine."""
    gpus: int = 1
    """Number of GPUs in total."""
    gpus_per_node: int = 8
    """GPUs in each node; a larger --gpus is spread over several nodes."""
    network_gbps: float | None = None
    """Gbit/s between nodes for each GPU; default: 400 (H100, H200, B200), 200 (A100), 12.5 (others)."""
    scaling: bool = False
    """Also estimate the same run on 1, 2, 4, ... 512 GPUs."""
    price: float | None = None
    """Price of one GPU-hour; on a CPU, of an hour of the machine."""
    measure: bool = False
    """Time real steps on this machine for about half a minute instead of using formulas."""
    json: Path | None = None
    """Also write the plan to this JSON file."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class RunPlan:
    recipe: str
    config: RunConfig
    target: Target
    setup: Setup
    memory: dict[str, int]
    step: StepEstimate | None
    seconds: dict[str, float]  # of the run by part; empty if no time is known
    data: DataNeed
    lacks: list[str]
    choices: list[Choice]
    price: float | None
    measured: dict[str, Any]  # peak memory of the measured step, and its prediction
    scaling: Scaling | None = None

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def other_micro_batch(self) -> bool:
        """True if the recipe's micro-batch does not divide an update over the ranks, so that another is planned."""
        return self.setup.micro_batch != self.config.batch.micro_batch

    @property
    def out_of_memory(self) -> bool:
        """The step cannot run, even if the prediction is too high by its margin."""
        return self.target.free_bytes is not None and cannot_fit(still_needed(self.setup), self.target.free_bytes)


def make_plan(recipe: str, options: PlanOptions) -> RunPlan:
    """Estimate, or measure, everything.

    Raises:
        Problem: an option out of range, an unknown machine, an update that does not divide, a step that does not run.
    """
    config = _settled(options.config)
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UsageError(f"--price {options.price} must be at least 0.")
    if options.scaling and options.measure:
        raise UsageError("--scaling uses formulas only; leave out --measure.")
    target = find_target(config, options.machine, options.gpus, options.gpus_per_node, options.network_gbps)
    setup, data = setup_at(config, target), data_need(config)
    step: StepEstimate | None
    measured: dict[str, Any] = {}
    scaling = _scaling(config, target, setup, data.shards_bytes) if options.scaling else None
    if options.measure:
        step, times, tried = measured_time(config, setup, target)
        held = step_memory(tried)
        tried_bytes = sum(held.values()) - held.get(AVERAGE, 0)  # measured are steps alone, which keep none
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
        lacks=disk_lacks(config, data, run_bytes(config, setup)) if target.here else [],
        choices=choices(config, setup, target, step),
        price=options.price,
        measured=measured,
        scaling=scaling,
    )


def _settled(config: RunConfig) -> RunConfig:
    """With the length that the data gives, if the data is prepared."""
    try:
        with open_mixture(read_shares(config.data, config.mix)) as data:
            return settle(config, data)
    except (Problem, OSError):
        return config


def _scaling(config: RunConfig, target: Target, setup: Setup, data_bytes: int) -> Scaling:
    """The same run on other numbers of GPUs, with the hours of each."""
    if target.place is None or target.free_bytes is None or setup.width_bytes != 2:
        raise UsageError("--scaling needs published 16-bit runs; name a GPU with --machine, and bf16 or fp16.")
    sequences = setup.ranks * setup.micro_batch * setup.grad_accum_steps
    one_gpu = replace(setup, micro_batch=1, grad_accum_steps=sequences, ranks=1)
    found = scaling_of(Work(one_gpu, config.batch.tokens_of(1), target.free_bytes), target.place)
    rows = []
    for row in found.rows:
        there, step = replace(target, place=row.place, ranks=row.place.gpus), StepEstimate(row.parts, 0.0, "")
        seconds = run_seconds(config, row.setup, there, step, data_bytes) if row.setup else {}
        rows.append(replace(row, hours=sum(seconds.values()) / 3600))
    return replace(found, rows=rows)


def for_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON values: seconds, bytes, and the source of each estimate."""
    taken = best(plan.choices, plan.setup)
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
            "checkpoints": most_checkpoints(plan.config),
            "checkpoints_bytes": run_bytes(plan.config, plan.setup),
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


def _scaling_json(plan: RunPlan, found: Scaling) -> dict[str, Any]:
    rows = [
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
            "hours": row.hours if row.setup else None,
            "money": row.hours * row.place.gpus * plan.price if row.setup and plan.price is not None else None,
        }
        for row in found.rows
    ]
    return {
        "rows": rows,
        "larger_batch_pays_at": found.low.place.gpus if found.low else None,
        "larger_batch_tokens": LARGER * plan.config.batch.batch_tokens,
        "larger_batch_efficiency": found.low_at_larger_batch if found.low else None,
        "fsdp_pays_at": found.fsdp.place.gpus if found.fsdp else None,
    }
