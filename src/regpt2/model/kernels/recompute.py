"""Compute again instead of keep. In: a function and its input; out: its output, the steps between not kept."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_WORTH = 1 << 20  # elements: below, the bookkeeping (0.1 ms) costs more than the memory is worth


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, to the bit. On a CPU the backward pass recomputes the input of the function's last step.

    That last step itself is not repeated: for `linear(gelu(x))` it is the GELU alone. torch.compile
    decides by itself what to keep. The function draws no random numbers.
    """
    if x.device.type != "cpu" or x.numel() < _WORTH or torch.compiler.is_compiling():
        return function(x)
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return y
