"""Where a run is planned. In: a configuration and a machine's name; out: a `Target`, and how each rank trains there."""

import math
from dataclasses import dataclass, replace

import torch

from regpt2.base.device import choose_compute, compiles, device_name, pick_device
from regpt2.base.errors import ConfigError, UsageError
from regpt2.base.free_memory import free_bytes
from regpt2.config.run import RunConfig
from regpt2.config.setup import setup_of
from regpt2.machine.known_gpus import find_machine, recognize
from regpt2.machine.planning.formulas import Place
from regpt2.training.memory import FP32, Setup, fits, still_needed


@dataclass(frozen=True)
class Target:
    """The machine that a run is planned for."""

    name: str
    device: torch.device  # of type cuda for a named machine, even if this machine has no GPU
    here: bool  # it is this machine
    place: Place | None  # None: a device without published runs
    precision: str
    compiled: bool
    free_bytes: int | None  # for one rank; None: unknown
    ranks: int = 1


def find_target(
    config: RunConfig, machine: str, gpus: int, gpus_per_node: int = 8, network_gbps: float | None = None
) -> Target:
    """The named machine, or this one, with `gpus` GPUs in total and `gpus_per_node` in each node.

    Raises:
        UsageError: an unknown machine, or a number out of range.
    """
    _check(gpus, gpus_per_node, network_gbps)
    precision: str
    if not machine or machine.lower() == "cpu":
        device, here = pick_device("cpu" if machine else config.device), True
        if device.type != "cuda" and gpus > 1:
            raise UsageError(f"--gpus {gpus} needs GPUs, and this machine has none; name one with --machine.")
        seen = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        known = recognize(seen.name, seen.total_memory) if seen else None
        card, free = f"{device_name(device).partition(': ')[2]}, this machine", free_bytes(device)
        precision, compiled = choose_compute(config.precision, device).precision, compiles(config.compile, device)
    else:
        known, device, here = find_machine(machine), torch.device("cuda"), False
        card, free, compiled = known.name, known.usable_bytes, config.compile != "off"
        precision = known.precision if config.precision == "auto" else config.precision
    gradient_bytes = 2 if config.parallel.reduce_dtype == "bf16" else FP32
    place = Place(known, gpus, gpus_per_node, network_gbps, gradient_bytes) if known else None
    nodes = -(-gpus // gpus_per_node)
    name = f"{gpus} x " * (gpus > 1) + card + f" in {nodes} nodes" * (nodes > 1)
    return Target(name, device, here, place, precision, compiled, free, gpus)


def _check(gpus: int, gpus_per_node: int, network_gbps: float | None) -> None:
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
        raise UsageError(f"--network-gbps {network_gbps:g} must be positive and finite: Gbit/s per GPU, such as 400.")


def setup_at(config: RunConfig, target: Target) -> Setup:
    """How each rank trains there: with the recipe's micro-batch, or the largest below it that divides and fits.

    Raises:
        ConfigError: an update cannot be divided evenly over the ranks.
    """
    batch, ranks = config.batch, target.ranks
    sequences, rest = divmod(batch.tokens_of(1), batch.seq_len * ranks)  # of each rank in the smallest update
    if rest:
        raise ConfigError(_cannot_divide(config, ranks))
    found = []
    for n in range(min(batch.micro_batch, sequences), 0, -1):
        if sequences % n == 0:
            smaller = replace(config, batch=replace(batch, micro_batch=n))
            kind = target.device.type
            found.append(setup_of(smaller, ranks, device=kind, precision=target.precision, compiled=target.compiled))
    if found[0].micro_batch == batch.micro_batch or target.free_bytes is None:
        return found[0]
    return next((one for one in found if fits(still_needed(one), target.free_bytes, one.device)), found[0])


def _cannot_divide(config: RunConfig, ranks: int) -> str:
    """The error's message, with the nearest numbers of GPUs that divide an update."""
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
