"""How fast a machine multiplies matrices. In: a type and a device, perhaps a model's sizes; out: FLOP/s."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from regpt2.base.device import synchronize
from regpt2.model.language_model import GPTConfig

SQUARES, LEAST_SQUARE = (256, 512, 1024, 2048), 512
LONG_S = 1e-3
"""A product of this length shows the rate; one of twice the size takes eight times as long."""

# C = n_embd, L = n_layer


def timed(work: Callable[[], object], device: torch.device, *, times: int) -> list[float]:
    """Seconds of each of several runs of `work`."""
    took: list[float] = []
    for _ in range(times):
        synchronize(device)
        started_at = time.perf_counter()
        work()
        synchronize(device)
        took.append(time.perf_counter() - started_at)
    return took


def seconds_of(work: Callable[[], object], device: torch.device, *, at_least_s: float) -> float:
    """The median time of `work` after a first one, repeated at least three times and for at least `at_least_s`."""
    work()
    took = timed(work, device, times=3)
    while sum(took) < at_least_s:
        took += timed(work, device, times=1)
    return statistics.median(took)


def matmul_rate(
    shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device, *, at_least_s: float
) -> float:
    """FLOP/s over linear layers of `shapes`: rows, inputs, outputs, and the number of such layers."""
    generator = torch.Generator(device).manual_seed(0)  # torch's own may belong to a run
    flops = seconds = 0.0
    for rows, inputs, outputs, n in shapes:
        x, weight = (
            torch.randn(size, inputs, device=device, dtype=dtype, generator=generator) for size in (rows, outputs)
        )
        one_s = seconds_of(partial(F.linear, x, weight), device, at_least_s=at_least_s / len(shapes))
        flops += 2.0 * n * rows * inputs * outputs
        seconds += n * one_s
    return flops / seconds


def model_shapes(model: GPTConfig, n_tokens: int) -> list[tuple[int, int, int, int]]:
    """The matmuls of a forward pass, for `matmul_rate`."""
    C, L = model.n_embd, model.n_layer
    widths = ((C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, model.padded_vocab_size, 1))
    return [(n_tokens, *width) for width in widths]


def square_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products, at most, in a few hundredths of a second: they double in size until one takes LONG_S.

    The fastest of several runs counts, because other work on the machine only slows them down.
    """
    generator, best = torch.Generator(device).manual_seed(0), 0.0
    for n in SQUARES:
        x, weight = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
        fastest_s = min(timed(partial(F.linear, x, weight), device, times=6)[1:])  # the first prepares the kernel
        best = max(best, 2.0 * n**3 / fastest_s)
        if n >= LEAST_SQUARE and fastest_s > LONG_S:
            break
    return best
