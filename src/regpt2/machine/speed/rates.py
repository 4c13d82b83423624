"""Rates of a machine's parts. In: a device, a folder, the ranks; out: FLOP/s, bytes/s, and which kernel ran.

Each is the median of several runs after a first one that is not timed.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from regpt2.base.device import quiet_profiler
from regpt2.base.errors import Problem
from regpt2.base.files import forget_cached
from regpt2.base.ranks.world import World
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.matmul_rate import seconds_of

# B sequences, H heads, T tokens, D head width


def copy_rate(device: torch.device, n_bytes: int, *, at_least_s: float) -> float:
    """Bytes/s of memory, read and written, when a tensor is copied."""
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds_of(lambda: target.copy_(source), device, at_least_s=at_least_s)


# torch's operators behind scaled_dot_product_attention, without the parts that differ by version; and FlexAttention.
_ATTENTION = {
    "flex_attention": "FlexAttention",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_attention_math": "math",
}


def attention_kernel(work: Callable[[], object]) -> str:
    """The kernel behind attention, found by running `work` once more; "matmul" if it is none of torch's."""
    quiet_profiler()
    with profile() as seen:  # on the CPU, which calls the operators of every device; torch.profiler imports a compiler
        work()
    ran = {event.name for event in seen.function_events or ()}
    names = [name for operator, name in _ATTENTION.items() if any(operator in one for one in ran)]
    return names[0] if names else "matmul"


def attention_rate(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, at_least_s: float
) -> tuple[str, float, float]:
    """The kernel of the model's attention at (B, H, T, D), its seconds forward and backward, and its FLOP/s.

    Half of the square is counted, as in `flops_per_token`.
    """
    B, H, T, D = shape
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def there_and_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(causal_attention(q, k, v), (q, k, v), gradient)

    seconds = seconds_of(there_and_back, device, at_least_s=at_least_s)
    return attention_kernel(there_and_back), seconds, 6.0 * B * H * T * T * D / seconds


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
    return seconds_of(lambda: world.sum(pattern), world.device, at_least_s=0.0)  # 0: each rank repeats three times


def disk_rate(path: Path, n_bytes: int) -> tuple[float, float]:
    """Bytes/s of writing a file of random bytes until fsync returns, and of reading it back. The caller removes it.

    The system is asked to drop the file from its cache first; where it does not, the cache is read.

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
    return n_pieces * len(piece) / write_s, n_pieces * len(piece) / read_s
