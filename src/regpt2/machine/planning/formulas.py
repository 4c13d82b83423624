"""Time of a training step on a known machine. In: how each rank trains, and where; out: seconds by part.

The formulas agree with published runs within some 10 % (compared in tests/machine/planning/test_formulas.py).
M tokens of a micro-batch, C = n_embd, L = n_layer, V = padded_vocab_size, n ranks, P parameters.
"""

import math
from dataclasses import dataclass

from regpt2.base import shelves
from regpt2.machine.known_gpus import LARGE_FLOPS, SMALL_FLOPS, Machine
from regpt2.machine.planning.exchange import Wires, exposed_seconds, gathering_seconds
from regpt2.model.flops import flops_per_token
from regpt2.training.memory import FP32, Setup

EAGER = (0.78, 0.92)  # of the compiled speed, at 124M and 1558M: the kernels between matmuls take the rest
TILES = {(256, 128): 1.0, (128, 128): 0.9, (128, 64): 0.75, (64, 64): 0.55}  # of a matmul, and their relative speed
LARGE_MICRO_BATCH = 65_536  # tokens; the published shares of the peak are from passes of this size
KERNEL_S = 3e-6  # the least time of a kernel, which bounds small micro-batches
# A layer's FLOPs per token, in C^2, by the width of the product in units of C: 48 of 72. The other 24 are gradients of
# weights, which sum over tokens and keep their size when the micro-batch shrinks.
WIDTHS = {1: 26, 3: 6, 4: 16}
# Assumed for NCCL, not measured here: some 20 us for an all-reduce of a few bytes over NVLink; between nodes, where it
# uses a tree, 15 us per level.
NODE_LATENCY_S, LEVEL_LATENCY_S = 20e-6, 15e-6
# All ranks wait for the slowest. llm-foundry's runs on 16 to 128 A100s and H100s (125M to 2.7B) lose 0.7 to 2.2 % of
# their speed with each doubling of the nodes, although the passes could hide their whole exchange.
WAIT = 0.015
ROUNDING_BYTES, ADDING_BYTES = 6, 14  # per micro-step: of a parameter that is rounded, of a gradient that is added up
UPDATE_BYTES = 40  # per parameter, read and written: norm and clipping 12, AdamW 28
AVERAGE_BYTES = 12  # and with optim.ema: the average read and written, the weight read
LORA_KERNELS = 20  # of a layer: of each matrix 6 matmuls of the adapter, and no gradient of the frozen weight
FORWARD = 1 / 3  # of the FLOPs of training all weights, for an evaluation
# Tokens of one evaluation, counted as evals/ scores it; val_loss has its own setting.
EVAL_TOKENS = {"hellaswag": 10_042 * 164}


@dataclass(frozen=True)
class Place:
    """Where a run takes place: a kind of GPU, and how many."""

    machine: Machine
    gpus: int = 1  # in total
    gpus_per_node: int = 8
    network_gbps: float | None = None  # Gbit/s between nodes per GPU; None: the machine's usual rate
    gradient_bytes: int = FP32  # of one number of a gradient when it is exchanged

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def wires(self) -> Wires:
        """Between all ranks, one per GPU."""
        bus = self.machine.bus(min(self.gpus, self.gpus_per_node), self.nodes, self.network_gbps)
        return Wires(self.gpus, bus, NODE_LATENCY_S + LEVEL_LATENCY_S * math.log2(self.nodes), self.gradient_bytes)


def step_seconds(setup: Setup, place: Place) -> dict[str, float]:
    """Seconds of one update by part: the passes, the exchange that they do not hide, the optimizer."""
    machine = place.machine
    micro_s = micro_step_seconds(setup, machine)
    return {
        "forward and backward": setup.grad_accum_steps * micro_s,
        **sharing_seconds(setup, place, micro_s),
        **update_seconds(setup, *update_rates(setup, machine)),
    }


def sharing_seconds(setup: Setup, place: Place, micro_s: float) -> dict[str, float]:
    """Seconds that several ranks add to their passes of `micro_s` each, by part."""
    return {
        "gathering": setup.grad_accum_steps * gathering_seconds(setup, place.wires, micro_s),
        "exchange": exposed_seconds(setup, place.wires, micro_s),
        "slowest rank": WAIT * math.log2(place.nodes) * setup.grad_accum_steps * micro_s,
    }


def update_rates(setup: Setup, machine: Machine) -> tuple[float, float]:
    return machine.bandwidth, machine.peak * _best_share(setup, machine)


def update_seconds(setup: Setup, bandwidth: float, matmul_rate: float) -> dict[str, float]:
    """Seconds of the optimizer by part, at the given bytes/s and FLOP/s."""
    shards = setup.ranks if setup.strategy == "fsdp" else 1
    moved = UPDATE_BYTES + AVERAGE_BYTES * bool(setup.optim.ema)
    return {
        "update": moved * setup.n_trained / shards / bandwidth,
        "orthogonalization": update_flops(setup) / matmul_rate,
    }


def update_flops(setup: Setup) -> float:
    """Matmul FLOPs of the optimizer in one update, on each rank."""
    count = getattr(shelves.load("training.optim", setup.optim.name), "matmul_flops", None)
    sharing = 1 if setup.strategy == "ordered" else setup.ranks  # each rank computes the whole update
    return count(setup.model, setup.optim, sharing) if count else 0.0


def micro_step_seconds(setup: Setup, machine: Machine) -> float:
    """One forward and backward pass, on one GPU."""
    busy_s = setup.n_tokens * setup.flops_per_token / (machine.peak * share_of_peak(setup, machine))
    kernels = (28 + LORA_KERNELS * bool(setup.lora.rank)) * setup.model.n_layer + 40
    moved = ROUNDING_BYTES * (setup.n_params + setup.n_adapters) + ADDING_BYTES * setup.n_trained
    return max(busy_s, kernels * KERNEL_S) + moved / machine.bandwidth


def share_of_peak(setup: Setup, machine: Machine) -> float:
    """The share of the 16-bit peak that a pass reaches: it depends on model size, micro-batch, and compilation."""
    share = _best_share(setup, machine)
    if not setup.compiled:
        share *= _between(*EAGER, flops_per_token(setup.model, 1024))
    return share / max(1.0, _stretched(setup, setup.n_tokens, machine) / _stretched(setup, LARGE_MICRO_BATCH, machine))


def _best_share(setup: Setup, machine: Machine) -> float:
    """Compiled, with large micro-batches."""
    return _between(machine.reached.small, machine.reached.large, flops_per_token(setup.model, 1024))


def _between(small: float, large: float, size: float) -> float:
    """Interpolate between 124M and 1558M by the logarithm of the size; constant beyond."""
    place = math.log(size / SMALL_FLOPS) / math.log(LARGE_FLOPS / SMALL_FLOPS)
    return small + (large - small) * min(1.0, max(0.0, place))


def _stretched(setup: Setup, tokens: int, machine: Machine) -> float:
    """How much longer a pass takes because some multiprocessors idle in its matmuls: 1 if none does."""
    C, L = setup.model.n_embd, setup.model.n_layer
    idle = sum(flops * (1 / _filled(tokens, width * C, machine.n_sm) - 1) for width, flops in WIDTHS.items())
    return 1 + idle * C * C * L / flops_per_token(setup.model, setup.seq_len)


def _filled(rows: int, columns: int, n_sm: int) -> float:
    """The share of all multiprocessors that a (rows, columns) matmul keeps busy: its tiles run in whole waves."""
    filled = []
    for (height, width), speed in TILES.items():
        waves = math.ceil(rows / height) * math.ceil(columns / width) / n_sm
        filled.append(speed * waves / math.ceil(waves))
    return max(filled)
