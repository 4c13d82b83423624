"""Rates of a machine's parts. In: a device, a folder, the ranks; out: FLOP/s, bytes/s, and which kernel ran.

Each is the median of several runs after an untimed first.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from regpt2.base.device import synchronize
from regpt2.base.errors import Problem
from regpt2.base.files import forget_cached
from regpt2.base.ranks.world import World
from regpt2.machine.speed.kernels import attention_kernel
from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels.attention import causal_attention

# B sequences, H heads, T tokens, D head width, N = B * T tokens, C = n_embd, V = padded_vocab_size


def seconds_of(work: Callable[[], object], device: torch.device, *, at_least_s: float) -> float:
    """The median time of `work`, repeated at least three times and for at least `at_least_s`."""
    times: list[float] = []
    work()
    while len(times) < 3 or sum(times) < at_least_s:
        synchronize(device)
        started_at = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)


def matmul_rate(
    shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device, *, at_least_s: float
) -> float:
    """FLOP/s over linear layers of `shapes`: rows, inputs, outputs, and the number of such layers."""
    flops = seconds = 0.0
    for rows, inputs, outputs, n in shapes:
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        one_s = seconds_of(partial(F.linear, x, weight), device, at_least_s=at_least_s / len(shapes))
        flops += 2.0 * n * rows * inputs * outputs
        seconds += n * one_s
    return flops / seconds


def model_shapes(model: GPTConfig, n_tokens: int) -> list[tuple[int, int, int, int]]:
    """The matmuls of a forward pass, for `matmul_rate`."""
    C, L = model.n_embd, model.n_layer
    widths = ((C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, model.padded_vocab_size, 1))
    return [(n_tokens, *width) for width in widths]


def copy_rate(device: torch.device, n_bytes: int, *, at_least_s: float) -> float:
    """Bytes/s of memory, read and written, when a tensor is copied."""
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds_of(lambda: target.copy_(source), device, at_least_s=at_least_s)


@dataclass(frozen=True)
class AttentionRate:
    """The kernel of causal attention, and its speed, forward and backward together."""

    kernel: str
    seconds: float
    flops_per_s: float
    """Counting half of the square, as `flops_per_token` does."""


def attention_rate(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, at_least_s: float
) -> AttentionRate:
    """Run the model's attention at (B, H, T, D), and find which kernel it uses."""
    B, H, T, D = shape
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def there_and_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(causal_attention(q, k, v), (q, k, v), gradient)

    seconds = seconds_of(there_and_back, device, at_least_s=at_least_s)
    return AttentionRate(attention_kernel(there_and_back), seconds, 6.0 * B * H * T * T * D / seconds)


def exchange_seconds(world: World, n_bytes: int) -> float:
    """How long the ranks take to sum `n_bytes` of fp32, as for gradients. Every number of the first sum is checked.

    Raises:
        Problem: a sum is wrong.
    """
    with world.together():  # out of memory on one rank ends all of them
        pattern = torch.arange(n_bytes // 4, dtype=torch.int32, device=world.device).remainder_(1024).float()
        value, expected = pattern + world.rank, pattern * world.size + sum(range(world.size))  # exact: below 2**24
    n_wrong = world.everyones(int((world.sum(value) != expected).sum()))
    if any(n_wrong):  # the same on all ranks, so that none waits for another
        ranks = ", ".join(f"{n:,} on rank {rank}" for rank, n in enumerate(n_wrong) if n)
        raise Problem(f"of {len(value):,} sums over {world.size} ranks are wrong: {ranks}.")
    times = []
    for _ in range(3):
        world.barrier()
        synchronize(world.device)
        started_at = time.perf_counter()
        world.sum(pattern)
        synchronize(world.device)
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)


@dataclass(frozen=True)
class DiskRate:
    """Bytes/s of one file, written and read from end to end."""

    write: float
    """Until fsync returns."""
    read: float
    """Read back after the system was asked to drop its cache; from the cache if it does not."""


def disk_rate(path: Path, n_bytes: int) -> DiskRate:
    """Write a file of random bytes to `path`, read it back and compare. The caller removes it.

    Raises:
        Problem: the bytes read differ from those written.
        OSError: the file cannot be written completely.
    """
    piece = os.urandom(min(n_bytes, 16 << 20))  # random, so that a compressing disk does not look faster than it is
    n_pieces = -(-n_bytes // len(piece))
    started_at = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(n_pieces):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    write_s = time.perf_counter() - started_at
    with open(path, "rb", buffering=0) as file:
        forget_cached(file)
        started_at = time.perf_counter()
        same = all(file.read(len(piece)) == piece for _ in range(n_pieces))
        read_s = time.perf_counter() - started_at
    if not same:
        raise Problem(f"{path} does not hold what was written to it: the disk, its driver or the memory is bad.")
    return DiskRate(n_pieces * len(piece) / write_s, n_pieces * len(piece) / read_s)
