"""Cross entropy of a linear head. In: hidden states and targets; out: mean loss in nats, without the (N, V) logits.

For the 124M model at B=16, T=1024 the fp32 logits would be 3.3 GB. Here a chunk of rows at a time is projected, its
loss taken, and its logits overwritten by their own gradient, in the same pass: no logits are kept or computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# N = B * T tokens, n tokens in a chunk, C = n_embd, V = padded_vocab_size, v rows of a part of it

_CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of logits in the compute type, alive at once
_BLOCK_BYTES = 1 << 22  # of fp32 logits on a CPU: they stay in its cache from the first pass to the last
_CPU_PARTS = 8  # of the weight's gradient: before it is added a part is there once in 16 bits and once in 32


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits (..., V) bent to stay below `softcap`, small ones hardly changed; 0 = as they are. Of their own type."""
    if not softcap:
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (softcap * torch.tanh(logits.to(wide) / softcap)).to(logits.dtype)


def reference_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, softcap: float = 0.0
) -> Tensor:
    """The same loss in one line, with the whole logits: what `linear_cross_entropy` is tested against."""
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    return F.cross_entropy(softcapped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap), targets)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    softcap: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T` against `targets`, in nats per token; a scalar of at least fp32.

    Args:
        hidden: (N, C), in the compute type.
        weight: (V, C), rounded to the compute type here, so that its gradient, which is a sum over all tokens, is not.
            Rows from `vocab_size` on are padding: they get probability zero.
        targets: (N,) int64, below `vocab_size`.
        softcap: the logits go through `softcapped` first.
        chunk_tokens: rows at a time; by default as many as keep the chunk's logits below 256 MiB (CPU), 1 GiB (GPU).
    """
    if chunk_tokens is None:
        most = max(1, _CHUNK_BYTES.get(hidden.device.type, 1 << 28) // (hidden.element_size() * weight.shape[0]))
        chunk_tokens = -(-hidden.shape[0] // -(-hidden.shape[0] // most))  # chunks of equal size
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, vocab_size, softcap, chunk_tokens, with_gradient
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        softcap: float,
        chunk_tokens: int,
        gradient: bool,
    ) -> Tensor:
        N, V = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)  # sums are kept in fp32, or fp64 for fp64 inputs
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        logits_buffer = hidden.new_empty(min(chunk_tokens, N), V)  # one for all chunks
        d_hidden = torch.empty_like(hidden) if gradient else None
        d_weight = None
        part_rows = -(-V // _CPU_PARTS) if hidden.device.type == "cpu" else V
        ctx.n_tokens, ctx.dtype = N, weight.dtype
        weight = weight.to(hidden.dtype)
        for start in range(0, N, chunk_tokens):
            rows = hidden[start : start + chunk_tokens]  # (n, C)
            logits = torch.mm(rows, weight.T, out=logits_buffer[: len(rows)])  # (n, V)
            loss_sum += _softmax_loss_(logits, targets[start : start + chunk_tokens], vocab_size, softcap, wide)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[start : start + chunk_tokens])
                if d_weight is None:
                    d_weight = torch.zeros_like(weight, dtype=wide)
                parts = torch.split(logits, part_rows, dim=1)
                for sums, of_part in zip(torch.split(d_weight, part_rows), parts, strict=True):
                    sums += of_part.T @ rows  # (v, C)
        ctx.gradients = d_hidden, d_weight
        return loss_sum / N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.gradients
        if d_hidden is None:
            raise RuntimeError("linear_cross_entropy gives its gradient once; call it again for another backward")
        ctx.gradients = None, None
        # The division by N waits until here, so that fp16 does not lose the small entries.
        scale = d_loss / ctx.n_tokens  # fp32 or fp64; in 16 bits it would be off by up to 0.4 %
        d_hidden = d_hidden.to(scale.dtype).mul_(scale).to(d_hidden.dtype)
        return d_hidden, d_weight.mul_(scale).to(ctx.dtype), None, None, None, None, None


def _softmax_loss_(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, wide: torch.dtype) -> Tensor:
    """Sum of the losses of a chunk (n, V); `logits` is overwritten by its gradient, softmax - onehot(target).

    With a softcap that is the gradient of the capped logits, which tanh's own takes back to the logits before.
    """
    n, V = logits.shape
    on_cpu = logits.device.type == "cpu"
    block = max(1, _BLOCK_BYTES // (V * wide.itemsize)) if on_cpu else n
    loss_sum = torch.zeros((), dtype=wide, device=logits.device)
    for start in range(0, n, block):
        rows = logits[start : start + block]
        target = targets[start : start + block].unsqueeze(1)
        bent = torch.tanh(rows.to(wide) / softcap) if softcap else None
        scores = rows if bent is None else softcap * bent
        if vocab_size < V:
            scores[:, vocab_size:] = float("-inf")
        log_p = torch.log_softmax(scores, dim=1, dtype=wide)
        loss_sum -= log_p.gather(1, target).sum()
        gradient = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
        rows.copy_(gradient if bent is None else torch.ops.aten.tanh_backward(gradient, bent))
    return loss_sum
