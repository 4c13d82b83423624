"""The exchange of gradients between ranks. In: how each rank trains, the wires; out: seconds that no pass hides.

torch's DDP sends gradients in buckets, in the order in which they become complete: a bucket is all-reduced while
earlier layers still compute. The time after the end of the backward pass is exposed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from regpt2.model.flops import flops_per_token
from regpt2.model.modern import ModernConfig
from regpt2.training.memory import FP32, Setup

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes; a bucket of this size is sent (the defaults of torch's DDP)
LAYER = (4, 4, 1, 3)  # matrices of a layer in units of C^2, in backward order: MLP down, up, attention out, QKV
ADAPTERS = (5, 5, 2, 4)  # of these matrices, in units of r C
BACKWARD = 2 / 3  # of a micro-step
HIDDEN = 0.6  # of a micro-step can hide FSDP's gathers and scatters, which share the GPU with its kernels


@dataclass(frozen=True)
class Wires:
    """The connection between ranks."""

    ranks: int
    bus: float  # bytes per second per GPU of an all-reduce, as NCCL counts bus bandwidth
    latency_s: float  # of one collective operation of any size
    gradient_bytes: int = FP32  # of one number of a gradient when it is exchanged

    @property
    def hops(self) -> float:
        """How often a number crosses each wire of a ring in a gather or a scatter; an all-reduce doubles it."""
        return (self.ranks - 1) / self.ranks

    def all_reduce_seconds(self, numbers: float) -> float:
        """Over a ring (nccl-tests, PERFORMANCE.md): every rank sends 2 (n - 1) / n of the bytes."""
        return self.latency_s + 2 * self.hops * self.gradient_bytes * numbers / self.bus


class Gradients(NamedTuple):
    """Gradients that become complete at the same time."""

    ready_s: float  # seconds after the start of the backward pass through the layers
    numbers: int


def exposed_seconds(setup: Setup, wires: Wires, micro_s: float) -> float:
    """Seconds of an update's exchange that the passes, of `micro_s` each, do not hide; without FSDP's gathers."""
    if wires.ranks == 1:
        return 0.0
    if setup.strategy == "ordered":  # each rank sends its gradient to every other after the backward pass
        return wires.latency_s + (wires.ranks - 1) * FP32 * setup.n_trained / wires.bus
    if setup.strategy == "fsdp":
        # Only in the last micro-step; before it each rank keeps its own gradients unsharded.
        last = _fsdp_exposed_seconds(setup, wires, micro_s, scattered_bytes=wires.gradient_bytes)
        return last - gathering_seconds(setup, wires, micro_s)
    head_share = 6 * setup.model.n_embd * setup.model.padded_vocab_size / flops_per_token(setup.model, setup.seq_len)
    backward_s = BACKWARD * (1 - head_share) * micro_s  # through the layers; before it only the head's gradient is sent
    return sent_after(buckets(gradients_of(setup, backward_s)), wires, backward_s)


def gathering_seconds(setup: Setup, wires: Wires, micro_s: float) -> float:
    """Seconds of gathering FSDP's weights that one micro-step of `micro_s` does not hide; 0 for other strategies."""
    if setup.strategy != "fsdp" or wires.ranks == 1:
        return 0.0
    return _fsdp_exposed_seconds(setup, wires, micro_s, scattered_bytes=0)


def _fsdp_exposed_seconds(setup: Setup, wires: Wires, micro_s: float, *, scattered_bytes: int) -> float:
    """Of a micro-step: each layer's weights gathered twice in the compute type, in the last also gradients scattered.

    Nothing computes while the embeddings are gathered at the start, and while their gradient is scattered at the end.
    """
    moved = wires.hops * (2 * setup.width_bytes + scattered_bytes) * setup.n_params
    latencies_s = (3 if scattered_bytes else 2) * (setup.model.n_layer + 1) * wires.latency_s
    outer = setup.n_params - sum(LAYER) * setup.model.n_layer * setup.model.n_embd**2
    ends_s = wires.hops * (setup.width_bytes + scattered_bytes) * outer / wires.bus + 2 * wires.latency_s
    return max(ends_s, moved / wires.bus + latencies_s - HIDDEN * micro_s)


def gradients_of(setup: Setup, backward_s: float) -> list[Gradients]:
    """In the order in which they become complete: an untied head's, each matrix of the layers, the embeddings'.

    A tied head's weights are the embedding's: their gradient is complete only at the end.
    """
    C, L, V = setup.model.n_embd, setup.model.n_layer, setup.model.padded_vocab_size
    if setup.lora.rank:
        sizes = [setup.lora.rank * C * size for size in ADAPTERS * L]
        return [Gradients(backward_s * (i + 1) / len(sizes), size) for i, size in enumerate(sizes)]
    head = V * C if isinstance(setup.model, ModernConfig) and setup.model.untied_head else 0
    found, done = [Gradients(0.0, head)] if head else [], 0
    for size in LAYER * L:
        done += size
        found.append(Gradients(backward_s * done / (sum(LAYER) * L), size * C * C))
    return [*found, Gradients(backward_s, setup.n_params - head - sum(LAYER) * L * C * C)]


def buckets(gradients: Iterable[Gradients]) -> list[Gradients]:
    """Filled in this order up to their size; the last one holds the rest."""
    filled: list[Gradients] = []
    numbers, ready_s = 0, 0.0
    for some in gradients:
        numbers, ready_s = numbers + some.numbers, some.ready_s
        if FP32 * numbers >= (BUCKET if filled else FIRST_BUCKET):
            filled.append(Gradients(ready_s, numbers))
            numbers = 0
    return [*filled, Gradients(ready_s, numbers)] if numbers else filled


def sent_after(filled: Iterable[Gradients], wires: Wires, end_s: float) -> float:
    """Seconds of the all-reduces after `end_s`: they run one at a time, each once its bucket is full."""
    free_s = 0.0
    for bucket in filled:
        free_s = max(free_s, bucket.ready_s) + wires.all_reduce_seconds(bucket.numbers)
    return max(0.0, free_s - end_s)
