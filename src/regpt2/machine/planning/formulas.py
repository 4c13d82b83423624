"""What a training step costs on a known machine. In: how each rank trains, and where; out: seconds by part.

The formulas of a model that meets published runs within some 10 %
(tests/machine/planning/test_formulas.py compares them).
M tokens of a micro-batch, C = n_embd, L = n_layer, V = padded_vocab_size, n ranks, P parameters.
"""

import math
from dataclasses import dataclass

from regpt2.base import plugins
from regpt2.machine.machines import LARGE_FLOPS, SMALL_FLOPS, Machine
from regpt2.machine.planning.exchange import Wires, exposed_seconds, gathering_seconds
from regpt2.model.flops import flops_per_token
from regpt2.training.memory import FP32, Setup

EAGER = (0.78, 0.92)  # of the compiled speed, at 124M and 1558M: what the kernels between matmuls cost
TILES = {(256, 128): 1.0, (128, 128): 0.9, (128, 64): 0.75, (64, 64): 0.55}  # of a matmul, and how fast each is
LARGE_MICRO_BATCH = 65_536  # tokens; with so many the published shares were reached
KERNEL_S = 3e-6  # the least time of one kernel: a small micro-batch is bound by it
# A layer's FLOPs per token, in C^2, by how many times C its product is wide: 48 of 72. The other 24 are the weights'
# gradients, which sum over tokens and do not shrink with the micro-batch.
WIDTHS = {1: 26, 3: 6, 4: 16}
# Assumed of NCCL, not measured here: some 20 us for an all-reduce of a few bytes over NVLink; between nodes, where it
# goes up and down a tree, 15 us for each of its levels.
NODE_LATENCY_S, LEVEL_LATENCY_S = 20e-6, 15e-6
# All ranks wait for the slowest. llm-foundry's runs on 16 to 128 A100s and H100s (125M to 2.7B) lose 0.7 to 2.2 % of
# their speed each time that the nodes double, though all of their exchange could hide.
WAIT = 0.015
PASS_BYTES = 20  # per parameter and micro-step: weights rounded 6, gradients added up 14
UPDATE_BYTES = 40  # per parameter, read and written: norm and clipping 12, AdamW 28
FORWARD = 1 / 3  # of the FLOPs of training: what an evaluation does
# Tokens of one evaluation, as it is scored here; val_loss has its own setting.
EVAL_TOKENS = {"hellaswag": 10_042 * 164}


@dataclass(frozen=True)
class Place:
    """Where a run takes place."""

    machine: Machine
    gpus: int = 1
    """In all."""
    gpus_per_node: int = 8
    network_gbps: float | None = None
    """Gbit/s between nodes for each GPU; None: the machine's usual."""
    gradient_bytes: int = FP32
    """Of a gradient's number on its way to the other ranks."""

    @property
    def nodes(self) -> int:
        """As few as hold the GPUs."""
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def wires(self) -> Wires:
        """Between all ranks, one for each GPU."""
        bus = self.machine.bus(min(self.gpus, self.gpus_per_node), self.nodes, self.network_gbps)
        return Wires(self.gpus, bus, NODE_LATENCY_S + LEVEL_LATENCY_S * math.log2(self.nodes), self.gradient_bytes)


def step_seconds(setup: Setup, place: Place) -> dict[str, float]:
    """Seconds of one update by part: what is computed, what of the exchange cannot hide behind it, the update."""
    machine = place.machine
    micro_s = micro_step_seconds(setup, machine)
    return {
        "forward and backward": setup.grad_accum_steps * micro_s,
        **sharing_seconds(setup, place, micro_s),
        **update_seconds(setup, *update_rates(setup, machine)),
    }


def sharing_seconds(setup: Setup, place: Place, micro_s: float) -> dict[str, float]:
    """What several ranks cost beside their passes of `micro_s` each, by part."""
    return {
        "gathering": setup.grad_accum_steps * gathering_seconds(setup, place.wires, micro_s),
        "exchange": exposed_seconds(setup, place.wires, micro_s),
        "slowest rank": WAIT * math.log2(place.nodes) * setup.grad_accum_steps * micro_s,
    }


def update_rates(setup: Setup, machine: Machine) -> tuple[float, float]:
    """Bytes/s and FLOP/s, for `update_seconds`."""
    return machine.bandwidth, machine.peak * _best_share(setup, machine)


def update_seconds(setup: Setup, bandwidth: float, matmul_rate: float) -> dict[str, float]:
    """Of what follows the backward pass, by part, at bytes/s and FLOP/s."""
    shards = setup.ranks if setup.strategy == "fsdp" else 1
    return {
        "update": UPDATE_BYTES * setup.n_params / shards / bandwidth,
        "orthogonalization": update_flops(setup) / matmul_rate,
    }


def update_flops(setup: Setup) -> float:
    """Matmul FLOPs of the optimizer in one update, on each rank."""
    count = getattr(plugins.load("training.optim", setup.optim.name), "matmul_flops", None)
    sharing = 1 if setup.strategy == "ordered" else setup.ranks  # in order each makes the whole update
    return count(setup.model, setup.optim, sharing) if count else 0.0


def micro_step_seconds(setup: Setup, machine: Machine) -> float:
    """One forward and backward pass, on one GPU."""
    flops = setup.n_tokens * flops_per_token(setup.model, setup.seq_len)
    busy_s = flops / (machine.peak * share_of_peak(setup, machine))
    kernels = 28 * setup.model.n_layer + 40
    return max(busy_s, kernels * KERNEL_S) + PASS_BYTES * setup.n_params / machine.bandwidth


def share_of_peak(setup: Setup, machine: Machine) -> float:
    """The share of the 16-bit peak that a pass reaches: by the model's size, its micro-batch, and if it is compiled."""
    share = _best_share(setup, machine)
    if not setup.compiled:
        share *= _between(*EAGER, flops_per_token(setup.model, 1024))
    return share / max(1.0, _stretched(setup, setup.n_tokens, machine) / _stretched(setup, LARGE_MICRO_BATCH, machine))


def _best_share(setup: Setup, machine: Machine) -> float:
    """With large micro-batches and compiled."""
    return _between(machine.reached.small, machine.reached.large, flops_per_token(setup.model, 1024))


def _between(small: float, large: float, size: float) -> float:
    """Between the values for 124M and 1558M by the logarithm of the size, and not beyond."""
    place = math.log(size / SMALL_FLOPS) / math.log(LARGE_FLOPS / SMALL_FLOPS)
    return small + (large - small) * min(1.0, max(0.0, place))


def _stretched(setup: Setup, tokens: int, machine: Machine) -> float:
    """How much longer a pass takes than if its layers' matmuls kept every multiprocessor busy."""
    C, L = setup.model.n_embd, setup.model.n_layer
    idle = sum(flops * (1 / _filled(tokens, width * C, machine.n_sm) - 1) for width, flops in WIDTHS.items())
    return 1 + idle * C * C * L / flops_per_token(setup.model, setup.seq_len)


def _filled(rows: int, columns: int, n_sm: int) -> float:
    """How well a matmul whose result is (rows, columns) fills all multiprocessors: its tiles come in whole waves."""
    filled = []
    for (height, width), speed in TILES.items():
        waves = math.ceil(rows / height) * math.ceil(columns / width) / n_sm
        filled.append(speed * waves / math.ceil(waves))
    return max(filled)
