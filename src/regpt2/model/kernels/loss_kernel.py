"""The softmax's loss and gradient in one GPU kernel. In: logits (n, V); out: losses (n,), the gradient over the logits.

As in llm.c's fused classifier, a program takes one row, reads it once for the largest logit and the sum of
exponentials, and again to overwrite it with softmax - onehot(target). The rows in work on all multiprocessors fit into
the L2 cache of GPUs since the A100, so each logit is read from memory once and written once.
Import this only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# n tokens, V = padded_vocab_size

_BLOCK = 8192  # logits at a time: 8 per thread, one 16-byte load in 16 bits
_WARPS = 32  # two programs of a multiprocessor then hold all its threads: 264 rows of 100 KB on an H200


def softmax_loss_(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float) -> Tensor:
    """The fp32 loss of each row (n,) in nats; `logits` is overwritten by the gradient of their sum.

    Args:
        logits: (n, V), contiguous, of 16 or 32 bits; columns from `vocab_size` on take no part.
        targets: (n,) int64; a row whose target is negative has loss and gradient 0.
        softcap: the logits go through tanh first, and so does the gradient; 0 = off.
    """
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    scalars = (logits.stride(0), V, vocab_size, softcap or 1.0)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        _kernel[(n,)](logits, targets, losses, *scalars, IS_CAPPED=bool(softcap), BLOCK=_BLOCK, num_warps=_WARPS)
    return losses


@triton.jit  # type: ignore[untyped-decorator]
def _capped(x, softcap, IS_CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The score of a logit, and what its gradient is multiplied by: softcap * tanh(x / softcap), 1 - tanh^2."""
    if IS_CAPPED:
        tanh = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        return softcap * tanh, 1.0 - tanh * tanh
    return x, x * 0.0 + 1.0


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, targets, losses, stride, V, vocab_size, softcap, IS_CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # rows x V is more than 2^31
    logits += row * stride
    target = tl.load(targets + row)
    counts = target >= 0
    at_target, _at_target_slope = _capped(
        tl.load(logits + target, mask=counts, other=0.0).to(tl.float32), softcap, IS_CAPPED
    )

    largest = -float("inf")
    total = 0.0  # of exp(score - largest)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)
        scores, _slope = _capped(x, softcap, IS_CAPPED)
        scores = tl.where(columns < vocab_size, scores, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(scores - largest), 0)
    log_sum = largest + tl.log(total)
    tl.store(losses + row, tl.where(counts, log_sum - at_target, 0.0))

    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        real = (columns < vocab_size) & counts
        x = tl.load(logits + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)
        scores, slope = _capped(x, softcap, IS_CAPPED)
        gradient = (tl.exp(scores - log_sum) - tl.where(columns == target, 1.0, 0.0)) * slope
        tl.store(logits + columns, tl.where(real, gradient, 0.0).to(logits.dtype.element_ty), mask=columns < V)
