"""Cross entropy of a linear head. In: hidden states and targets; out: mean loss in nats, without the (N, V) logits.

For the 124M model at B=16, T=1024 the fp32 logits would be 3.3 GB. Here a chunk of rows at a time is projected, its
loss taken, and its logits overwritten by their own gradient, in the same pass: no logits are kept or computed twice.
On a CUDA device all of it is one operator, which a compiler cannot take apart: it would run every chunk's matmul first
and hold all logits at once (10.5 GB instead of 1.3 at B=64, T=1024).
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regpt2.base.console import warn
from regpt2.base.device import can_compile

# N = B * T tokens, n tokens in a chunk, C = n_embd, V = padded_vocab_size, v rows of a part of it

IGNORED = -100  # a target that does not count, as in torch; neither does any other negative one

_CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of logits in the compute type, alive at once
_CHUNK_MULTIPLE = {"cuda": 256}  # rows of a chunk: whole tiles of a GPU's matmuls
_BLOCK_BYTES = {"cpu": 1 << 22}  # of fp32 logits: there they stay in the cache from the first pass to the last
_LARGE_BLOCK_BYTES = 1 << 28  # elsewhere, without the kernel
_CPU_PARTS = 8  # of the weight's gradient: one part at a time exists in 16 bits and in 32

Gradients = tuple[Tensor, Tensor, Tensor]
"""Summed loss, and its gradients by hidden states and by the weight, both empty where none was asked for."""


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits (..., V) bent to stay below `softcap`, small ones hardly changed; 0 = as they are. Of their own type."""
    if not softcap:
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (softcap * torch.tanh(logits.to(wide) / softcap)).to(logits.dtype)


def reference_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, softcap: float = 0.0
) -> Tensor:
    """The same loss with the whole logits: the reference for `linear_cross_entropy`."""
    logits = F.linear(hidden, weight.to(hidden.dtype))[:, :vocab_size]
    return F.cross_entropy(softcapped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap), targets)


def chunk_rows(n_tokens: int, padded_vocab_size: int, number_bytes: int, device_type: str) -> int:
    """Tokens whose logits are alive at once: chunks of equal size, of whole tiles on a GPU."""
    multiple = _CHUNK_MULTIPLE.get(device_type, 1)
    most = _CHUNK_BYTES.get(device_type, 1 << 28) // (number_bytes * padded_vocab_size)
    most = max(multiple, most - most % multiple)
    equal = -(-n_tokens // -(-n_tokens // most))
    return -(-equal // multiple) * multiple


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
        targets: (N,) int64, below `vocab_size`. Tokens with a negative target (IGNORED) are left out of the mean; where
            none is left, the loss is 0.
        softcap: the logits go through `softcapped` first.
        chunk_tokens: rows at a time; by default as many as keep the chunk's logits below 256 MiB (CPU), 1 GiB (GPU).
    """
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(hidden.shape[0], weight.shape[0], hidden.element_size(), hidden.device.type)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    settings = (vocab_size, softcap, chunk_tokens, with_gradient, with_gradient and weight.requires_grad)
    loss_sum: Tensor
    if hidden.device.type == "cuda":
        loss_sum = _opaque_loss(hidden, weight, targets, *settings)[0]
    else:
        loss_sum = _LinearCrossEntropy.apply(hidden, weight, targets, *settings)  # type: ignore[no-untyped-call]
    # Divided only here, so that small entries of the gradients are not lost in fp16.
    return loss_sum / (targets >= 0).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Of the sum, on a CPU: the gradient is scaled in place, and a compiler can optimize the inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> Tensor:
        loss_sum, *ctx.gradients = _in_chunks(hidden, weight, targets, *settings)
        ctx.dtype = weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradient once; call it again for another backward")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        of_weight = d_weight.mul_(d_sum).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return _scaled(d_hidden, d_sum), of_weight, None, None, None, None, None, None


def _scaled(d_hidden: Tensor, d_sum: Tensor) -> Tensor:
    """In fp32 or fp64: a factor rounded to 16 bits would be off by up to 0.4 %."""
    return (d_hidden.to(d_sum.dtype) * d_sum).to(d_hidden.dtype)


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    chunk_tokens: int,
    with_gradient: bool,
    weight_learns: bool,
) -> Gradients:
    """Summed loss of N tokens, its gradients (N, C) and (V, C); the latter, a sum over tokens, at least in fp32.

    A frozen weight has none: neither its matmul nor its memory is spent.
    """
    N, V = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)  # sums are kept in fp32, or fp64 for fp64 inputs
    loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
    logits_buffer = hidden.new_empty(min(chunk_tokens, N), V)  # one for all chunks
    d_hidden = hidden.new_empty(hidden.shape if with_gradient else (0,))
    d_weight = hidden.new_zeros(weight.shape if weight_learns else (0,), dtype=wide)
    weight = weight.to(hidden.dtype)
    for start in range(0, N, chunk_tokens):
        rows = hidden[start : start + chunk_tokens]  # (n, C)
        logits = torch.mm(rows, weight.T, out=logits_buffer[: len(rows)])  # (n, V)
        loss_sum += _softmax_loss_(logits, targets[start : start + chunk_tokens], vocab_size, softcap, wide)
        if with_gradient:
            torch.mm(logits, weight, out=d_hidden[start : start + chunk_tokens])
        if weight_learns:
            _add_product(d_weight, logits, rows)
    return loss_sum, d_hidden, d_weight


# On a GPU: one operator for the compiler, with its gradients.
_opaque_loss = torch.library.custom_op("regpt2::linear_cross_entropy", _in_chunks, mutates_args=())


@_opaque_loss.register_fake
def _shapes(hidden: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> Gradients:
    *_, with_gradient, weight_learns = settings
    wide = torch.promote_types(hidden.dtype, torch.float32)
    d_hidden, d_weight = hidden.shape if with_gradient else (0,), weight.shape if weight_learns else (0,)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(d_hidden), hidden.new_empty(d_weight, dtype=wide)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, d_sum: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    of_weight = (d_weight * d_sum).to(ctx.dtype) if ctx.needs_input_grad[1] else None
    return _scaled(d_hidden, d_sum), of_weight, None, None, None, None, None, None


_opaque_loss.register_autograd(_backward, setup_context=_keep_gradients)


def _add_product(d_weight: Tensor, d_logits: Tensor, rows: Tensor) -> None:
    """Add d_logits^T rows to `d_weight` (V, C). A GPU's matmul adds to an fp32 sum by itself, a CPU's does not."""
    if d_weight.device.type == "cuda" and rows.dtype != d_weight.dtype:
        torch.addmm(d_weight, d_logits.T, rows, out_dtype=d_weight.dtype, out=d_weight)
        return
    part_rows = -(-len(d_weight) // _CPU_PARTS)
    for sums, of_part in zip(torch.split(d_weight, part_rows), torch.split(d_logits, part_rows, dim=1), strict=True):
        sums += of_part.T @ rows  # (v, C)


def _softmax_loss_(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float, wide: torch.dtype) -> Tensor:
    """Sum of the losses of a chunk (n, V); `logits` is overwritten by its gradient, softmax - onehot(target).

    With a softcap that is the gradient of the capped logits, and tanh's derivative turns it into that of the logits.
    """
    on_cpu = logits.device.type == "cpu"
    if not on_cpu and wide == torch.float32 and (kernel := gpu_kernel(logits.device)) is not None:
        losses: Tensor = kernel.softmax_loss_(logits, targets, vocab_size, softcap)
        return losses.sum()
    n, V = logits.shape
    block = max(1, _BLOCK_BYTES.get(logits.device.type, _LARGE_BLOCK_BYTES) // (V * wide.itemsize))
    loss_sum = torch.zeros((), dtype=wide, device=logits.device)
    for start in range(0, n, block):
        rows = logits[start : start + block]
        target = targets[start : start + block].unsqueeze(1)  # (n, 1)
        counts = (target >= 0).to(wide)
        target = target.clamp(min=0)
        bent = torch.tanh(rows.to(wide) / softcap) if softcap else None
        scores = rows if bent is None else softcap * bent
        if vocab_size < V:
            scores[:, vocab_size:] = float("-inf")
        log_p = torch.log_softmax(scores, dim=1, dtype=wide)
        at_target = log_p.gather(1, target)
        loss_sum -= (at_target * counts).sum()
        gradient = log_p.exp_().scatter_(1, target, at_target.exp() - 1.0).mul_(counts)
        rows.copy_(gradient if bent is None else torch.ops.aten.tanh_backward(gradient, bent))
    return loss_sum


@functools.cache
def gpu_kernel(device: torch.device) -> ModuleType | None:
    """The Triton kernel for this device; None if it does not run there, with one warning."""
    if not can_compile(device) or torch.version.hip is not None:
        why = "Triton has no kernels for it here"
    else:
        try:
            kernel = importlib.import_module("regpt2.model.kernels.loss_kernel")
            kernel.softmax_loss_(
                torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device), 16, 0.0
            )
            return kernel
        except Exception as error:  # no C compiler, no headers of Python, a driver that is too old: Triton's own errors
            why = str(error).strip().split("\n")[-1] or type(error).__name__
    warn(f"the loss uses torch's own kernels on {device}, which are slower: {why}.")
    return None
