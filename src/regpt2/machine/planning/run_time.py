"""The figures of a plan. In: a configuration, a machine; out: time of a step and of the run, disk, micro-batches."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regpt2.base.console import ProgressLine
from regpt2.base.device import choose_compute, compiles, device_name, pick_device
from regpt2.base.errors import ConfigError, Problem, UsageError
from regpt2.base.files import free_bytes as free_disk_bytes
from regpt2.base.free_memory import free_bytes
from regpt2.config.run import RunConfig, setup_of
from regpt2.data.mixture import open_mixture, read_shares
from regpt2.data.preparing.disk_budget import Space
from regpt2.data.sources.plan import InputFile, Part, Plan, Slice
from regpt2.data.tokens.manifest import TOKEN_BYTES
from regpt2.machine.machines import find_machine, recognize
from regpt2.machine.planning.formulas import (
    EVAL_TOKENS,
    FORWARD,
    Place,
    sharing_seconds,
    step_seconds,
    update_flops,
    update_rates,
    update_seconds,
)
from regpt2.machine.speed.rates import copy_rate, matmul_rate, model_shapes
from regpt2.machine.speed.steps import StepTimes, StepWork, measure
from regpt2.model.flops import flops_per_token
from regpt2.training.memory import FP32, Setup, fits, micro_batches, still_needed

COMPILE_S = 90.0  # one to two minutes on the GPUs seen so far
START_S = 15.0  # imports, weights, the data's first look
HASH_RATE = 1e9  # bytes/s of SHA-256 on a core
HOST_COPY_RATE = 3e9  # bytes/s into fresh memory of the machine, for a checkpoint
FULL_PASS = 4096  # tokens: with more, a CPU is no faster per token
NODES_SPREAD = 0.25  # over several nodes, whose latencies are assumed and whose waiting is that of others' runs
MEASURE_S = 15.0  # of timed steps, after those that warm up
OF_MATMULS = (
    0.6  # of a CPU's rate at the model's matmuls, what a whole step reaches here; others from half to nearly all
)


@dataclass(frozen=True)
class Target:
    """Where the run shall take place."""

    name: str
    device: torch.device
    """Of type cuda also where there is none here: then the machine is a named one."""
    here: bool
    place: Place | None
    """None: a device of which nothing is published."""
    precision: str
    compiled: bool
    free_bytes: int | None
    """For one rank; None: not known."""
    ranks: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of an update, how far off they may be, and how they are known."""

    parts: dict[str, float]
    spread: float
    how: str

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Choice:
    """A micro-batch that divides the update."""

    setup: Setup
    need_bytes: int
    step_s: float | None
    fits: bool


def find_target(
    config: RunConfig, machine: str, gpus: int, gpus_per_node: int = 8, network_gbps: float | None = None
) -> Target:
    """The named machine, or this one, with `gpus` GPUs in total and `gpus_per_node` in each node.

    Raises:
        UsageError: an unknown machine, or a number that makes no sense.
    """
    for name, value in (("gpus", gpus), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise UsageError(f"--{name} {value} must be at least 1.")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        below = gpus // gpus_per_node * gpus_per_node
        raise UsageError(
            f"--gpus {gpus} must be a multiple of --gpus-per-node {gpus_per_node}, so that all nodes are alike; the "
            f"nearest are {below} and {below + gpus_per_node}."
        )
    if network_gbps is not None and not 0 < network_gbps < math.inf:
        raise UsageError(f"--network-gbps {network_gbps:g} must be above 0 and finite: Gbit/s for each GPU, as in 400.")
    gradient_bytes = 2 if config.parallel.reduce_dtype == "bf16" else FP32
    if machine and machine.lower() != "cpu":
        known = find_machine(machine)
        precision = known.precision if config.precision == "auto" else config.precision
        place = Place(known, gpus, gpus_per_node, network_gbps, gradient_bytes)
        cuda, compiled, name = torch.device("cuda"), config.compile != "off", _in_words(gpus, known.name, place.nodes)
        return Target(name, cuda, False, place, precision, compiled, known.usable_bytes, gpus)
    return _this_machine(config, "cpu" if machine else config.device, gpus, gpus_per_node, network_gbps, gradient_bytes)


def _in_words(gpus: int, name: str, nodes: int) -> str:
    return f"{gpus} x " * (gpus > 1) + name + f" in {nodes} nodes" * (nodes > 1)


def _this_machine(
    config: RunConfig, spec: str, gpus: int, gpus_per_node: int, network_gbps: float | None, gradient_bytes: int
) -> Target:
    device = pick_device(spec)
    if device.type != "cuda" and gpus > 1:
        raise UsageError("--gpus is for GPUs, and there is none here; name one with --machine.")
    compiled = compiles(config.compile, device)
    place = None
    if device.type == "cuda":
        seen = recognize(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)
        place = Place(seen, gpus, gpus_per_node, network_gbps, gradient_bytes) if seen else None
    card = f"{device_name(device).partition(': ')[2]}, this machine"
    precision = choose_compute(config.precision, device).precision
    name = _in_words(gpus, card, -(-gpus // gpus_per_node))
    return Target(name, device, True, place, precision, compiled, free_bytes(device), gpus)


def setup_at(config: RunConfig, target: Target) -> Setup:
    """How each rank trains there: with the recipe's micro-batch, or the largest below it that divides and fits.

    Raises:
        ConfigError: an update cannot be divided evenly over the ranks.
    """
    batch, ranks = config.batch, target.ranks
    sequences, rest = divmod(batch.tokens_of(1), batch.seq_len * ranks)  # of each rank in the smallest update
    if rest:
        raise ConfigError(_unshareable(config, ranks))
    found = []
    for n in range(min(batch.micro_batch, sequences), 0, -1):
        if sequences % n == 0:
            smaller = replace(config, batch=replace(batch, micro_batch=n))
            kind = target.device.type
            found.append(setup_of(smaller, ranks, device=kind, precision=target.precision, compiled=target.compiled))
    if found[0].micro_batch == batch.micro_batch or target.free_bytes is None:
        return found[0]
    return next((one for one in found if fits(still_needed(one), target.free_bytes, one.device)), found[0])


def _unshareable(config: RunConfig, ranks: int) -> str:
    """Why, and the nearest numbers of GPUs that can share an update."""
    batch = config.batch
    name, tokens = ("ramp_from", batch.ramp_from) if batch.ramp_from else ("batch_tokens", batch.batch_tokens)
    if tokens % batch.seq_len:
        return f"batch.{name} = {tokens:,} must be a multiple of batch.seq_len = {batch.seq_len:,}."
    sequences = tokens // batch.seq_len
    below = next(n for n in range(min(ranks, sequences), 0, -1) if sequences % n == 0)
    above = next((n for n in range(ranks, sequences + 1) if sequences % n == 0), None)
    return (
        f"{ranks} GPUs cannot share an update evenly: batch.{name} = {tokens:,} is {sequences:,} sequences of "
        f"{batch.seq_len:,} tokens; {below}{f' or {above}' if above else ''} can."
    )


def formula_time(setup: Setup, target: Target) -> StepTime | None:
    """By published runs and the data sheet, or roughly by this machine's matmuls; None: nothing is known."""
    if target.place is not None and setup.width_bytes == 2:
        reached, many = target.place.machine.reached, target.place.nodes > 1
        spread = max(reached.spread, NODES_SPREAD) if many else reached.spread
        how = reached.source + "; what the nodes cost together by formula" * many
        return StepTime(step_seconds(setup, target.place), spread, how)
    if target.device.type != "cpu" or target.ranks > 1:
        return None
    dtype = torch.bfloat16 if setup.width_bytes == 2 else torch.float32
    rows = min(setup.n_tokens, 1024)
    rate = OF_MATMULS * matmul_rate(model_shapes(setup.model, rows), dtype, target.device, at_least_s=1.0)
    busy_s = setup.grad_accum_steps * setup.n_tokens * flops_per_token(setup.model, setup.seq_len) / rate
    how = f"roughly, from its matmuls timed for a second, at {OF_MATMULS:.0%} of their rate; --measure times real steps"
    return StepTime({"forward and backward": busy_s, **update_seconds(setup, *_update_rates(setup, target))}, 0.5, how)


def measured_time(config: RunConfig, setup: Setup, target: Target) -> tuple[StepTime, StepTimes, Setup]:
    """From about half a minute of real steps on this machine's device; also what was measured, and of what.

    A few micro-steps are timed, and the rest is as many more of them.

    Raises:
        UsageError: the plan is for another machine.
        Problem: the step does not run.
    """
    if not target.here:
        raise UsageError("--measure times steps on this machine; run it there, without --machine.")
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
        warmup_steps=1 if on_cpu else 3,
        steps=3,
        seconds=MEASURE_S,
    )
    least = work.warmup_steps + work.steps  # short steps are made until MEASURE_S is over
    with ProgressLine("measuring", least, "steps") as line:
        times = measure(work, on_step=lambda done: line.advance(min(done, least) - line.done))
    rates = _update_rates(setup, target)
    timed_s = sum(update_seconds(replace(setup, ranks=1), *rates).values())
    share = min(1.0, times.median_s / 2 / timed_s)  # of the timed update that is believed
    micro_s = (times.median_s - share * timed_s) / times.tokens * setup.n_tokens
    parts = {"forward and backward": setup.grad_accum_steps * micro_s}
    parts |= {name: share * seconds for name, seconds in update_seconds(setup, *rates).items()}
    how = f"measured here: {len(times.step_s)} steps of {tried.grad_accum_steps} x {micro_batch} x {setup.seq_len}"
    if target.place is not None and target.ranks > 1:
        parts |= sharing_seconds(setup, target.place, micro_s)
        how += "; the exchange between ranks by formula"
    return StepTime(parts, 0.10, how), times, tried


def _update_rates(setup: Setup, target: Target) -> tuple[float, float]:
    """Bytes/s and FLOP/s, for `update_seconds`: by the data sheet, or timed here."""
    if target.place is not None:
        return update_rates(setup, target.place.machine)
    bandwidth, C = copy_rate(target.device, 1 << 26, at_least_s=0.1), setup.model.n_embd
    if not update_flops(setup):
        return bandwidth, math.inf
    dtype = torch.bfloat16 if target.device.type == "cuda" else torch.float32  # as training/optim/muon.py works
    return bandwidth, matmul_rate([(C, C, C, 1)], dtype, target.device, at_least_s=0.2)


def run_seconds(config: RunConfig, setup: Setup, target: Target, step: StepTime, data_bytes: int) -> dict[str, float]:
    """The whole run by part."""
    evaluations = n_evaluations(config)
    tokens = sum(eval_tokens(config).values())
    pass_s = step.parts["forward and backward"] / (setup.grad_accum_steps * setup.n_tokens)  # per token of one rank
    saves = -(-config.max_steps // config.save_every) if config.save_every else 0
    whole_updates = config.batch.tokens_until(config.max_steps) / config.batch.batch_tokens  # fewer, where they grow
    by_tokens = ("forward and backward", "gathering", "slowest rank")  # the others once an update, whatever its size
    return {
        "training": sum(
            seconds * (whole_updates if part in by_tokens else config.max_steps) for part, seconds in step.parts.items()
        ),
        "evaluations": evaluations * tokens * FORWARD * pass_s / target.ranks,
        "checkpoints": saves * checkpoint_bytes(setup) / HOST_COPY_RATE,
        "start": START_S + COMPILE_S * target.compiled + config.verify_data * data_bytes / HASH_RATE / target.ranks,
    }


def n_evaluations(config: RunConfig) -> int:
    """Of one run: before the first update, every so many, and after the last."""
    return 1 + -(-config.max_steps // config.eval_every) if config.eval_every else 0


def eval_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens of each evaluation whose size is known."""
    known = {**EVAL_TOKENS, "val_loss": config.evals.val_tokens}
    return {name: known[name] for name in config.evals.names if name in known}


def checkpoint_bytes(setup: Setup) -> int:
    """Of one: fp32 weights, and what the optimizer keeps."""
    return FP32 * setup.n_params + setup.state_bytes


def checkpoints_bytes(config: RunConfig, setup: Setup) -> tuple[int, int]:
    """How many lie on the disk at most, and their bytes: a new one is written before an old one goes."""
    saves = -(-config.max_steps // config.save_every) if config.save_every else 0
    most = min(saves, config.keep_checkpoints + 1) if config.keep_checkpoints else saves
    return most, most * checkpoint_bytes(setup)


@dataclass(frozen=True)
class DataNeed:
    """What the data take on the disk."""

    shards_bytes: int
    missing_bytes: int
    """Still to be written, with the working space of a preparation; 0: it is there."""
    said: str


def data_need(config: RunConfig) -> DataNeed:
    """Of the data folder where it is there, else by the tokens that the run goes through, each used once."""
    n_tokens = config.batch.tokens_until(config.max_steps)
    try:
        with open_mixture(read_shares(config.data, config.mix)) as data:
            return DataNeed(data.n_tokens * TOKEN_BYTES, 0, f"there: {data.plan(n_tokens)}")
    except (Problem, OSError):  # not prepared yet, or not here
        pass
    if config.batch.one_batch:
        return DataNeed(config.batch.batch_tokens * TOKEN_BYTES, 0, "one batch of any data")
    # As FineWeb-Edu comes: files of 2.0 GB with 0.71B tokens each, one worker.
    n_files = max(1, round(n_tokens / 710e6))
    share = n_tokens / n_files / 710e6
    pieces = [InputFile("", f"{i}.parquet", int(2.04e9 * share), 0, url="-") for i in range(n_files)]
    plan = Plan(tuple(Part((Slice(file),), file.n_bytes) for file in pieces), "", "", n_tokens=int(n_tokens / 1.05))
    space = Space(plan, "gpt2", 100_000_000, 1, None)
    shards_bytes = n_tokens * TOKEN_BYTES
    return DataNeed(shards_bytes, space.most_bytes, "not prepared yet; each token used once, prepared by one worker")


def disk_lacks(config: RunConfig, data: DataNeed, checkpoints: int) -> list[str]:
    """Which disks of this machine have too little room, and how little."""
    needs: dict[int, list[tuple[Path, int]]] = {}
    for folder, n_bytes in ((Path(config.data or "."), data.missing_bytes), (Path(config.run), checkpoints)):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        needs.setdefault(os.stat(there).st_dev, []).append((folder, n_bytes))
    lacks = []
    for wanted in needs.values():
        need, free = sum(n_bytes for _, n_bytes in wanted), free_disk_bytes(wanted[0][0])
        if need > free:
            folders = " and ".join(str(folder) for folder, n_bytes in wanted if n_bytes)
            lacks.append(f"{folders} need {need / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free")
    return lacks


def choices(config: RunConfig, setup: Setup, target: Target, step: StepTime | None) -> list[Choice]:
    """Every micro-batch that divides the update; with its step time where a formula gives it."""
    found = []
    for one in micro_batches(setup, config.batch.tokens_of(1)):
        need = still_needed(one)
        step_s = None
        if step is not None and target.place is not None and setup.width_bytes == 2:
            scale = step.seconds / sum(step_seconds(setup, target.place).values())  # 1, or what measuring has shown
            step_s = scale * sum(step_seconds(one, target.place).values())
        room = target.free_bytes is None or fits(need, target.free_bytes, setup.device)
        found.append(Choice(one, need, step_s, room))
    return found


def best(found: list[Choice], wanted: Setup) -> Choice | None:
    """What is wanted, if it fits and is as fast as any, within 1 %; else the smallest of those; None: nothing fits."""
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        return None
    times = [choice.step_s for choice in fitting if choice.step_s is not None]
    if times:
        as_fast = [choice for choice in fitting if choice.step_s is not None and choice.step_s <= 1.01 * min(times)]
    else:
        as_fast = [choice for choice in fitting if choice.setup.n_tokens >= FULL_PASS] or fitting[-1:]
    return next((choice for choice in as_fast if choice.setup == wanted), as_fast[0])
